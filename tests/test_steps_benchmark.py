"""The benchmark of a scan's steps: what it reads from the sidecars, and what is left."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from tests.scripts import load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("steps")


def write(out: Path, subject: str, **seconds: float) -> None:
    folder = out / f"sub-{subject}" / "anat"
    folder.mkdir(parents=True)
    name = f"sub-{subject}_space-T1w_seg-aseg"
    (folder / f"{name}_dseg.json").write_text(json.dumps({"Seconds": seconds}))
    (folder / f"{name}_desc-volumes_dseg.json").write_text(json.dumps({"index": {}}))


def test_what_the_steps_do_not_tell_is_the_rest(benchmark, tmp_path):
    write(tmp_path, "01", read=1.0, find=2.0, label=3.0, back=1.0)
    write(tmp_path, "02", read=1.0, find=4.0, label=3.0, back=2.0)
    found = benchmark.shares(tmp_path, 24.0)
    assert found == {
        "read": 1.0, "find": 3.0, "label": 3.0, "back": 1.5, "start, write, report": 3.5,
        "all": 12.0,
    }  # fmt: skip


def test_a_folder_without_labels_is_no_result(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="no label map in .* tells how long it took"):
        benchmark.shares(tmp_path, 1.0)


def test_nothing_is_reused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="is there already: name another folder"):
        benchmark.run(tmp_path, tmp_path, tmp_path, [])


def test_versions_keep_their_order_and_are_drawn(benchmark, tmp_path):
    steps = dict.fromkeys((*benchmark.STEPS, benchmark.REST), 1.0)
    rows = pd.DataFrame([
        {"version": name, **steps, "all": whole}
        for name, whole in (("old", 9.0), ("new", 5.0), ("old", 7.0), ("new", 6.0), ("old", 8.0))
    ])  # fmt: skip
    table = benchmark.summary(rows)
    assert list(table.index) == ["old", "new"]
    assert table.loc["old", ["all", "least", "most", "n"]].tolist() == [8.0, 7.0, 9.0, 3]
    benchmark.draw(table, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 5000
