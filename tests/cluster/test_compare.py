"""The comparison of two outputs sees what matters and passes over what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.compare import differences

PAGE = """<p class="made">Made 2026-01-0{n} UTC</p><h1>Time</h1>
<dt>Time</dt><dd>1{n} s</dd> <dt>Command</dt><dd class="mono">tlseg {n}</dd>
<dt>Device</dt><dd>cpu</dd>"""


def make(folder: Path, number: int) -> Path:
    """An output whose times are `number`."""
    files = {
        "sub-1.html": PAGE.format(n=number),
        "sub-1/x_dseg.json": json.dumps(
            {"Seconds": number, "PeakMemoryGib": number, "Command": f"tlseg {number}", "Key": "a"}
        ),
        "sub-1/x_dseg.nii.gz": "labels",
        "logs/status.tsv": str(number),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Two outputs that differ in their times."""
    return make(tmp_path / "one", 1), make(tmp_path / "other", 2)


def test_times_are_no_difference(two):
    assert differences(*two) == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sub-1.html", "cpu", "cuda"),
        ("sub-1.html", "<h1>Time</h1>", "<h1>Time 2</h1>"),
        ("sub-1/x_dseg.json", '"a"', '"b"'),
        ("sub-1/x_dseg.nii.gz", "labels", "labelz"),
    ],
)
def test_everything_else_is(two, name, old, new):
    path = two[1] / name
    path.write_text(path.read_text().replace(old, new))
    assert differences(*two) == [f"{name}: differs"]


def test_a_missing_file_is(two):
    (two[0] / "sub-1/x_dseg.nii.gz").unlink()
    (two[1] / "sub-1.html").unlink()
    assert differences(*two) == [
        f"sub-1.html: only in {two[0]}", f"sub-1/x_dseg.nii.gz: only in {two[1]}"
    ]  # fmt: skip
