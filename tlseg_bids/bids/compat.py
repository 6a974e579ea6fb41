"""Derivatives under the names that fMRIPrep, sMRIPrep and NiBabies take as precomputed.

They lie in ``OUT_DIR/compat``, a dataset of its own, because these programs ask for a name with few
entities and would find the program's own files too. NiBabies asks for ``space-T1w`` (or T2w),
sMRIPrep and fMRIPrep for no ``space``: a T1w is written under both names.

The queries are those of ``io_spec.json`` (sMRIPrep 0.19) and ``io_spec_anat.json`` (NiBabies 25.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import as_json, update_text
from tlseg_bids.bids.metadata import sidecar_of
from tlseg_bids.bids.names import build_name
from tlseg_bids.bids.nifti import write_fractions, write_labels
from tlseg_bids.bids.owner import Owner, remove_file
from tlseg_bids.bids.root import label_table, source_of
from tlseg_bids.bids.scan import Scan

FOLDER = "compat"
TISSUES = {"GM": 1, "WM": 2, "CSF": 3}
"""Label and index of a tissue in ``dseg``, in the order of the queries."""
GROUPS = {
    "cortex": "GM", "deep-grey": "GM", "cerebellum": "GM", "white-matter": "WM",
    "brain-stem": "WM", "lesion": "WM", "csf": "CSF", "outer-csf": "CSF",
}  # fmt: skip
"""Groups of a protocol's structures and their tissue; the rest belongs to none."""
ASEG = "aseg"


class Precomputed:
    """What is written of one scan.

    Parameters
    ----------
    out_dir : Path
        Root of the program's own derivatives.
    scan : Scan
        Its acquisition, run and so on are left out of the names, for which nobody asks.
    protocol : str
        Of its labels; ``desc-aseg`` is written for `ASEG` alone, whose indices are FreeSurfer's.
    """

    def __init__(self, out_dir: Path, scan: Scan, protocol: str) -> None:
        self.root, self.scan, self.protocol = out_dir / FOLDER, scan, protocol
        visit = {key: value for key, value in scan.entities.items() if key in ("sub", "ses")}
        self.folder = self.root.joinpath(*(f"{k}-{v}" for k, v in visit.items()), "anat")
        self._spaces = [{**visit, "space": scan.suffix}]
        if scan.suffix == "T1w":
            self._spaces.append(visit)

    def _path(self, entities: Mapping[str, str], suffix: str, **more: str) -> Path:
        return self.folder / build_name({**entities, **more}, suffix, ".nii.gz")

    @property
    def files(self) -> tuple[Path, ...]:
        """Every image and its JSON."""
        images = []
        for entities in self._spaces:
            images += [self._path(entities, "mask", desc="brain"), self._path(entities, "dseg")]
            if self.protocol == ASEG:
                images.append(self._path(entities, "dseg", desc=ASEG))
            images += [self._path(entities, "probseg", label=tissue) for tissue in TISSUES]
        return tuple(path for image in images for path in (image, sidecar_of(image)))

    def write(
        self, owner: Owner, labels: np.ndarray, mask: np.ndarray, table: pd.DataFrame,
        tissues: np.ndarray,
    ) -> None:  # fmt: skip
        """Write the files, in place of those of another scan or protocol.

        Parameters
        ----------
        owner : Owner
            The result that they are of.
        labels, mask : ndarray, shape (I, J, K)
            Indices of the protocol; the brain.
        table : DataFrame
            `LabelProtocol.table`.
        tissues : ndarray, shape (3, I, J, K), 0 to 1
            Probability of each of `TISSUES`, as `tissue_maps` collects it.
        """
        self._describe(table)
        place = {"SpatialReference": self.scan.uri}
        index = {g: TISSUES[tissue] for g, tissue in GROUPS.items()}
        code = np.zeros(int(table["index"].max()) + 1, np.uint8)
        code[table["index"]] = table["group"].map(index).fillna(0)
        for entities in self._spaces:
            scan, aseg = self.scan.path, self._path(entities, "dseg", desc=ASEG)
            paths = [(self._path(entities, "mask", desc="brain"), {"Type": "Brain"}, mask)]
            paths.append((self._path(entities, "dseg"), {"Manual": False}, code[labels]))
            if self.protocol == ASEG:
                paths.append((aseg, {"Manual": False}, labels))
            else:
                remove_file(aseg)
                remove_file(sidecar_of(aseg))
            for path, about, data in paths:
                owner.write({**place, **about}, write_labels, path, data.astype(np.int16), scan,
                            int(data.max()))  # fmt: skip
            for tissue, probability in zip(TISSUES, tissues, strict=True):
                path = self._path(entities, "probseg", label=tissue)
                owner.write(place, write_fractions, path, [probability], 1, scan)

    def _describe(self, table: pd.DataFrame) -> None:
        about = {
            "Name": "Precomputed derivatives for fMRIPrep, sMRIPrep and NiBabies",
            "BIDSVersion": "1.10.0", "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "tlseg", "Version": __version__}],
            **source_of(self.root, self.scan.bids_dir),
        }  # fmt: skip
        update_text(self.root / "dataset_description.json", as_json(about))
        update_text(self.root / "README.md", "# Derivatives of tlseg under other programs' names\n")
        rows = ["index\tname", "0\tBackground", *(f"{n}\t{name}" for name, n in TISSUES.items())]
        update_text(self.root / "dseg.tsv", "\n".join(rows) + "\n")
        if self.protocol == ASEG:  # else `dseg.tsv` would be inherited
            update_text(self.root / f"desc-{ASEG}_dseg.tsv", label_table(table))


def tissue_maps(
    maps: Iterable[np.ndarray], table: pd.DataFrame, tissues: np.ndarray
) -> Iterator[np.ndarray]:
    """Pass on the probability of every channel, and add it to its tissue.

    Parameters
    ----------
    maps : iterable of ndarray, shape (I, J, K)
        In the order of `table`, the background first.
    table : DataFrame
        `LabelProtocol.table`.
    tissues : ndarray, shape (3, I, J, K)
        Zeros, filled as the maps pass.
    """
    rows = list(TISSUES)
    for group, probability in zip(table["group"], maps, strict=True):
        if tissue := GROUPS.get(group):
            tissues[rows.index(tissue)] += probability
        yield probability


def first_of_visit(scans: Iterable[Any]) -> set[int]:
    """Numbers of the scans that are the first with their suffix in their session.

    These programs know one T1w and one T2w of a session; scans after contrast agent come last.
    """
    chosen: dict[tuple[str | None, ...], tuple[bool, int]] = {}
    for number, scan in enumerate(scans):
        key = (scan.subject, scan.session, scan.suffix)
        rank = (scan.contrast_agent is not None, number)
        chosen[key] = min(rank, chosen.get(key, rank))
    return {number for _, number in chosen.values()}
