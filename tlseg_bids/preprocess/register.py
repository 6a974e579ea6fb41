"""Where the brain lies: an affine from the centroids of its structures.

A coarse network finds the structures; their centroids are matched with those of the template.
No optimiser, no similarity measure: a least-squares fit that works for every contrast.
"""

from __future__ import annotations

import numpy as np

RIDGE = 0.02


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
    shape = weights.shape[1:]
    mass = weights.sum((1, 2, 3), dtype=np.float64)
    marginals = [
        weights.sum(tuple(1 + a for a in range(3) if a != axis), dtype=np.float64)
        @ np.arange(shape[axis], dtype=np.float64)
        for axis in range(3)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        index = np.stack(marginals, 1) / mass[:, None]
    points = index @ voxel_to_mm[:3, :3].T + voxel_to_mm[:3, 3]
    return points, mass * abs(np.linalg.det(voxel_to_mm[:3, :3]))
