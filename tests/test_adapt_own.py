"""Labels in a protocol of the site's own: which sides they have, and models that answer in it."""

from __future__ import annotations

from dataclasses import replace
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
from tlseg_bids.adapt import material, work
from tlseg_bids.adapt.judge import Verdict
from tlseg_bids.adapt.reading import own_protocol, read_as
from tlseg_bids.adapt.site import fine_tune
from tlseg_bids.labels.protocol import known_protocols, load_protocol
from tlseg_bids.labels.sides import mirrored_name, side_of, unpaired
from tlseg_bids.train.draw import atlas
from tlseg_bids.zoo.card_file import read_card, write_card
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


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Left-Hippocampus", "Right-Hippocampus"), ("Hippocampus (left)", "Hippocampus (right)"),
        ("LeftAmygdala", "RightAmygdala"), ("hippocampus_L", "hippocampus_R"),
        ("L_Hippocampus", "R_Hippocampus"), ("lh-insula", "rh-insula"),
        ("ctx-LH-insula", "ctx-RH-insula"), ("insulaLH", "insulaRH"), ("LEFT_HIP", "right hip"),
        ("cortex, left, frontal", "cortex, right, frontal"), ("V1Left", "V1Right"),
        ("Left LOrG  lateral orbital gyrus", "Right LOrG  lateral orbital gyrus"),
    ],
)  # fmt: skip
def test_sides_are_read_from_names(left, right):
    assert (side_of(left), side_of(right)) == ("left", "right")
    protocol = own_protocol("lab", {1: left, 2: right, 3: "Brain stem"}, (1, 2, 3))
    assert protocol.mirror.tolist() == [0, 2, 1, 3]
    assert protocol.table["hemisphere"].tolist() == ["none", "left", "right", "none"]


@pytest.mark.parametrize(
    "name",
    ["Lingual", "Rostral", "LGN", "LHb", "PRh", "LOrG", "CA1L", "Upright", "bright spot", "L",
     "left", "Area_R_4", "Thalamus (L+R)", "left-right commissure", "Lhasa", "Area 4r"],
)  # fmt: skip
def test_other_names_have_no_side(name):
    assert side_of(name) == "none" and mirrored_name(name) == name


def test_the_names_of_known_protocols_say_their_sides():
    for name in known_protocols():
        table = load_protocol(name).table
        assert [side_of(text) for text in table["name"]] == table["hemisphere"].tolist()
        assert not unpaired(table)


def test_pairs_and_structures_without_a_partner_are_told():
    names = {1: "hippocampus_L", 2: "hippocampus_R", 3: "Cyst"}
    reading = read_as({1: 50, 2: 60, 3: 7}, names, "lab", PROTOCOL)
    assert "Pairs of left and right by the names: hippocampus_L and hippocampus_R." in reading.notes
    assert reading.mirrored
    reading = read_as({3: 7}, names, "lab", PROTOCOL)
    assert "The names tell no pairs of left and right." in reading.notes and reading.mirrored
    reading = read_as({1: 50, 3: 7}, names, "lab", PROTOCOL)
    assert not reading.mirrored
    said = "Of one side alone by the names: hippocampus_L; so no scan is shown in the mirror."
    assert said in reading.notes
    again = read_as({1: 50, 3: 7}, names, "lab", reading.target)
    assert not again.mirrored and said in again.notes
    twice = own_protocol("lab", {1: "L-hip", 2: "l hip", 3: "R-hip"}, (1, 2, 3))
    assert twice.mirror.tolist() == [0, 1, 3, 2] and unpaired(twice.table) == ("L-hip",)


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


@pytest.mark.usefixtures("keeps")
@pytest.mark.parametrize(
    ("names", "persons", "in_folds"),
    [
        ({1: "left half"}, 2, [False, False]),
        ({1: "left half"}, 1, [True, True]),
        ({1: "left half", 2: "right half"}, 2, [True, True]),
    ],
)
def test_a_structure_of_one_side_alone_is_never_shown_in_the_mirror(
    tmp_path, base, monkeypatch, names, persons, in_folds  # noqa: F811
):  # fmt: skip
    card = read_card(base / "atlas.toml")
    write_card(replace(card, strategy={**card.strategy, "mirror": True}), base / "atlas.toml")
    runs, atlases, plain, in_the_end = [], [], work.run, len(names) == 2

    def noted_run(tuning, *more):
        runs.append((tuning.draw.recipe.mirror, len(tuning.draw.samples["site"])))
        return plain(tuning, *more)

    def noted_atlas(samples, box, spacing_mm, mirror):
        found = atlas(samples, box, spacing_mm, mirror)
        atlases.append(found)
        return found

    monkeypatch.setattr(work, "run", noted_run)
    monkeypatch.setattr(material, "atlas", noted_atlas)
    what = asked(
        *write_own_site(tmp_path, names, persons), base,
        fine_tune=recipe(tmp_path, head="new", max_steps=10),
    )  # fmt: skip
    assert fine_tune(what, answer, Told()) == 0
    assert [mirror for mirror, _ in runs] == [*in_folds, in_the_end]
    assert runs[-1][1] == persons * (2 if in_the_end else 1)
    far_right = atlases[0][1, atlases[0].shape[1] // 2 + 2 :]
    assert float(far_right.max()) < 0.01
    (child,) = [c for c in load_cards((base,), what.out_dir) if c.name == "lab"]
    assert child.strategy["mirror"] is in_the_end
