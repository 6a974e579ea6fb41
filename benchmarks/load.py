"""Many subjects in one output, with faults on the way: nothing lost, memory and time per scan flat.

Usage: ``python benchmarks/load.py [--subjects 1000] [--kills 3] [--broken 20] [--seed 0]``

Subjects are links to a few toy heads (`tests/toy.py`), some of them broken on purpose (cut short,
linked to nothing, empty). The run is killed `--kills` times at random numbers of finished scans,
and started again with the same command; the last run goes to its end. Printed are how many scans
were done, failed and lost, the resident memory of the runs at their beginning and end, and the
seconds per scan there. Exit code 1 if a scan was lost, or a good one failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from fault_place import Place, broken, finished  # noqa: E402

from tests import toy  # noqa: E402
from tests.datasets import make_dataset  # noqa: E402
from tlseg_bids.bids.status import read_status  # noqa: E402

POOL = 5
EVERY_S = 1.0
MIB = 2**20


@dataclass
class Watched:
    """A run: resident memory in MiB and finished scans, by seconds since its start."""

    seconds: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def look(self, process: int, since: float, done: int) -> None:
        """Take one sample."""
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        self.seconds.append(time.monotonic() - since)
        self.memory_mib.append(pages * os.sysconf("SC_PAGE_SIZE") / MIB)
        self.done.append(done)


def write(place: Place, subjects: int, bad: int, rng: np.random.Generator) -> None:
    """The dataset: links to a few heads, and some broken ones."""
    make_dataset(place.bids, ())
    pool = [toy.write_scan(place.root / "pool" / f"{n}.nii.gz", n) for n in range(POOL)]
    wrong = set(rng.choice(subjects, bad, replace=False).tolist())
    for number in range(subjects):
        name = f"sub-{number:05d}"
        scan = place.bids / name / "anat" / f"{name}_T1w.nii.gz"
        scan.parent.mkdir(parents=True)
        if number not in wrong:
            scan.symlink_to(pool[number % POOL])
        elif number % 3 == 0:
            scan.write_bytes(pool[0].read_bytes()[:500])
        elif number % 3 == 1:
            scan.symlink_to(place.root / "nowhere")
        else:
            scan.touch()
    toy.write_toy_model(place.root / "models")


def run(place: Place, kill_at: int) -> tuple[int, Watched]:
    """One run, killed when so many scans are finished (0: never); its exit code."""
    child, since, watched = place.fork(), time.monotonic(), Watched()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), watched
        done = len(finished(place.out))
        watched.look(child, since, done)
        if kill_at and done >= kill_at:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), watched
        time.sleep(EVERY_S)


def rate(watched: Watched, share: tuple[float, float]) -> float:
    """Seconds per scan between two shares of what a run did; reports that follow do not count."""
    done, seconds = np.array(watched.done), np.array(watched.seconds)
    first, last = (int(np.argmax(done >= done[0] + part * (done[-1] - done[0]))) for part in share)
    return float((seconds[last] - seconds[first]) / max(1, done[last] - done[first]))


def main() -> int:
    """Run, and print what became of it."""
    it = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    it.add_argument("--subjects", type=int, default=1000)
    it.add_argument("--kills", type=int, default=3)
    it.add_argument("--broken", type=int, default=20)
    it.add_argument("--seed", type=int, default=0)
    given = it.parse_args()
    rng = np.random.default_rng(given.seed)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        place = Place(Path(folder), given.subjects)
        write(place, given.subjects, given.broken, rng)
        stops = sorted(
            rng.integers(given.subjects // 20, given.subjects // 2, given.kills).tolist()
        )
        begun = time.monotonic()
        for number, stop in enumerate((*stops, 0)):
            code, watched = run(place, stop)
            label = (watched.memory_mib[len(watched.done) // 10], watched.memory_mib[-1])
            print(f"run {number + 1}: code {code}, {watched.done[-1]} scans finished after it, "
                  f"{watched.seconds[-1]:.0f} s, {label[0]:.0f} MiB at a tenth, {label[1]:.0f} MiB "
                  f"at the end, {rate(watched, (0, 0.3)):.2f} s a scan in the first third, "
                  f"{rate(watched, (0.7, 1)):.2f} s in the last, "
                  f"{watched.seconds[-1] - watched.seconds[np.argmax(watched.done)]:.0f} s after "
                  f"the last scan", flush=True)  # fmt: skip
        status = read_status(place.out)
        good = given.subjects - given.broken
        told = {
            kind: sum(s.status == kind for s in status) for kind in ("done", "reused", "failed")
        }
        twice = sum(s.times_done > 1 for s in status)
        labelled = len(finished(place.out))
        lost = good - labelled
        damaged = broken(place.out)
        print(f"{given.subjects} subjects, {given.kills} kills: {labelled} of {good} "
              f"good scans labelled, {told['failed']} of {given.broken} broken ones told, "
              f"{given.subjects - len(status)} not mentioned, {twice} done twice, {lost} lost, "
              f"{len(damaged)} damaged files, {time.monotonic() - begun:.0f} s")  # fmt: skip
        wrong = lost or damaged or told["failed"] != given.broken or len(status) != given.subjects
        return int(bool(wrong) or code != 1)


if __name__ == "__main__":
    sys.exit(main())
