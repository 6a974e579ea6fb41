"""Derivatives of one scan: where they lie, how they are written, and whether they are there.

Names follow BIDS Derivatives; niworkflows' own name patterns have no ``seg``. The sidecar of the
label map holds the content key and is written last: a run that died is resumed from what is whole.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from tlseg_bids.bids import compat
from tlseg_bids.bids.atomic import check_inside, clean_cell, write_json, write_text
from tlseg_bids.bids.lock import hold
from tlseg_bids.bids.metadata import (
    KEY,
    JobLike,
    SegmentationLike,
    calibrated,
    column_texts,
    model_of,
    provenance_of,
    sidecar_of,
    totals,
)
from tlseg_bids.bids.names import BrokenName, build_name
from tlseg_bids.bids.nifti import write_fractions, write_labels
from tlseg_bids.bids.owner import Owner, remove_file
from tlseg_bids.bids.root import DESCRIPTIONS, write_root_files
from tlseg_bids.bids.tables import read_json
from tlseg_bids.bids.xfm import DESCRIPTION as XFM
from tlseg_bids.bids.xfm import write_xfm
from tlseg_bids.errors import CannotCreateError

VISIT_WAIT_S = 600.0
"""How long another scan of a session is waited for that writes names which both could have."""


@dataclass(frozen=True)
class ScanPaths:
    """Where the derivatives of one scan lie; `probseg` and `uncertainty` only on request."""

    dseg: Path
    volumes: Path
    mask: Path
    probseg: Path | None
    uncertainty: Path | None
    report: Path
    figures: Path
    precomputed: tuple[Path, ...] = ()
    standard: tuple[tuple[Path, Path, Path], ...] = ()

    @property
    def sidecar(self) -> Path:
        """JSON of the label map; it holds the content key and is written last."""
        return sidecar_of(self.dseg)

    @property
    def data(self) -> tuple[Path, ...]:
        """Images and tables."""
        optional = (self.probseg, self.uncertainty)
        return (self.dseg, self.volumes, self.mask, *(path for path in optional if path))

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything `Derivatives.write_scan` writes: each data file and its JSON."""
        own = tuple(path for data in self.data for path in (data, sidecar_of(data)))
        spaces = (
            path for three in self.standard for data in three for path in (data, sidecar_of(data))
        )
        return (*own, *self.precomputed, *spaces)

    @property
    def shared(self) -> tuple[Path, ...]:
        """JSON of each image whose name another protocol's or another scan's could have too."""
        images = (self.mask, *(data for three in self.standard for data in three))
        other = (path for path in self.precomputed if path.suffix == ".json")
        return (*map(sidecar_of, images), *other)


