"""Faults at random moments: what is lost, and whether a second run completes.

Usage: ``python benchmarks/faults.py [--times 10] [--only FAULT …] [--scans 4] [--seed 0]``

A dataset of toy heads (`tests/toy.py`) is labelled by the program in a forked process, to which the
fault happens; then the same command runs again without it. Checked every time:

- no file under a final name is broken (NIfTI, JSON, TSV and HTML are read to their end);
- what the first run had finished is byte for byte what it was after the second run;
- the second run ends with 0, every scan has all its files, equal to those of a run without faults;
- no temporary file and no lock is left, and the dataset is as it was;
- the exit code, or the table in ``logs/``, tells the fault.

Prints a table; exit code 1 if a file was lost, or a second run did not complete.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fault_place import Place, broken, fingerprint, finished  # noqa: E402

from tlseg_bids import app  # noqa: E402
from tlseg_bids.bids import atomic, runlog  # noqa: E402
from tlseg_bids.errors import OutputError  # noqa: E402
from tlseg_bids.executors import processes  # noqa: E402

DATA = ("_dseg.nii.gz", "_mask.nii.gz", "_dseg.tsv")
Random = np.random.Generator
Fault = Callable[["Place", Random], None]


# ---------------------------------------------------------------- the faults


def kill(place: Place, rng: Random) -> None:
    """``kill -9`` at a random moment."""
    child = place.fork()
    time.sleep(float(rng.uniform(0, place.normal_s)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def full_disk(place: Place, rng: Random) -> None:
    """No space left from a random number of written bytes on."""
    left = [int(rng.uniform(0, rng.choice(place.bytes)))]
    code = place.run(lambda: _patch_writes(left))
    _expect(code in (73, 74), f"exit code {code} on a full disk")


def _patch_writes(left: list[int]) -> None:
    """Every stream of `atomic`, and the status table, fail once `left` bytes were written."""
    plain = atomic._open_own

    class Full(io.BufferedIOBase):
        def __init__(self, stream: io.BufferedWriter) -> None:
            self.stream = stream

        def write(self, data: bytes) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

        def writable(self) -> bool:
            return True

        def flush(self) -> None:
            self.stream.flush()

        def fileno(self) -> int:
            return self.stream.fileno()

        def close(self) -> None:
            self.stream.close()

    def open_own(path: Path, mark: str):
        partial, stream = plain(path, mark)
        return partial, Full(stream)

    def record(*_: object) -> None:
        if left[0] < 0:
            raise OutputError("there is no space left to write", "", "")
        plain_record(*_)

    plain_record = runlog.RunLog.record
    atomic._open_own = open_own
    runlog.RunLog.record = record


def read_only(place: Place, rng: Random) -> None:
    """The output may not be written from a random moment on."""
    calls, after = [0], int(rng.integers(0, 30))
    plain = atomic._open_own

    def refuse(path: Path, mark: str):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain(path, mark)

    code = place.run(lambda: setattr(atomic, "_open_own", refuse))
    _expect(code == 73, f"exit code {code} with a read-only output")


def two_runs(place: Place, rng: Random) -> None:
    """A second run on the same output starts at a random moment."""
    first = place.fork()
    time.sleep(float(rng.uniform(0, place.normal_s)))
    second = place.run()
    codes = (os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), second)
    _expect(codes == (0, 0), f"exit codes {codes} of two runs")
    lines = [line.split("\t") for path in (place.out / "logs").glob("status_*.tsv")
             for line in path.read_text().splitlines()]  # fmt: skip
    done = sum(line[2] == "done" for line in lines)
    _expect(done == place.scans, f"{done} scans were done, {place.scans} there are")


def vanished(place: Place, rng: Random) -> None:
    """A scan is taken away at a random moment."""
    name = f"sub-{int(rng.integers(0, place.scans)):02d}"
    scan = place.bids / name / "anat" / f"{name}_T1w.nii.gz"
    child = place.fork()
    time.sleep(float(rng.uniform(0, place.normal_s)))
    content = scan.read_bytes()
    scan.unlink()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    scan.write_bytes(content)
    _expect(code in (0, 1), f"exit code {code} for a scan that vanished")
    _expect(code == 0 or "file" in _told(place), "logs/ do not tell of the scan")


def memory(place: Place, rng: Random) -> None:
    """The address space is held to a random little above what is taken."""

    def limit() -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = taken + int(rng.integers(1, 24)) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    code = place.run(limit)
    if code == -signal.SIGABRT:  # a library in C++ ended the process, as a kill does
        return
    _expect(code in (0, 1, 74), f"exit code {code} without memory")
    told = _told(place)
    _expect(code != 1 or "not enough memory" in told, f"logs/ tell: {told[:300]}")


def clock(place: Place, rng: Random) -> None:
    """The clock jumps by up to ten years, to and fro, whenever it is asked."""
    import datetime as real

    class Jumping(real.datetime):
        @classmethod
        def now(cls, tz=None):
            return real.datetime.now(tz) + real.timedelta(days=float(rng.uniform(-3650, 3650)))

    def jump() -> None:
        runlog.datetime = type("module", (), {**vars(real), "datetime": Jumping})
        plain = time.time
        time.time = lambda: plain() + float(rng.uniform(-3e8, 3e8))

    code = place.run(jump)
    _expect(code == 0, f"exit code {code} when the clock jumps")


def hang(place: Place, rng: Random) -> None:
    """The work on a random scan never ends; ``--scan-timeout`` gives it up."""
    name = f"sub-{int(rng.integers(0, place.scans)):02d}"
    plain = app.run_job

    def stuck(job, steps, *rest):
        if job.scan.subject == name[4:]:
            with steps("label"):
                time.sleep(3600)
        return plain(job, steps, *rest)

    def before() -> None:
        app.run_job = stuck  # a forked worker has it too
        processes.START = "fork"

    code = place.run(before, "--scan-timeout", "0.05")
    told = _told(place)
    _expect(code == 1, f"exit code {code} when a scan hangs")
    _expect(f"{name}_T1w.nii.gz\tfailed" in told and "took more than" in told, "logs/ do not tell")
    _expect(len(finished(place.out)) == place.scans - 1, "the other scans were not done")


FAULTS: dict[str, tuple[str, Fault]] = {
    "kill": ("`kill -9`", kill),
    "full-disk": ("full disk", full_disk),
    "read-only": ("read-only output", read_only),
    "two-runs": ("two runs on one output", two_runs),
    "vanished": ("a scan that vanishes", vanished),
    "memory": ("out of memory", memory),
    "clock": ("a clock that jumps", clock),
    "hang": ("a worker that hangs", hang),
}


class WrongError(Exception):
    """Something that must hold does not."""


def _expect(holds: bool, text: str) -> None:
    if not holds:
        raise WrongError(text)


def _told(place: Place) -> str:
    return "".join(p.read_text() for p in sorted((place.out / "logs").glob("status_*.tsv")))


def once(place: Place, fault: Fault, rng: Random) -> tuple[int, list[str]]:
    """One fault and the run after it: scans finished between the two, and what is wrong."""
    shutil.rmtree(place.out, ignore_errors=True)
    before = fingerprint(place.bids)
    problems = []
    try:
        fault(place, rng)
    except WrongError as error:
        problems.append(str(error))
    problems += [f"broken: {name}" for name in broken(place.out)]
    done = finished(place.out)
    kept = {name: digest for name, digest in fingerprint(place.out, DATA).items()
            if name.split("/")[0] in done}  # fmt: skip
    code = place.run()
    if code:
        problems.append(f"the second run ended with {code}")
    after = fingerprint(place.out, DATA)
    problems += [f"lost: {name}" for name in kept if after.get(name) != kept[name]]
    problems += [
        f"not as without faults: {n}" for n, h in place.reference.items() if after.get(n) != h
    ]
    problems += [f"broken: {name}" for name in broken(place.out)]
    problems += [
        f"left: {path.name}" for end in ("part", "lock") for path in place.out.rglob(f"*.{end}")
    ]
    if fingerprint(place.bids) != before:
        problems.append("the dataset was changed")
    return len(done), problems


def prepared(root: Path, scans: int) -> Place:
    """A place whose reference is a run without faults; loads everything that runs share."""
    place = Place(root, scans)
    place.make()
    place.run()  # the first run of a machine fills caches
    shutil.rmtree(place.out)
    begun = time.monotonic()
    code = place.run()
    place.normal_s = time.monotonic() - begun
    place.reference = fingerprint(place.out, DATA)
    sizes = [[p.stat().st_size for p in place.out.rglob(name)] for name in ("anat/*", "*.html")]
    place.bytes = (sum(sizes[0]), sum(map(sum, sizes)))
    if code or len(finished(place.out)) != scans:
        raise SystemExit(f"the run without faults ended with {code}")
    return place


def main_program() -> int:
    """Print the table."""
    it = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    it.add_argument("--times", type=int, default=10)
    it.add_argument("--scans", type=int, default=4)
    it.add_argument("--seed", type=int, default=0)
    it.add_argument("--only", nargs="+", choices=list(FAULTS))
    given = it.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, contextlib.chdir(folder):
        place = prepared(Path(folder), given.scans)
        print("| fault | times | scans done before it | files lost | second runs completed |")
        print("|---|--:|--:|--:|--:|")
        for name in given.only or FAULTS:
            title, fault = FAULTS[name]
            found = [once(place, fault, np.random.default_rng([given.seed, len(name), n]))
                     for n in range(given.times)]  # fmt: skip
            lost = sum(text.startswith(("lost", "broken")) for _, wrong in found for text in wrong)
            well = sum(not wrong for _, wrong in found)
            before = sorted(done for done, _ in found)
            print(f"| {title} | {given.times} | {before[0]} to {before[-1]} | {lost} | {well} |",
                  flush=True)  # fmt: skip
            for number, (_, wrong) in enumerate(found):
                for text in wrong[:4]:
                    print(f"  {name} {number}: {text}", file=sys.stderr)
            bad += lost + given.times - well
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main_program())
