"""Cross-validation: who is held out, whatever the networks come from."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_benchmark

CARDS = Path(__file__).resolve().parents[1] / "tlseg_bids" / "zoo" / "cards"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("crossvalidate")


def test_subjects_that_either_network_has_seen_are_not_held_out(benchmark, tmp_path, monkeypatch):
    for name in ("sub-inf01", "sub-inf02", "sub-earlier", "sub-new", "sub-1000"):
        (tmp_path / "infant" / name).mkdir(parents=True)
    before = {"data": {"infant/sub-earlier": "…"}}
    now = {"infant/sub-inf02": "…", "infant/sub-inf03_ses-2": "…", "malc/sub-1000": "…"}
    saved = {"data": now, "lineage": [before]}
    monkeypatch.setattr(benchmark, "load_checkpoint", lambda _: saved)
    pair = (CARDS / "any.toml", Path("fold.pt"))
    assert benchmark.trained_on(CARDS / "any.toml", "malc") == set()
    assert "sub-inf01" in benchmark.trained_on(CARDS / "any.toml", "infant")
    seen = benchmark.trained_on(Path("fold.pt"), "infant")
    assert seen == {"sub-inf02", "sub-inf03", "sub-earlier"}, "what it started from counts, too"
    assert benchmark.held_out(tmp_path / "infant", "infant", pair) == ["1000", "new"]
    (tmp_path / "infant").rename(tmp_path / "changed")
    assert benchmark.held_out(tmp_path / "changed", "infant", pair) == ["1000", "new"]


def test_scans_that_an_earlier_call_left_are_not_scored(benchmark, tmp_path, monkeypatch, capsys):
    """The second call's model has learned from sub-1, which the first call's had not."""
    monkeypatch.setattr(benchmark, "held_out", lambda *_: ["2", "3"])
    monkeypatch.setattr(benchmark, "label", lambda *_: tmp_path / "out-0")

    def scored(words: list[str]) -> int:
        lines = ["predicted\tdice\tsubcortical14"]
        for subject, dice in enumerate((1.0, 0.6, 0.8), 1):
            lines.append(f"sub-{subject}_space-T1w_seg-aseg_dseg.nii.gz\t{dice}\t1")
        Path(words[-1]).write_text("\n".join(lines))
        return 0

    monkeypatch.setattr(benchmark, "evaluate", scored)
    benchmark.main([*map(str, (tmp_path, tmp_path)), "malc", "labels", "none", "a.pt", "b.pt"])
    assert "malc T1w, all: 0.700 ± 0.141 over 2 scans" in capsys.readouterr().out
    assert "sub-1_" not in (tmp_path / "dice.tsv").read_text()


def test_half_a_fold_is_refused(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([str(tmp_path), str(tmp_path), "infant", "labels", "none", "one.pt"])
    assert "every fold is a locator and a segmenter" in capsys.readouterr().err
