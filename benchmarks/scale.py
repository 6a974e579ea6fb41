"""What a study costs: time, money, disk and files, from what was measured per scan.

Usage: ``python benchmarks/scale.py`` prints the tables of docs/explanation/scale.md as Markdown.
``--price`` and ``--gpu-seconds`` put in your own price and your own measurement on a GPU.

``python benchmarks/scale.py --measure BIDS_DIR OUT_DIR [--float32] [option of tlseg …]`` labels a
dataset into a new folder and prints, per scan, the figures of `PerScan` as JSON: processor seconds,
not seconds on the clock, so that other jobs of the machine disturb little.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCANS = (100, 10_000, 100_000)
CORES_PER_NODE = 32
NODES = 20
HOUR = 3600.0
ROOT = Path(__file__).resolve().parents[1]
RUN = "import sys; from tlseg_bids.cli.run import main; sys.exit(main(sys.argv[1:]))"
FLOAT32 = """import torch
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
"""


@dataclass(frozen=True)
class PerScan:
    """One scan, whole head, 0.88 mm; docs/explanation/scale.md says where each figure is from.

    Seconds are core seconds. Files without their 3 folders.
    """

    core_s_bf16: float = 14.3
    core_s_fp32: float = 63.0
    output_mib: float = 7.1
    output_files: float = 10.0
    input_mib: float = 3.7
    log_kib: float = 0.71


def row(scans: int, core_s: float, price: float) -> list[str]:
    """Times and money for `scans` scans of `core_s` core seconds each, at `price` per core hour."""
    core_h = scans * core_s / HOUR
    node_h = core_h / CORES_PER_NODE
    return [
        f"{scans:,}", _time(core_h), _time(core_h / 2), _time(node_h), _time(node_h / NODES),
        f"{core_h * price:,.2f}",
    ]  # fmt: skip


def storage(scans: int, one: PerScan) -> list[str]:
    """Space and files for `scans` scans."""
    return [
        f"{scans:,}", _size(scans * one.input_mib), _size(scans * one.output_mib),
        f"{scans * one.output_files:,.0f}", f"{2 * scans:,}", _size(scans * one.log_kib / 2**10),
    ]  # fmt: skip


def _time(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} d"


def _size(mib: float) -> str:
    for unit, step in (("TiB", 2**20), ("GiB", 2**10)):
        if mib >= step:
            return f"{mib / step:.1f} {unit}"
    return f"{mib:.1f} MiB"


def measure(bids_dir: Path, out_dir: Path, float32: bool, options: list[str]) -> dict[str, float]:
    """Label every scan of a dataset on the CPU and say what one of them cost, start included."""
    if out_dir.exists():
        sys.exit(f"{out_dir} is there already: name a new folder, nothing may be reused")
    words = [str(bids_dir), str(out_dir), "participant", "--device", "cpu", *options]
    code = FLOAT32 + RUN if float32 else RUN
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with next((out_dir / "logs").glob("status_*.tsv")).open(encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t") if row["status"] == "done"]
    results = [p for p in out_dir.glob("sub-*/**/*") if p.is_file()] + [*out_dir.glob("sub-*.html")]
    return {
        "scans": len(rows),
        "core_s": round((used.ru_utime + used.ru_stime) / len(rows), 1),
        "peak_gib": max(float(row["peak_memory_gib"]) for row in rows),
        "output_mib": round(sum(p.stat().st_size for p in results) / 2**20 / len(rows), 2),
        "output_files": round(len(results) / len(rows), 1),
    }


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(price: float, gpu_seconds: float | None, one: PerScan) -> str:
    """All tables, with their headings."""
    times = ["scans", "core hours", "2 cores", f"1 node of {CORES_PER_NODE} cores",
             f"{NODES} nodes", "cost"]  # fmt: skip
    parts = []
    for name, core_s in (("bfloat16", one.core_s_bf16), ("float32", one.core_s_fp32)):
        rows = [row(scans, core_s, price) for scans in SCANS]
        parts.append(f"CPU, {name} ({core_s:g} core seconds a scan):\n\n" + markdown(times, rows))
    if gpu_seconds is not None:
        rows = [[f"{n:,}", _time(n * gpu_seconds / HOUR), _time(n * gpu_seconds / HOUR / NODES)]
                for n in SCANS]  # fmt: skip
        head = ["scans", "1 GPU", f"{NODES} GPUs"]
        parts.append(f"GPU ({gpu_seconds:g} s a scan):\n\n" + markdown(head, rows))
    head = ["scans", "input", "output", "files", "entries of OUT_DIR", "logs"]
    parts.append("Disk:\n\n" + markdown(head, [storage(scans, one) for scans in SCANS]))
    return "\n".join(parts)


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--price", type=float, default=0.04, help="of a core hour (default 0.04)")
    options.add_argument("--gpu-seconds", type=float, help="seconds a scan takes on a GPU")
    options.add_argument("--measure", nargs=2, type=Path, metavar=("BIDS_DIR", "OUT_DIR"))
    options.add_argument("--float32", action="store_true", help="as processors without bfloat16 do")
    given, more = options.parse_known_args()
    if given.measure:
        bids_dir, out_dir = (path.absolute() for path in given.measure)
        print(json.dumps(measure(bids_dir, out_dir, given.float32, more)))
        return
    if more:
        options.error(f"unrecognized arguments: {' '.join(more)}")
    print(tables(given.price, given.gpu_seconds, PerScan()), end="")


if __name__ == "__main__":
    main()
