"""How often each effect of the synthesis is drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

KNOWN = ("t1w", "t2w", "infant_t1w", "infant_t2w")


@dataclass(frozen=True)
class Mix:
    """Shares between 0 and 1, but for the noise.

    Parameters
    ----------
    t1w, t2w, infant_t1w, infant_t2w : float
        Contrasts near what such scans look like; the rest up to 1 is free.
    own : float
        Contrasts near that of the sample's own images, if it has any; the other shares are of what
        this leaves.
    unmyelinated, isointense : float
        Of the infant contrasts: as at birth, and as in the months in which cortex and white matter
        can hardly be told apart. The rest is spread evenly from birth to adult.
    faint : float
        Of the contrasts that are not free: tissues differ by a fourth to six tenths of what they do
        in the table, and fat is up to three times as bright, as in T1w spin echo.
    known_head : float
        Of the contrasts that are not free: skin, bone, eyes and the like follow them too.
    substructure : float
        Large structures have parts of their own intensity.
    gadolinium : float
        Vessels, sinuses, dura, mucosa and choroid plexus take up contrast agent (T1w and free).
    skull_stripped, defaced, cropped : float
        What is cut away; a stripped scan is not defaced.
    thick_slices, low_resolution : float
        One axis of 2 to 6 mm; every axis up to 2.5 times as coarse.
    interleaved : float
        Of the scans in slices of 2 mm and more: every other slice is a little brighter.
    partial_volume : float
        Voxels average over their whole size; in the rest they see a thin part of it (slice gaps).
    bias, gamma, motion, rician : float
        Bias field; a power of the intensity; patient motion; noise of a magnitude image (in the
        rest the noise is Gaussian).
    rescanned : float
        Of real images: scanned once more, with voxels as those of a synthesised one.
    noise : float
        How strong the noise is, against the usual.
    scaled_by_brain : float
        Of the painted images: only the brain decides how they are scaled.
    real : float
        Real images, if the sample has any. In a recipe it is a dataset's, not its mix's.
    """

    t1w: float = 0.3
    t2w: float = 0.15
    infant_t1w: float = 0.1
    infant_t2w: float = 0.1
    own: float = 0.0
    unmyelinated: float = 0.4
    isointense: float = 0.3
    faint: float = 0.0
    known_head: float = 0.6
    substructure: float = 0.8
    gadolinium: float = 0.3
    skull_stripped: float = 0.5
    defaced: float = 0.15
    cropped: float = 0.0
    thick_slices: float = 0.3
    low_resolution: float = 0.15
    interleaved: float = 0.0
    partial_volume: float = 0.85
    bias: float = 0.8
    gamma: float = 0.9
    motion: float = 0.12
    rician: float = 0.6
    rescanned: float = 0.3
    noise: float = 1.0
    scaled_by_brain: float = 0.0
    real: float = 0.0

    def weighted(self, suffix: str) -> Mix:
        """The same shares, but that every known contrast is one of a suffix, T1w or T2w.

        For images that are painted together, a channel of each suffix. Another suffix, or none,
        changes nothing.
        """
        kind = suffix.lower()
        if kind not in ("t1w", "t2w"):
            return self
        none = dict.fromkeys(KNOWN, 0.0)
        adult, infant = self.t1w + self.t2w, self.infant_t1w + self.infant_t2w
        return replace(self, **{**none, kind: adult, f"infant_{kind}": infant})
