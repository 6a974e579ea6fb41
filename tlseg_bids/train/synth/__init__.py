"""Training examples made on the training device: random shape, contrast, artefacts.

A label map is deformed and every class receives a random intensity (Billot et al. 2023, SynthSeg,
doi:10.1016/j.media.2023.102789), here drawn mostly near what T1w and T2w look like at each age and
a share of it freely. Real images go through the same deformation and artefacts.

`draws` holds the seed, `mix` how often each effect occurs, `shape` the deformation, `ageing` what
grows and shrinks with age, `contrast` the intensities, `anatomy` paints, `enhance` adds contrast
agent, `cuts` takes away, `scanner` acquires, `compose` sets the order of it all.
"""

from __future__ import annotations

from tlseg_bids.train.synth.ageing import Ageing, aged
from tlseg_bids.train.synth.anatomy import paint
from tlseg_bids.train.synth.compose import example
from tlseg_bids.train.synth.contrast import class_means
from tlseg_bids.train.synth.cuts import deface, field_of_view, strip_skull
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.mix import Mix
from tlseg_bids.train.synth.scanner import acquire
from tlseg_bids.train.synth.shape import (
    Place,
    Shape,
    deformed_positions,
    read_classes,
    read_image,
)

__all__ = [
    "Ageing",
    "Mix",
    "Place",
    "Random",
    "Shape",
    "acquire",
    "aged",
    "class_means",
    "deface",
    "deformed_positions",
    "example",
    "field_of_view",
    "paint",
    "read_classes",
    "read_image",
    "strip_skull",
]