class Derivatives:
    """An output folder of one dataset.

    Parameters
    ----------
    out_dir, bids_dir : Path
        Absolute paths of the derivatives and of the raw dataset.
    probabilities : bool
        Whether ``_probseg`` and ``_desc-uncertainty_probseg`` are wanted too.
    command : str
        The command line, for the sidecars.
    """

    def __init__(
        self, out_dir: Path, bids_dir: Path, probabilities: bool = False, command: str = ""
    ) -> None:
        self.out_dir, self.bids_dir, self.probabilities = out_dir, bids_dir, probabilities
        self.command = command

    def paths(self, job: JobLike) -> ScanPaths:
        """Where the derivatives of a job lie.

        Raises
        ------
        CannotCreateError
            If a label or the protocol's name cannot stand in a file name.
        """
        scan, protocol = job.scan, job.card.protocol
        space = {**scan.entities, "space": scan.suffix}
        seg = {**space, "seg": protocol}
        try:
            names = [
                build_name(seg, "dseg", ".nii.gz"),
                build_name({**seg, "desc": "volumes"}, "dseg", ".tsv"),
                build_name({**space, "desc": "brain"}, "mask", ".nii.gz"),
                build_name(seg, "probseg", ".nii.gz"),
                build_name({**seg, "desc": "uncertainty"}, "probseg", ".nii.gz"),
            ]
            for place in job.spaces:
                there = {**scan.entities, **place.entities}
                names.append(build_name({**there, "seg": protocol}, "dseg", ".nii.gz"))
                names.append(build_name({**there, "desc": "brain"}, "mask", ".nii.gz"))
                way = {"from": scan.suffix, "to": place.entities["space"], "mode": "image"}
                names.append(build_name({**scan.entities, **way}, "xfm", ".txt"))
        except BrokenName as reason:
            raise CannotCreateError(
                str(reason), scan.path, "rename the scan as BIDS asks"
            ) from None
        subject = self.out_dir / f"sub-{scan.subject}"
        folder = subject / f"ses-{scan.session}" if scan.session else subject
        files = [folder / "anat" / name for name in names]
        dseg, volumes, mask, probseg, uncertainty, *standard = files
        if not self.probabilities:
            probseg = uncertainty = None
        report = self.out_dir / f"sub-{scan.subject}.html"
        other = compat.Precomputed(self.out_dir, scan, protocol).files if job.precomputed else ()
        return ScanPaths(
            dseg, volumes, mask, probseg, uncertainty, report, subject / "figures", other,
            tuple(zip(standard[::3], standard[1::3], standard[2::3], strict=True)),
        )  # fmt: skip

    def finished(self, job: JobLike) -> bool:
        """Whether the scan was done before with the same content key and every file is there.

        Files whose names others share count where they are of this result.
        """
        paths, owner = self.paths(job), Owner.of(job)
        content, problem = read_json(paths.sidecar)
        if problem or content.get(KEY) != job.key:
            return False
        there = all(path.is_file() and path.stat().st_size > 0 for path in paths.files)
        return there and all(owner.finished(sidecar) for sidecar in paths.shared)

    def lock(self, job: JobLike, wait_s: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """Hold this around checking, processing and writing a scan.

        Entering it raises `LockedError` if another run processes the same scan for longer than
        `wait_s` seconds.
        """
        what = f"{job.scan.path.name} is being processed"
        return self._hold(f"{job.scan.stem}_{job.scan.suffix}", what, wait_s)

    def _lock_visit(self, job: JobLike) -> contextlib.AbstractContextManager[None]:
        """Hold this around names that several scans of a session could have."""
        visit = {key: value for key, value in job.scan.entities.items() if key in ("sub", "ses")}
        name = "_".join(f"{key}-{value}" for key, value in visit.items())
        return self._hold(name, f"{name} is being written", VISIT_WAIT_S)

    def _hold(self, name: str, what: str, wait_s: float) -> contextlib.AbstractContextManager[None]:
        mark = hashlib.sha1(name.encode()).hexdigest()[:8]
        path = self.out_dir / "logs" / "locks" / f"{name[:150]}-{mark}.lock"
        return hold(path, what, wait_s)

    def write_root(self, cards: Iterable[Any], protocols: Mapping[str, pd.DataFrame]) -> None:
        """Write or update the files at the root of the output folder.

        Parameters
        ----------
        cards : iterable of ModelCard
            Every model of the plan.
        protocols : mapping of str to DataFrame
            Each protocol's name and table (`LabelProtocol.table`).

        Raises
        ------
        UsageError
            If the output folder is the BIDS folder itself.
        CannotCreateError
            If it holds another program's dataset or results of another dataset, or cannot be made.
        """
        write_root_files(self.out_dir, self.bids_dir, tuple(cards), protocols)

    def write_scan(
        self,
        job: JobLike,
        segmentation: SegmentationLike,
        provenance: Mapping[str, Any],
        probabilities: Iterable[np.ndarray] | None = None,
    ) -> tuple[Path, ...]:
        """Write all derivatives of a scan; hold `lock` meanwhile.

        What an earlier result of the scan in this protocol had beyond them is removed.

        Parameters
        ----------
        job : Job
            The scan, its model and the content key.
        segmentation : Segmentation
            On the scan's own grid.
        provenance : mapping
            More for the sidecar: seconds per step, peak memory, steps. Keys are written in
            CamelCase (``peak_memory_gib`` becomes ``PeakMemoryGib``).
        probabilities : iterable of ndarray, shape (I, J, K), float 0 to 1
            The background's, then one per row of the volumes table; needed if the class was made
            with `probabilities`, and for a `precomputed` job.

        Returns
        -------
        tuple of Path
            The files, as in `ScanPaths.files`.

        Raises
        ------
        CannotCreateError, OutputError
            If a file cannot be made or written.
        ScanError
            If the result does not fit the scan's grid.
        """
        paths, scan, owner = self._begin(job), job.scan.path, Owner.of(job)
        other = compat.Precomputed(self.out_dir, job.scan, job.card.protocol)
        with self._lock_visit(job):
            for folder in (paths.dseg.parent, other.folder):
                owner.remove_others(folder, paths.files)
        common = {"SpatialReference": job.scan.uri, "Sources": owner.sources}
        volumes = segmentation.volumes
        write_labels(paths.dseg, segmentation.labels.data, scan, int(volumes["index"].max()))
        mask = segmentation.brain_mask.astype(np.uint8)
        owner.write({"Type": "Brain", **common, **model_of(job)}, write_labels, paths.mask, mask,
                    scan, 1)  # fmt: skip
        write_text(paths.volumes, _tsv(volumes))
        write_json(sidecar_of(paths.volumes), {**column_texts(volumes), **common,
                   **totals(segmentation), **calibrated(job), **model_of(job)})  # fmt: skip
        probabilities = probabilities or ()
        if job.precomputed:
            table, grid = job.card.protocol_of(job.card.protocol).table, segmentation.labels.grid
            tissues = np.zeros((len(compat.TISSUES), *grid.shape), np.float32)
            probabilities = compat.tissue_maps(probabilities, table, tissues)
        if paths.probseg and paths.uncertainty:
            self._write_fractions(paths, job, segmentation, probabilities)
        if job.precomputed:
            collections.deque(probabilities, maxlen=0)  # those that were not written
            with self._lock_visit(job):
                other.write(owner, segmentation.labels.data, mask, table, tissues)
        told = {**({"command": self.command} if self.command else {}), **provenance}
        write_json(paths.sidecar, {**common, **provenance_of(job, segmentation, told)})
        return paths.files

    def write_space(
        self, job: JobLike, number: int, segmentation: SegmentationLike, matrix: np.ndarray
    ) -> None:
        """Write labels and mask on the grid of a template, and the way there; before `write_scan`,
        which ends a scan.

        Parameters
        ----------
        job : Job
        number : int
            Of the template in `job.spaces`.
        segmentation : Segmentation
            On the template's grid.
        matrix : ndarray, shape (4, 4)
            From the world of the scan to that of the template, mm.
        """
        space = job.spaces[number]
        dseg, mask, xfm = (paths := self._begin(job)).standard[number]
        first = [three[-1] for three in paths.standard].index(xfm) == number
        owner, largest = Owner.of(job), int(segmentation.volumes["index"].max())
        about = {
            "SpatialReference": f"https://templateflow.s3.amazonaws.com/{_in_archive(space.file)}",
            "TemplateFromScan": np.round(matrix, 6).tolist(),
            **({"Resolution": f"That of {space}"} if space.res else {}),
            **model_of(job),
        }
        brain = segmentation.brain_mask.astype(np.uint8)
        with self._lock_visit(job):
            owner.write({"Manual": False, **about}, write_labels, dseg, segmentation.labels.data,
                        space.file, largest)  # fmt: skip
            owner.write({"Type": "Brain", **about}, write_labels, mask, brain, space.file, 1)
            if first:  # of several resolutions of a template
                owner.write({"Description": XFM, **about}, write_xfm, xfm, matrix)

    def _begin(self, job: JobLike) -> ScanPaths:
        """Before anything of a scan is written: it no longer counts as finished."""
        paths = self.paths(job)
        check_inside(paths.dseg.parent, self.out_dir)
        remove_file(paths.sidecar)
        return paths

    def _write_fractions(self, paths: ScanPaths, job, segmentation, probabilities) -> None:
        """Probability of every label (4-D); entropy of all of them and the background (3-D)."""
        scan, names = job.scan.path, [str(name) for name in segmentation.volumes["name"]]
        owner, common = Owner.of(job), {"SpatialReference": job.scan.uri, **model_of(job)}
        entropy = np.zeros(segmentation.labels.data.shape, np.float32)
        passing = add_entropy(probabilities, len(names) + 1, entropy)
        structures = islice(passing, 1, None)  # the background has no row in the table
        owner.write({"LabelMap": names, **common}, write_fractions, paths.probseg, structures,
                    len(names), scan)  # fmt: skip
        text = DESCRIPTIONS["uncertainty"]
        owner.write({"Description": text, **common}, write_fractions, paths.uncertainty, [entropy],
                    1, scan)  # fmt: skip


def add_entropy(
    probabilities: Iterable[np.ndarray], count: int, entropy: np.ndarray
) -> Iterator[np.ndarray]:
    """Pass every channel's probabilities on, and add up their entropy.

    Parameters
    ----------
    probabilities : iterable of ndarray, shape (I, J, K)
        Of `count` channels, 0 to 1, background among them.
    count : int
        How many there are.
    entropy : ndarray of float32, shape (I, J, K)
        Zeros; once all were passed on, Shannon's entropy (1948,
        doi:10.1002/j.1538-7305.1948.tb01338.x) over log `count`, its largest value: 0 to 1.
    """
    for one in probabilities:
        entropy += special.entr(one, dtype=np.float32) / np.float32(np.log(max(count, 2)))
        yield one


def _in_archive(file: Path) -> str:
    """Path of a template below the root of TemplateFlow."""
    parts = file.parts
    start = max(number for number, part in enumerate(parts[:-1]) if part.startswith("tpl-"))
    return "/".join(parts[start:])


def _tsv(table: pd.DataFrame) -> str:
    lines = [table.columns, *table.itertuples(index=False)]
    return "".join("\t".join(clean_cell(cell) for cell in line) + "\n" for line in lines)
