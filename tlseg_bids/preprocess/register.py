"""Where the brain lies: an affine from the centroids of its structures.

A coarse network finds the structures; their centroids are matched with those of the template.
No optimiser, no similarity measure: a least-squares fit that works for every contrast.
"""

from __future__ import annotations

import numpy as np

from tlseg_bids.labels.landmarks import Landmarks
from tlseg_bids.volume import Grid

RIDGE = 0.1


def similarity(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Least-squares rotation, uniform scale and shift, (4, 4), from points (n, 3) mm to points.

    Source: Umeyama 1991, doi:10.1109/34.88573. Reflections are never returned, so left and right
    cannot be exchanged here.
    """
    w = weights / weights.sum()
    source_mean, target_mean = w @ source, w @ target
    a, b = source - source_mean, target - target_mean
    u, singular, vt = np.linalg.svd((b * w[:, None]).T @ a)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (singular * sign).sum() / (w @ (a**2).sum(1))
    matrix = np.eye(4)
    matrix[:3, :3] = scale * rotation
    matrix[:3, 3] = target_mean - scale * rotation @ source_mean
    return matrix


def affine(
    source: np.ndarray, target: np.ndarray, weights: np.ndarray, ridge: float = RIDGE
) -> np.ndarray:
    """Affine (4, 4) from points (n, 3) mm to points, pulled toward the best similarity.

    The similarity is found first; then a linear correction is fitted with a ridge penalty of
    `ridge` times the points' mean square spread, so that few or badly spread points end in the
    similarity and not in a shear.
    """
    first = similarity(source, target, weights)
    moved = source @ first[:3, :3].T + first[:3, 3]
    w = weights / weights.sum()
    centre = w @ moved
    a, residual = moved - centre, target - moved
    shift = w @ residual
    penalty = ridge * (w @ (a**2).sum(1)) / 3
    normal = (a * w[:, None]).T @ a + penalty * np.eye(3)
    correction = np.linalg.solve(normal, (a * w[:, None]).T @ (residual - shift))
    second = np.eye(4)
    second[:3, :3] += correction.T
    second[:3, 3] = shift - correction.T @ centre
    return second @ first


def centroids(weights: np.ndarray, voxel_to_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (channels, 3) in mm and masses in mm³ (channels,) of maps (channels, I, J, K).

    Empty channels have a centroid of NaN and a mass of 0.
    """
    ramps = [np.arange(n, dtype=np.float64) for n in weights.shape[1:]]
    wide = np.promote_types(weights.dtype, np.float32)
    last = np.stack([np.ones_like(ramps[2]), ramps[2]], 1).astype(wide)
    rows, along = np.moveaxis((weights @ last).astype(np.float64), 3, 0)  # all maps are read once
    mass = rows.sum((1, 2))
    moments = [rows.sum(2) @ ramps[0], rows.sum(1) @ ramps[1], along.sum((1, 2))]
    with np.errstate(invalid="ignore", divide="ignore"):
        index = np.stack(moments, 1) / mass[:, None]
    points = index @ voxel_to_mm[:3, :3].T + voxel_to_mm[:3, 3]
    return points, mass * abs(np.linalg.det(voxel_to_mm[:3, :3]))


TURNS = tuple(
    np.diag([*signs, 1.0]) for signs in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
)
"""No turn, and half turns about x, y and z: a header that confuses two directions makes one."""


def _quarter(axis: int, sense: float) -> np.ndarray:
    """A turn by 90° about an axis, (4, 4)."""
    turn, (a, b) = np.eye(4), (n for n in range(3) if n != axis)
    turn[a, a] = turn[b, b] = 0
    turn[a, b], turn[b, a] = -sense, sense
    return turn


QUARTER_TURNS = tuple(_quarter(axis, sense) for axis in range(3) for sense in (1.0, -1.0))
"""Both ways about x, y and z: a header that exchanges two axes makes one."""


LANDMARK_PROBABILITY = 0.2, 0.4
"""Between which a voxel begins to count for a centroid. With a sharp limit a rounding in the last
digit, as another processor makes it, lets a voxel count or not, and moved frames by 0.004 mm."""
LEAST_MM3 = 100.0
LEAST_LANDMARKS = 6
RESIDUAL_SCALE_MM = 6.0
SHOWN_ROUNDS = 20
SHOWN_MM = 0.05
SCALES = 0.5, 3.0
"""What an axis of a head may be stretched by to become the template's. 49 heads of infants and
adults take 0.93 to 1.76; a brain of a seventh of the template's volume, as a preterm one, 1.9."""


def landmark_weights(mass_mm3: np.ndarray) -> np.ndarray:
    """Weight of each centroid in a fit: square root of its volume, capped at 30 ml."""
    return np.sqrt(np.minimum(mass_mm3, 30_000.0))


def robust_affine(
    source: np.ndarray, target: np.ndarray, weights: np.ndarray, rounds: int = 5
) -> tuple[np.ndarray, float]:
    """`affine` with outlying points weighted down, and the weighted RMS residual in mm.

    Iteratively reweighted least squares with the Geman–McClure weight, scale
    `RESIDUAL_SCALE_MM` (Geman & McClure 1987, Bull. Int. Stat. Inst. 52:5-21).
    """
    w = weights
    for _ in range(rounds):
        matrix = affine(source, target, w)
        gap = np.linalg.norm(source @ matrix[:3, :3].T + matrix[:3, 3] - target, axis=1)
        w = weights / (1 + (gap / RESIDUAL_SCALE_MM) ** 2) ** 2
    return matrix, float(np.sqrt((w @ gap**2) / w.sum()))


def fits_a_head(matrix: np.ndarray) -> bool:
    """Whether an affine (4, 4) to the template stretches no axis beyond `SCALES`."""
    scales = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    return bool(scales[-1] >= SCALES[0] and scales[0] <= SCALES[1])


def counted(probabilities: np.ndarray) -> np.ndarray:
    """What each voxel counts for the centroids of the structures, (channels, I, J, K)."""
    low, high = LANDMARK_PROBABILITY
    kept = (probabilities - low) * (1 / (high - low))
    np.clip(kept, 0, 1, out=kept)
    kept *= probabilities
    kept[0] = 0
    return kept


def template_from_probabilities(
    probabilities: np.ndarray, voxel_to_mm: np.ndarray, template: Landmarks,
    native: Grid | None = None,
) -> tuple[np.ndarray, int, float]:  # fmt: skip
    """Affine from the world to the template, from a locator's answer.

    Where the scan ends inside a structure, the centroid of what is left of it is matched with that
    of the same part of the template's. Which part that is depends on the affine, so both are found
    in turns, from the affine of whole structures on.

    Parameters
    ----------
    probabilities : ndarray, shape (channels, I, J, K)
        Of the structures, channel 0 the background.
    voxel_to_mm : ndarray, shape (4, 4)
        Grid of the probabilities to world mm.
    template : Landmarks
    native : Grid, optional
        Of the scan; not given, every structure counts as whole.

    Returns
    -------
    matrix : ndarray, shape (4, 4); identity if there are fewer than `LEAST_LANDMARKS`
    landmarks : int
    residual_mm : float
    """
    points, mass = centroids(counted(probabilities), voxel_to_mm)
    found = mass > LEAST_MM3
    use = found & np.isfinite(template.centroids).all(1)
    if use.sum() < LEAST_LANDMARKS:
        return np.eye(4), int(use.sum()), float("inf")
    weights = landmark_weights(mass)
    matrix, residual = robust_affine(points[use], template.centroids[use], weights[use])
    for _ in range(SHOWN_ROUNDS):
        target = template.shown(matrix, native)
        seen = found & np.isfinite(target).all(1)
        if seen.sum() < LEAST_LANDMARKS:
            break
        before, use = matrix, seen
        matrix, residual = robust_affine(points[use], target[use], weights[use])
        if displacement_mm(before, matrix, template.centroids) < SHOWN_MM:
            break
    return matrix, int(use.sum()), residual


def between(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Affine (4, 4) from a template to another, both given by their centroids (channels, 3) in mm.

    Channels that lack a centroid (NaN) in either do not count, the others evenly.
    """
    use = np.isfinite(one).all(1) & np.isfinite(other).all(1)
    return affine(one[use], other[use], np.ones(use.sum()))


def displacement_mm(one: np.ndarray, other: np.ndarray, template: np.ndarray) -> float:
    """Root mean square distance between where two affines put the template's centroids, in mm.

    `one` and `other` (4, 4) lead from the world to the template; distances are the template's.
    """
    points = template[np.isfinite(template).all(1)]
    change = other @ np.linalg.inv(one)
    moved = points @ change[:3, :3].T + change[:3, 3]
    return float(np.sqrt(((moved - points) ** 2).sum(1).mean()))
