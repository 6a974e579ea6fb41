"""The affine between a scan and a template as a file that other programs read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tlseg_bids.bids.atomic import write_text

DESCRIPTION = (
    "Affine that brings the image to the template, in ITK's text format: for points of the "
    "template in mm, LPS, the points of the scan (antsApplyTransforms -r TEMPLATE -t this)"
)
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_xfm(path: Path, matrix: np.ndarray) -> Path:
    """Write the affine to a template as ITK's ``AffineTransform``, at once or not at all.

    Parameters
    ----------
    path : Path
        Ends in ``.txt``; the same matrix gives the same bytes.
    matrix : ndarray, shape (4, 4)
        From the world of the scan to that of the template, mm, RAS, as in NIfTI. ITK resamples an
        image by asking where each point of the target comes from, and its world is LPS: the file
        holds the inverse, in that world.

    Raises
    ------
    CannotCreateError, OutputError
        As in `atomic`.
    """
    there = RAS_LPS @ np.linalg.inv(matrix) @ RAS_LPS
    numbers = " ".join(f"{value:.10g}" for value in (*there[:3, :3].ravel(), *there[:3, 3]))
    return write_text(
        path,
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n",
    )
