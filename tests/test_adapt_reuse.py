"""When an adaptation is made anew, and what is told where it is reused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from tests.test_adapt import Told, answer, asked, base, head, site, write_site  # noqa: F401
from tlseg_bids.adapt.site import fine_tune


class Recorded:
    """Stands for the work of an adaptation; leaves the record that it would leave."""

    keys: ClassVar[list[str]] = []

    def __init__(self, asked, *_):
        self.asked = asked

    def adapt(self, folder: Path) -> dict:
        self.keys.append(self.asked.key)
        found = self.asked.collected
        record = {
            "ContentKey": self.asked.key, "Reason": "done", "Kept": False,
            "Files": ["adaptation.json"],
            "Refused": [{"Name": x.name, "What": x.what, "Hint": x.hint} for x in found.refused],
            "Unlabelled": list(found.unlabelled),
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adaptation.json").write_text(json.dumps(record))
        return record


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Recorded, "keys", [])
    monkeypatch.setattr("tlseg_bids.adapt.site.Work", Recorded)
    return Recorded.keys


def test_a_refused_label_image_that_was_removed_is_not_told_again(tmp_path, base, recorded, caplog):  # noqa: F811
    strange = head(1)
    strange[strange == 10] = 999
    bids, derivative = write_site(tmp_path, {"sub-00": head(0), "sub-01": strange})
    what = asked(bids, derivative, base)
    for _ in range(2):
        caplog.clear()
        assert fine_tune(what, answer, Told()) == 1
        assert "sub-01_T1w: index 999 is not in the look-up table" in caplog.text
    (derivative / "sub-01/anat/sub-01_space-T1w_seg-aseg_dseg.nii.gz").unlink()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert fine_tune(what, answer, Told()) == 0
    assert "999" not in caplog.text
    (told,) = [line for line in caplog.messages if "skipped" in line and "sub-01_T1w" in line]
    assert "labels" in told
    assert len(recorded) == 1, "the model is the same"


def test_a_scan_that_the_record_found_wrong_is_told_again(site, base, recorded):  # noqa: F811
    what = asked(*site, base)
    assert fine_tune(what, answer, Told()) == 0
    file = what.out_dir / "models/lab/adaptation.json"
    record = json.loads(file.read_text())
    record["Refused"] = [{"Name": "sub-01_T1w", "What": "of another person", "Hint": "remove it"}]
    file.write_text(json.dumps(record))
    assert fine_tune(what, answer, Told()) == 1
    assert len(recorded) == 1


def test_an_adaptation_is_made_anew_where_what_the_card_depends_on_changed(site, base, recorded):  # noqa: F811
    bids, derivative = site
    rows = "participant_id\tage\nsub-00\t31\nsub-01\t35\nsub-02\t40\n"
    changes = {
        bids / "participants.tsv": rows,
        bids / "T1w.json": '{"SkullStripped": true}',
        bids / "sub-00/anat/sub-00_T1w.json": '{"ContrastBolusIngredient": "GADOLINIUM"}',
        bids / "dataset_description.json": json.dumps(
            {"Name": "made up", "BIDSVersion": "1.10.0", "License": "CC-BY-4.0"}
        ),
        derivative / "dataset_description.json": '{"Name": "by hand", "BIDSVersion": "1.10.0"}',
    }
    what = asked(*site, base)
    fine_tune(what, answer, Told())
    for number, (file, text) in enumerate(changes.items(), start=2):
        file.write_text(text)
        fine_tune(what, answer, Told())
        assert len(set(recorded)) == number, file.name
        fine_tune(what, answer, Told())
        assert len(recorded) == number, file.name
