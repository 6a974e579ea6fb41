"""A dataset, a model and an output folder, and what may be asked of what lies in it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import toy  # noqa: E402
from tests.datasets import make_dataset  # noqa: E402
from tlseg_bids.cli.run import main  # noqa: E402


@dataclass
class Place:
    """A dataset, a model and an output folder."""

    root: Path
    scans: int
    normal_s: float = 1.0
    bytes: tuple[int, int] = (1, 1)
    reference: dict[str, str] = field(default_factory=dict)

    @property
    def bids(self) -> Path:
        """The dataset."""
        return self.root / "bids"

    @property
    def out(self) -> Path:
        """The output."""
        return self.root / "out"

    def words(self, *more: str) -> list[str]:
        """The command line."""
        fixed = ("participant", "--models", str(self.root / "models"), "--model", "toy",
                 "--skip-bids-validation", "--device", "cpu", "--nprocs", "1")  # fmt: skip
        return [str(self.bids), str(self.out), *fixed, *more]

    def make(self) -> None:
        """Write dataset and model."""
        make_dataset(self.bids, ())
        for number in range(self.scans):
            name = f"sub-{number:02d}"
            toy.write_scan(self.bids / name / "anat" / f"{name}_T1w.nii.gz", number)
        toy.write_toy_model(self.root / "models")

    def fork(self, before: Callable[[], None] = lambda: None, *more: str) -> int:
        """Start the program in a child after `before`; its process id."""
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(null, stream)
            before()
            code = main(self.words(*more))
        finally:
            os._exit(code)

    def run(self, before: Callable[[], None] = lambda: None, *more: str) -> int:
        """Run the program in a child to its end; its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.fork(before, *more), 0)[1])


def fingerprint(folder: Path, endings: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Hash of every file with one of the endings, by its path; temporary ones are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name.endswith(endings) and path.suffix != ".part":
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def broken(out: Path) -> list[str]:
    """Files under a final name that cannot be read to their end."""
    found = []
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.suffix in (".part", ".lock"):
            continue
        try:
            content = path.read_bytes()
            if path.name.endswith(".nii.gz"):
                whole = len(gzip.decompress(content)) > 352
            elif path.suffix == ".json":
                whole = isinstance(json.loads(content), dict)
            elif path.suffix == ".tsv":
                lines = content.decode().split("\n")
                whole = lines[-1] == "" and len({line.count("\t") for line in lines[:-1]}) == 1
            elif path.suffix == ".html":
                whole = content.rstrip().endswith(b"</html>")
            else:
                whole = bool(content)
        except (OSError, ValueError, EOFError):
            whole = False
        if not whole:
            found.append(str(path.relative_to(out)))
    return found


def finished(out: Path) -> list[str]:
    """Subjects whose sidecar, which is written last, is there."""
    return sorted(path.parts[-3] for path in out.glob("sub-*/anat/*_seg-aseg_dseg.json"))
