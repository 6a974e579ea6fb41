"""Labels in a protocol of the site's own: which sides they have, and models that answer in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.test_adapt import (
    PROTOCOL,
    Told,
    answer,
    asked,
    base,  # noqa: F401
    head,
    recipe,
    save_nifti,
    write_site,
)
from tlseg_bids.adapt import work
from tlseg_bids.adapt.judge import Verdict
from tlseg_bids.adapt.reading import own_protocol, read_as
from tlseg_bids.adapt.site import fine_tune
from tlseg_bids.zoo.registry import load_cards


def write_own_site(root: Path, names: dict[int, str], persons: int = 2) -> tuple:
    """A site that labels as 1 what lies left and as 2 what lies right, if `names` has them."""
    rows = "".join(f"{index}\t{name}\n" for index, name in {0: "Background", **names}.items())
    site = write_site(root, {}, rows=f"index\tname\n{rows}")
    (site[1] / "seg-aseg_dseg.tsv").rename(site[1] / "seg-lab_dseg.tsv")
    side = PROTOCOL.table.set_index("index")["hemisphere"]
    for number in range(persons):
        labels, name = head(number), f"sub-0{number}"
        found = np.zeros_like(labels)
        for index in np.unique(labels)[1:]:
            label = {"left": 1, "right": 2}[side[index]]
            found[labels == index] = label if label in names else 0
        path = site[1] / name / "anat" / f"{name}_space-T1w_seg-lab_dseg.nii.gz"
        save_nifti(path, found)
    return site


@pytest.fixture
def keeps(monkeypatch):
    """Every child is kept."""
    monkeypatch.setattr(work, "decide", lambda *_: Verdict(True, 1.0, 0.1, 0.0, "kept"))


def test_the_labels_of_a_models_own_protocol_are_read_by_it():
    names = {1: "left half", 2: "right half"}
    lab = own_protocol("lab", names, names)
    reading = read_as({1: 50, 2: 60}, names, "lab", lab)
    assert reading.target is lab and not reading.new_head
    assert not read_as({1: 50}, None, "lab", lab).new_head
    other = read_as({1: 50, 2: 60}, {1: "tumour", 2: "oedema"}, "lab", lab)
    assert other.new_head and other.target.name == "labsite"


@pytest.mark.usefixtures("keeps")
def test_a_model_with_a_protocol_of_its_own_is_adapted_again(tmp_path, base):  # noqa: F811
    site = write_own_site(tmp_path, {1: "left half", 2: "right half"})
    what = asked(*site, base, fine_tune=recipe(tmp_path, head="new", max_steps=10))
    assert fine_tune(what, answer, Told()) == 0
    what = asked(*site, base, base="lab", site="lab2", fine_tune=recipe(tmp_path, max_steps=10))
    assert fine_tune(what, answer, Told()) == 0
    (card,) = [c for c in load_cards((base,), what.out_dir) if c.name == "lab2"]
    assert card.heads == ("lab", "aseg") and card.parent == "lab"
    assert card.protocol_of("lab").table["name"].tolist() == [
        "Background",
        "left half",
        "right half",
    ]
