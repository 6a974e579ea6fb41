"""Run the app on a whole dataset and check what every release must hold.

Usage: ``python benchmarks/acceptance.py BIDS_DIR OUT_DIR [option of tlseg …]``

Checked: exit code 0; a dseg for every T1w and T2w, with its shape and affine; left and right of
every paired structure within 30 %; no error of the BIDS validator; nothing in BIDS_DIR changed.
Measured: wall time, and the highest sum of resident memory over the process tree. Prints JSON; exit
code 1 if a check fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from tlseg_bids.labels.protocol import load_protocol

ROOT = Path(__file__).resolve().parents[1]
ASYMMETRY_LIMIT = 0.30
SAMPLE_S = 0.1
SCAN = re.compile(r"^(sub-.+)_(T1w|T2w)\.nii(\.gz)?$")


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, the target of every link, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            with path.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def tree_rss_gib(root: int) -> float:
    """Resident memory of process `root` and all its descendants, in GiB (Linux)."""
    parents, resident = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
            resident[int(folder.name)] = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
    family, grown = {root}, True
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in family} - family
        family |= grown
    return sum(resident.get(pid, 0) for pid in family) * os.sysconf("SC_PAGE_SIZE") / 2**30


def run(command: list[str]) -> tuple[int, float, float]:
    """Exit code, wall time in seconds and peak memory in GiB of `command`."""
    start, peak, process = time.monotonic(), 0.0, subprocess.Popen(command)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, tree_rss_gib(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = process.wait()
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    return code, seconds, peak


def scans(bids_dir: Path) -> list[Path]:
    """Every T1w and T2w of the raw dataset."""
    inside = (path for path in bids_dir.glob("sub-*/**/anat/*") if SCAN.match(path.name))
    return sorted(path for path in inside if "derivatives" not in path.parts)


def labels_of(scan: Path, bids_dir: Path, out_dir: Path) -> Path | None:
    """The dseg of `scan` below `out_dir`, None if there is not exactly one."""
    match = SCAN.match(scan.name)
    assert match is not None
    folder = out_dir / scan.parent.relative_to(bids_dir)
    found = list(folder.glob(f"{match[1]}_space-{match[2]}_seg-*_dseg.nii.gz"))
    return found[0] if len(found) == 1 else None


def problems_of(scan: Path, dseg: Path | None) -> list[str]:
    """What is wrong with the labels of one scan."""
    if dseg is None:
        return [f"{scan.name}: no labels"]
    image, labels = nib.load(scan), nib.load(dseg)
    found = []
    if image.shape[:3] != labels.shape or not np.array_equal(image.affine, labels.affine):
        found.append(f"{dseg.name}: shape or affine differ from the scan's")
    protocol = load_protocol(dseg.name.split("_seg-")[1].split("_")[0])
    table = pd.read_csv(
        dseg.with_name(dseg.name.replace("_dseg.nii.gz", "_desc-volumes_dseg.tsv")), sep="\t"
    )
    volume = dict(zip(table["index"], table["hard_mm3"], strict=True))
    for left, right in protocol.pairs():
        both = volume[left] + volume[right]
        if both == 0 or abs(volume[left] - volume[right]) > ASYMMETRY_LIMIT * both / 2:
            found.append(
                f"{dseg.name}: {left}/{right} are {volume[left]:.0f}/{volume[right]:.0f} mm³"
            )
    return found


def validator_errors(folder: Path) -> list[str]:
    """Codes and places of the errors that the BIDS validator finds in `folder`."""
    program = shutil.which(
        "bids-validator-deno", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if program is None:
        return ["the BIDS validator is not installed: pip install bids-validator-deno"]
    answer = subprocess.run((program, "--format", "json", folder), capture_output=True, text=True)
    issues = json.loads(answer.stdout)["issues"]["issues"]
    return [f"{i['code']} {i.get('location', '')}" for i in issues if i["severity"] == "error"]


def main(bids_dir: Path, out_dir: Path, options: list[str]) -> int:
    """Run, check and print; the exit code says whether everything holds."""
    before = fingerprint(bids_dir)
    command = [str(bids_dir), str(out_dir), "participant", *options]
    code, seconds, peak = run([sys.executable, str(ROOT / "bids_app_entry.py"), *command])
    listed = scans(bids_dir)
    findings = [] if code == 0 else [f"exit code {code}"]
    for scan in listed:
        findings += problems_of(scan, labels_of(scan, bids_dir, out_dir))
    findings += validator_errors(out_dir)
    after = fingerprint(bids_dir)
    findings += [
        f"{n}: changed" for n in before.keys() | after.keys() if before.get(n) != after.get(n)
    ]
    print(json.dumps({
        "dataset": bids_dir.name, "scans": len(listed), "exit_code": code,
        "seconds": round(seconds, 1), "seconds_per_scan": round(seconds / max(1, len(listed)), 1),
        "peak_gib": round(peak, 2), "findings": findings,
    }, indent=2))  # fmt: skip
    return 1 if findings or not listed else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/acceptance.py BIDS_DIR OUT_DIR [option of tlseg …]")
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), sys.argv[3:]))
