"""Mutated files through the program's own readers: each is a result or a sentence, never more.

Usage: ``python benchmarks/fuzz.py [COUNT] [--target NAME] [--only NAME:NUMBER] [--seed N]``

COUNT inputs (20,000 where nothing is said) are divided among the targets; every input is made from
the seed, the target's name and its number, so a finding can be made again with ``--only``. A worker
process, forked and replaced every `BATCH` inputs, reads them with its address space held to
`MEMORY_GIB` above what the libraries take, and `SECONDS` each. Counted are

- results: the reader returned;
- sentences: an error of `tlseg_bids.errors` with a text of one to `LONGEST` characters;
- tracebacks: any other exception;
- hangs: more than `SECONDS`;
- deaths: the worker was killed, or ended by itself (memory, stack).

Exit code 1 if there is any of the last three.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fuzz_targets import TARGETS, Target  # noqa: E402

from tlseg_bids.errors import TlsegError  # noqa: E402

COUNT, BATCH, SECONDS, MEMORY_GIB, LONGEST = 20_000, 200, 20, 1.5, 4000
KINDS = ("results", "sentences", "tracebacks", "hangs", "deaths")


class TooLongError(BaseException):
    """An input took more than `SECONDS`; no handler of the program may catch this."""


def mutated(target: Target, content: bytes, number: int, seed: int) -> bytes:
    """Input `number` of a target."""
    mark = int.from_bytes(hashlib.sha256(target.name.encode()).digest()[:4], "big")
    return target.mutate(content, np.random.default_rng([seed, mark, number]))


def once(target: Target, folder: Path, content: bytes) -> tuple[str, str]:
    """Kind of what became of one input, and where a traceback ended."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(folder, content)
    except TlsegError as error:
        text = str(error)
        return ("sentences", text) if text.strip() else ("tracebacks", "no text")
    except TooLongError:
        return "hangs", "".join(traceback.format_exc())[-1500:]
    except BaseException:
        return "tracebacks", "".join(traceback.format_exc())[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "results", ""


def quiet() -> None:
    """Warnings of libraries, thousands of them, tell nothing here."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")


def work(target: Target, numbers: range, seed: int, folder: Path, pipe: int) -> None:
    """A worker: a line of JSON for each input; it is flushed, so the last one tells who died."""

    def late(*_: object) -> None:
        raise TooLongError

    quiet()
    signal.signal(signal.SIGALRM, late)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = taken + int(MEMORY_GIB * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.chdir(folder)
    content = target.seed(folder)
    with os.fdopen(pipe, "w") as out:
        for number in numbers:
            kind, where = once(target, folder, mutated(target, content, number, seed))
            print(
                json.dumps([number, kind, where if kind != "sentences" else ""]),
                file=out,
                flush=True,
            )


def batch(target: Target, numbers: range, seed: int) -> tuple[dict[int, tuple[str, str]], int]:
    """Outcomes of a batch by number, and the number that killed the worker (-1: none)."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        child = os.fork()
        if child == 0:
            os.close(read)
            code = 1
            try:
                work(target, numbers, seed, Path(folder), write)
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as lines:
            found = {n: (kind, where) for n, kind, where in map(json.loads, lines)}
        os.waitpid(child, 0)
    missing = [number for number in numbers if number not in found]
    return found, missing[0] if missing else -1


def run(target: Target, count: int, seed: int) -> tuple[Counter[str], list[tuple[int, str, str]]]:
    """All inputs of a target: counts, and what must not be."""
    counts: Counter[str] = Counter()
    bad: list[tuple[int, str, str]] = []
    start = 0
    while start < count:
        numbers = range(start, min(start + BATCH, count))
        found, dead = batch(target, numbers, seed)
        if dead >= 0:
            found[dead] = ("deaths", "the worker ended")
        for number, (kind, where) in sorted(found.items()):
            counts[kind] += 1
            if kind not in ("results", "sentences"):
                bad.append((number, kind, where))
        start = dead + 1 if dead >= 0 else numbers.stop
    return counts, bad


def tell(bad: list[tuple[int, str, str]], name: str) -> None:
    """One example of each place where a traceback ended."""
    seen: Counter[str] = Counter()
    for number, kind, where in bad:
        lines = [line.strip() for line in where.splitlines() if line.strip()]
        files = [line for line in lines if line.startswith("File ") and "tlseg_bids" in line]
        last = lines[-1][:160] if lines else ""
        place = f"{kind} {files[-1] if files else ''} {last.partition(':')[0]}"
        seen[place] += 1
        if seen[place] == 1:
            print(f"  {name}:{number} {place} {last}", file=sys.stderr)


def main_program() -> int:
    """Run the targets and print the table."""
    it = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    it.add_argument("count", nargs="?", type=int, default=COUNT)
    it.add_argument("--target", choices=[target.name for target in TARGETS])
    it.add_argument("--only", metavar="NAME:NUMBER", help="run one input here, with its traceback")
    it.add_argument("--seed", type=int, default=0)
    given = it.parse_args()
    by_name = {target.name: target for target in TARGETS}
    if given.only:
        name, _, number = given.only.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            target = by_name[name]
            content = mutated(target, target.seed(Path(folder)), int(number), given.seed)
            print(content[:2000])
            print(target.read(Path(folder), content))
        return 0
    whole = sum(target.share for target in TARGETS)
    totals: Counter[str] = Counter()
    print(f"| target | {' | '.join(KINDS)} | seconds |\n|---|{'--:|' * (len(KINDS) + 1)}")
    for target in [by_name[given.target]] if given.target else TARGETS:
        begun = time.monotonic()
        share = given.count if given.target else -(-given.count * target.share // whole)
        counts, bad = run(target, share, given.seed)
        cells = " | ".join(str(counts[kind]) for kind in KINDS)
        print(f"| {target.name} | {cells} | {time.monotonic() - begun:.0f} |", flush=True)
        tell(bad, target.name)
        totals += counts
    print(f"| all {sum(totals.values())} | {' | '.join(str(totals[kind]) for kind in KINDS)} | |")
    return int(any(totals[kind] for kind in KINDS[2:]))


if __name__ == "__main__":
    sys.exit(main_program())
