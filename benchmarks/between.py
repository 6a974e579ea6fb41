"""A checkpoint between two: the mean of the weights of a run and of what it started from.

Usage: ``python benchmarks/between.py CHECKPOINT START SHARE OUT``

START is a checkpoint or the card of a model (its segmenter). SHARE of the weights are those of
CHECKPOINT, the rest those of START (Izmailov et al. 2018, arXiv:1803.05407; Wortsman et al. 2022,
arXiv:2109.01903); what else CHECKPOINT holds stays, so that OUT can be exported as it can, for a
trial: the card that comes of it does not tell that weights were mixed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tlseg_bids.train.start import load_start


def between(checkpoint: Path, start: Path, share: float) -> dict[str, object]:
    """The checkpoint, its average nearer to that of the start."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    mine, other = saved["average"], load_start(start, "segmenter")["average"]
    if mine.keys() != other.keys() or any(mine[k].shape != other[k].shape for k in mine):
        sys.exit(f"{checkpoint} and {start} are not the same network; name what the run began with")
    saved["average"] = {key: torch.lerp(other[key], mine[key].float(), share) for key in mine}
    return saved


def main(words: list[str]) -> int:
    """Mix and write."""
    torch.save(between(Path(words[0]), Path(words[1]), float(words[2])), words[3])
    print(words[3])
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
