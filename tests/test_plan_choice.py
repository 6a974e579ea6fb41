"""Which model labels which scan, as tables of scans and cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cards import evidence, small_card, write_model
from test_plan import VERSION, write_scan

from tlseg_bids.bids.scan import Age, Scan
from tlseg_bids.config import Config
from tlseg_bids.errors import ScanError, UsageError
from tlseg_bids.plan import choose, content_key, describe, make_plan
from tlseg_bids.plan.choice import usable_cards
from tlseg_bids.plan.pairs import by_visit, companions
from tlseg_bids.zoo.calibration import Calibration
from tlseg_bids.zoo.card import Domain
from tlseg_bids.zoo.evidence import compare, measured, skill
from tlseg_bids.zoo.registry import BUILTIN, find_card

NOT_KNOWN = "the age at the scan is not known, so no model for certain ages was taken"
ADULTS = {"suffixes": ["T1w"], "age_years": [19, 34], "structures": "14 sub-cortical"}
INFANTS = {"dataset": "infant", "n": 12, "age_years": [0, 1], "structures": "14 sub-cortical"}


def packaged(name, *rows, **changes):
    """A card as if it had come with the package."""
    path = BUILTIN / f"{name}.toml"
    return small_card(name, evidence=rows, **{"parent": "any", "path": path, **changes})


ANY = packaged(
    "any",
    evidence(mean=0.80, sd=0.015, **ADULTS),
    evidence(mean=0.77, sd=0.02, **INFANTS, suffixes=["T2w"]),
    evidence(mean=0.73, sd=0.04, **INFANTS, suffixes=["T1w"]),
    parent=None,
    domain=Domain(voxel_mm=(0.3, 5.0), agents=("gad",)),
)
ADULT = packaged(
    "adult-t1w",
    evidence(mean=0.86, sd=0.01, **ADULTS),
    domain=Domain(("T1w",), (15, 100), contrast_agent=False, voxel_mm=(0.5, 2)),
)
INFANT_T2 = packaged(
    "infant-t2w",
    evidence(mean=0.88, sd=0.02, **INFANTS, suffixes=["T2w"]),
    domain=Domain(("T2w",), (0, 2)),
)
INFANT_T1 = packaged(
    "infant-t1w",
    evidence(mean=0.70, sd=0.03, **INFANTS, suffixes=["T1w"]),
    domain=Domain(("T1w",), (0, 2)),
)
PAIR = packaged(
    "infant-t1t2",
    evidence(mean=0.91, sd=0.02, **INFANTS, suffixes=["T1w", "T2w"]),
    domain=Domain(("T1w", "T2w"), (0, 2)),
    channels=("T1w", "T2w"),
)
POST = packaged(
    "post-contrast", domain=Domain(("T1w",), (15, 100), contrast_agent=True, agents=("gad", "gd"))
)
CARDS = (ANY, ADULT, INFANT_T2, INFANT_T1, PAIR, POST)


def scan(suffix="T1w", years=None, **changes):
    age = Age(source="not given") if years is None else Age(years * 365.25, None, "--age")
    path = Path(f"/data/sub-01/anat/sub-01_{suffix}.nii.gz")
    return Scan(path, Path("/data"), {"sub": "01"}, suffix, age=age, **changes)


MEASURED = "measured better on such scans, Dice"
IN_DOMAIN = [
    # scan, what is beside it, model, reason, warnings
    (scan(years=30), (), "adult-t1w",
     f"{MEASURED} 0.860 ± 0.010 (n = 15, malc, 14 sub-cortical) against "
     "0.800 ± 0.015 (n = 15, malc, 14 sub-cortical) of 'any'", ()),
    (scan(years=70), (), "adult-t1w", MEASURED, ()),
    (scan("T2w", 30), (), "any", "the only model whose domain holds the scan", ()),
    (scan("T2w", 0.5), (), "infant-t2w", MEASURED, ()),
    (scan("T2w", 0.5), ("T1w",), "infant-t1t2", MEASURED, ()),
    (scan("T1w", 0.5), (), "any", "of 'infant-t1w'", ()),  # the child was measured to be worse
    (scan("T1w", 0.5), ("T2w",), "infant-t1t2", "of 'any'", ()),
    (scan("T1w", 1.9), ("FLAIR",), "any", MEASURED, ()),
    (scan("T1w", 8), ("T2w",), "any", "the only model whose domain holds the scan", ()),
    (scan("T1w"), ("T2w",), "any", NOT_KNOWN, ()),
    (scan("T2w"), ("T1w",), "any", NOT_KNOWN, ()),
    (replace(scan("T2w"), age=Age(pma_weeks=41, source="scans.tsv")),
     (), "infant-t2w", MEASURED, ()),
    (scan(years=40, contrast_agent="gadolinium"), (), "post-contrast",
     "narrower than that of 'any'; nothing was measured on such scans", ()),
    (scan(years=8, contrast_agent="gadolinium"), (), "any", "the only model", ()),
    (scan(years=300), ("T2w",), "any", NOT_KNOWN,
     ("the age is not believed and counts as unknown: --age says 300.0 years, more than 125",)),
]  # fmt: skip


@pytest.mark.parametrize(("it", "beside", "model", "reason", "warnings"), IN_DOMAIN)
def test_a_scan_in_some_domain(it, beside, model, reason, warnings):
    choice = choose(CARDS, it, (1, 1, 1), companions=beside)
    assert choice.card.name == model
    assert reason in choice.reason
    assert choice.warnings == warnings
    assert {other.model for other in choice.refused} == {c.name for c in CARDS} - {model}
    assert all(other.reason for other in choice.refused)
    assert choose(CARDS[::-1], it, (1, 1, 1), companions=beside).reason == choice.reason


OUT_OF_DOMAIN = [
    # scan, voxels, why the most robust model is not meant for it
    (scan("FLAIR", 30), (1, 1, 1), "is meant for T1w and T2w, this is a FLAIR"),
    (scan(years=30), (1, 1, 6), "is meant for voxels of 0.3 to 5 mm, these are 1 × 1 × 6 mm"),
    (scan("T2w", 30, contrast_agent="xenon"), (1, 1, 1),
     "is meant for the contrast agents gad…, this one is after xenon"),
]  # fmt: skip


@pytest.mark.parametrize(("it", "voxels", "why"), OUT_OF_DOMAIN)
def test_a_scan_in_no_domain_gets_the_most_robust_model_and_a_warning(it, voxels, why):
    domain = Domain(("T1w", "T2w"), voxel_mm=(0.3, 5.0), agents=("gad",))
    local = small_card("a-site", parent="any", domain=domain)
    choice = choose([local, *CARDS], it, voxels)
    assert choice.card.name == "any"
    assert choice.reason == "the most robust model, as the scan is in no model's domain"
    assert choice.warnings == (f"outside the domain of every model; model 'any' {why}",)


def test_an_unknown_age_never_leads_to_a_model_for_certain_ages():
    limited = [ADULT, INFANT_T1, INFANT_T2]
    choice = choose(limited, scan())
    assert choice.card.name == "adult-t1w"
    assert "the age at this scan is not known" in choice.warnings[0]
    choice = choose([*limited, ANY], scan())
    assert (choice.card.name, choice.warnings) == ("any", ())
    why = {other.model: other.reason for other in choice.refused}
    assert why["infant-t1w"] == (
        "meant for ages of 0 to 2 years, the age at this scan is not known"
    )


SITE = small_card("site", parent="adult-t1w", domain=Domain(("T1w",), (18, 60)))
WORSE = replace(SITE, name="worse", evidence=(evidence(mean=0.85, **ADULTS),))


@pytest.mark.parametrize(
    ("cards", "it", "model", "reason"),
    [
        ((ANY, ADULT, SITE), scan(years=30), "site", "adapted from 'adult-t1w' for such scans"),
        ((ANY, ADULT, SITE), scan(years=65), "adult-t1w", MEASURED),
        ((ANY, ADULT, SITE), scan("T2w", 30), "any", "the only model"),
        ((ANY, ADULT, SITE), scan(), "any", NOT_KNOWN),
        ((ANY, ADULT, WORSE), scan(years=30), "adult-t1w", MEASURED),
        ((WORSE, ANY), scan(years=30), "worse", "adapted from 'adult-t1w'"),
    ],
)
def test_an_adapted_model_comes_first_for_scans_of_its_domain_alone(cards, it, model, reason):
    choice = choose(cards, it)
    assert choice.card.name == model
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("pair", "model"),
    [({"parent_mean": 0.74}, "lab2"), ({"parent_mean": 0.79}, "lab"), ({}, "lab")],
)
def test_a_model_is_compared_with_its_parent_on_the_same_scans(pair, model):
    def row(**values):
        return (evidence(dataset="Site", n=4, sd=0.02, **values),)

    cards = [
        small_card("any", path=BUILTIN / "any.toml"),
        small_card("lab", parent="any", evidence=row(mean=0.83, parent_mean=0.7)),
        small_card("lab2", parent="lab", evidence=row(mean=0.78, **pair)),
    ]
    for order in (cards, cards[::-1]):
        choice = choose(order, scan())
        assert choice.card.name == model
    if model == "lab2":
        assert "adapted from 'lab' for such scans" in choice.reason


def test_few_scans_do_not_beat_many_and_one_scan_is_no_measurement():
    many = packaged("many", evidence(mean=0.85, sd=0.02, n=30))
    few = packaged("few", evidence(mean=0.87, sd=0.05, n=3))
    one = packaged("one", evidence(mean=0.99, sd=0.0, n=1))
    bare = packaged("bare", evidence(mean=0.99, sd=float("nan")), evidence(metric="hd95", mean=9))
    cards = [few, many, one, bare]
    choice = choose(cards, scan())
    assert choice.card.name == "many"
    why = {other.model: other.reason for other in choice.refused}
    assert why["few"].startswith("'many' is preferred: measured better on such scans, Dice 0.850")
    assert why["one"].endswith("(n = 30, malc), and 'one' is not")
    assert set(compare(cards, scan())) == {"few", "many"}
    low = measured(few)[0].low  # t of 2 degrees of freedom is 4.3027
    assert low == pytest.approx(0.87 - 4.3027 * 0.05 / 3**0.5, abs=1e-4)


def test_a_gain_over_the_parent_on_the_same_scans_counts_more_than_the_spread_over_scans():
    grown = packaged("grown", evidence(mean=0.83, sd=0.02, n=6), parent="any")
    better, worse = (
        packaged(name, evidence(mean=0.84, sd=0.05, n=3, parent_mean=parent), parent="grown")
        for name, parent in (("better", 0.832), ("worse", 0.86))
    )
    bare = packaged("bare", evidence(mean=0.84, sd=0.05, n=3), parent="grown")
    found = compare([bare, better, worse, grown], scan())
    assert found["better"].low == pytest.approx(found["grown"].low + 0.008)
    assert found["worse"].low == pytest.approx(found["grown"].low - 0.02)
    assert choose([better, grown], scan()).card.name == "better"
    assert choose([worse, grown], scan()).card.name == "grown"
    assert choose([bare, grown], scan()).card.name == "grown"
    circle = replace(grown, parent="better", evidence=better.evidence)
    assert set(compare([better, circle], scan())) == {"better", "grown"}, "no endless descent"


def test_rows_of_several_datasets_are_pooled_only_where_no_dataset_is_shared():
    first = packaged("first", evidence(dataset="a", mean=0.8), evidence(dataset="b", mean=0.9))
    second = packaged("second", evidence(dataset="b", mean=0.85))
    assert {name: one.mean for name, one in compare([first, second], scan()).items()} == {
        "first": 0.9, "second": 0.85,
    }  # fmt: skip
    third = packaged("third", evidence(dataset="c", mean=0.84))
    found = compare([first, third], scan())
    assert found["first"].mean == pytest.approx(0.85)
    assert found["first"].datasets == ("a", "b")
    assert found["first"].n == 30
    values = [0.8 - 0.05, 0.8 + 0.05, 0.9 - 0.05, 0.9 + 0.05]
    spread = sum((v - 0.85) ** 2 for v in values) / 4
    assert found["first"].sd == pytest.approx((30 * spread - 2 * 0.05**2) ** 0.5 / 29**0.5)
    other = packaged("other", evidence(dataset="b", mean=0.99, structures="cortex"))
    assert compare([second, other], scan()) == {}


def test_evidence_of_other_scans_does_not_count():
    row = evidence(skull_stripped=True, contrast_agent=False)
    card = packaged("x", row)
    assert measured(card, scan(skull_stripped=True))
    assert measured(card, scan())
    assert not measured(card, scan(skull_stripped=False))
    assert not measured(card, scan(contrast_agent="gadolinium"))


# --- licences ---------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSEG_CACHE", str(tmp_path / "cache"))
    return Config(tmp_path / "bids", tmp_path / "out", "participant", device="cpu")


def test_permissive_looks_at_the_data_and_at_the_parents_too(tmp_path, config):
    folder, row = tmp_path / "m", {"dataset": "malc", "licence": "CC BY-NC 3.0"}
    free = write_model(folder, "free", training={"data": [{"dataset": "l", "licence": "MIT"}]})
    tainted = write_model(folder, "tainted", training={"data": [row]})
    child = write_model(folder, "child", parent="tainted")
    it = write_scan(config.bids_dir)
    config = replace(config, licence="permissive")
    job = make_plan([it], (), [free, tainted, child], config, VERSION).jobs[0]
    assert job.card.name == "free"
    why = {other.model: other.reason for other in job.refused}
    bound = "the licence CC BY-NC 3.0 of the training data 'malc' is not permissive"
    assert why["tainted"] == f"{bound} (--licence permissive)"
    assert why["child"] == f"adapted from 'tainted': {bound} (--licence permissive)"
    with pytest.raises(UsageError, match=r"'child' may not be used.*adapted from 'tainted'"):
        make_plan([it], (), [free, tainted, child], replace(config, model="child"), VERSION)


# --- two channels -----------------------------------------------------------------------------


def test_the_scan_beside_is_of_the_same_visit_and_made_in_the_same_way():
    def one(suffix, **changes):
        entities = {"sub": "01", **changes.pop("entities", {})}
        return replace(scan(suffix, **changes), entities=entities)

    first = one("T1w", entities={"acq": "fast", "run": "2"})
    near = one("T2w", entities={"acq": "fast", "run": "2"})
    far = one("T2w", entities={"run": "1"})
    others = [
        first, far, near,
        one("T2w", entities={"ses": "2", "acq": "fast", "run": "2"}),
        one("T1w", entities={"run": "1"}),
    ]  # fmt: skip
    assert companions(first, by_visit(others)) == {"T2w": near}
    assert companions(near, by_visit(others[::-1])) == {"T1w": first}
    after = one("T2w", contrast_agent="gadolinium")
    brain = one("T2w", skull_stripped=True)
    head = replace(first, skull_stripped=False)
    assert companions(head, by_visit([head, after, brain])) == {}
    assert companions(first, by_visit([])) == {}


def test_the_plan_hands_the_other_channel_to_the_job(tmp_path, config):
    wide = write_model(tmp_path / "m", "wide")
    pair = write_model(tmp_path / "m", "pair", channels=("T1w", "T2w"), domain=Domain(), parent="x")
    lone = write_scan(config.bids_dir, {"sub": "01"})
    first = write_scan(config.bids_dir, {"sub": "02"})
    second = write_scan(config.bids_dir, {"sub": "02"}, "T2w", shape=(40, 41, 42))
    plan = make_plan([lone, first, second], (), [wide, pair], config, VERSION)
    found = [(job.card.name, job.companions) for job in plan.jobs]
    assert found == [("wide", ()), ("pair", (second,)), ("pair", (first,))]
    assert "\n  beside   sub-02/anat/sub-02_T2w.nii.gz\n" in describe(plan)
    refused = plan.jobs[0].refused[0]
    assert refused.reason == "it sees T1w and T2w together, there is no T2w beside this scan"
    key = content_key(first, pair, config, VERSION, (second,))
    assert plan.jobs[1].key == key != content_key(first, pair, config, VERSION)
    content = bytearray(second.path.read_bytes())
    content[-5] ^= 1
    second.path.write_bytes(content)
    assert content_key(first, pair, config, VERSION, (second,)) != key


def test_a_forced_model_without_its_channel_skips_the_scan_and_no_other(tmp_path, config):
    pair = write_model(tmp_path / "m", "pair", channels=("T1w", "T2w"))
    lone = write_scan(config.bids_dir, {"sub": "01"})
    both = [write_scan(config.bids_dir, {"sub": "02"}, suffix) for suffix in ("T1w", "T2w")]
    plan = make_plan([lone, *both], (), [pair], replace(config, model="pair"), VERSION)
    assert [job.scan.subject for job in plan.jobs] == ["02", "02"]
    assert plan.skips[0].reason == (
        "no model can label this scan – model 'pair': it sees T1w and T2w together, "
        "there is no T2w beside this scan"
    )
    assert "add the missing scan" in plan.skips[0].hint
    with pytest.raises(ScanError, match=r"model 'pair': it sees T1w and T2w.*this is a FLAIR"):
        choose([pair], scan("FLAIR"), companions=("T1w", "T2w"))


def test_a_forced_model_that_was_measured_to_be_bad_says_so():
    weak = small_card("weak", evidence=(evidence(mean=0.19), evidence(mean=0.43)))
    told = choose([weak, ANY], scan(), forced="weak").warnings
    assert told == (
        "model 'weak' reached a mean Dice of 0.43 where it was measured: do not rely on its labels",
    )
    assert choose([weak, ANY], scan(), forced="any").warnings == ()
    unknown = small_card("unknown")
    assert choose([unknown, ANY], scan(), forced="unknown").warnings == ()
    few, all_ = (evidence(mean=m, structures=s) for m, s in ((0.8, "14"), (0.6, "all")))
    assert skill(small_card("deep", evidence=(few, all_))) == pytest.approx(0.8)


def test_a_model_of_several_images_labels_no_template(tmp_path, config):
    pair = write_model(tmp_path / "m", "pair", channels=("T1w", "T2w"))
    both = [write_scan(config.bids_dir, {"sub": "02"}, suffix) for suffix in ("T1w", "T2w")]
    asked = replace(config, model="pair", output_spaces=("MNI152NLin6Asym",), dry_run=True)
    with pytest.raises(UsageError, match=r"'pair' wants T1w and T2w together, and a template is "):
        make_plan(both, (), [pair], asked, VERSION)
    placed = replace(pair, preprocess={"placed_by": "any"})
    plan = make_plan(both, (), [placed], asked, VERSION)
    assert {job.card.name for job in plan.jobs} == {"pair"}
    assert any(job.spaces for job in plan.jobs), "the other model shows where the template lies"


def test_a_study_is_labelled_in_one_protocol(tmp_path, config):
    cards = [
        write_model(tmp_path / "zoo", "any"),
        write_model(tmp_path / "zoo", "parcels", protocol="braincolor", heads=("braincolor",)),
    ]
    usable, refused = usable_cards(cards, config)
    assert [card.name for card in usable] == ["any"]
    assert [one.model for one in refused] == ["parcels"]
    assert "labels in the protocol 'braincolor', and 'aseg' is wanted" in refused[0].reason
    usable, _ = usable_cards(cards, replace(config, protocol="braincolor"))
    assert [card.name for card in usable] == ["parcels"]
    usable, _ = usable_cards(cards, replace(config, model="parcels"))
    assert [card.name for card in usable] == ["any", "parcels"]


def test_a_model_that_is_named_labels_in_the_protocol_of_any_of_its_heads(tmp_path, config):
    calibration = Calibration("made up", {"braincolor": 0.9}, {"CAU": 0.1})
    cards = [
        write_model(tmp_path / "zoo", "any"),
        write_model(
            tmp_path / "zoo", "parcels", protocol="braincolor", heads=("braincolor", "aseg"),
            evidence=(evidence(),), calibration=calibration,
        ),
    ]  # fmt: skip
    usable, refused = usable_cards(cards, config)
    assert [card.name for card in usable] == ["any"]
    assert refused[0].reason == (
        "it labels in the protocol 'braincolor', and in 'aseg' only with --model parcels "
        "--protocol aseg"
    )
    named = replace(config, model="parcels")
    for asked in (named, replace(named, protocol="braincolor")):
        assert find_card(usable_cards(cards, asked)[0], "parcels") == cards[1]
    usable, _ = usable_cards(cards, replace(named, protocol="aseg"))
    card = find_card(usable, "parcels")
    assert (card.protocol, card.heads) == ("aseg", ("braincolor", "aseg"))
    assert card.evidence == () and not card.calibration, "both are of the first head"
    with pytest.raises(UsageError, match="'parcels' labels in 'braincolor' and 'aseg'.*drop one"):
        usable_cards(cards, replace(named, protocol="infant"))
    adapting = replace(named, protocol="aseg", labels_dir=tmp_path)
    with pytest.raises(UsageError, match="'parcels' labels in 'braincolor' – .*drop one"):
        usable_cards(cards, adapting)


def test_a_site_model_labels_in_its_own_protocol(tmp_path, config):
    site = write_model(
        tmp_path / "zoo", "site", protocol="braincolor", heads=("braincolor",), parent="any"
    )
    other = write_model(tmp_path / "zoo", "other")
    cards = [site, other]
    usable, _ = usable_cards(cards, config)
    assert {card.name for card in usable} == {"site", "other"}
    usable, _ = usable_cards(cards, replace(config, protocol="aseg"))
    assert {card.name for card in usable} == {"other"}


def test_a_protocol_that_nobody_labels_in_is_told(tmp_path, config):
    cards = [write_model(tmp_path / "zoo", "other")]
    with pytest.raises(UsageError, match="no model labels in the protocol 'infant'.*label in aseg"):
        usable_cards(cards, replace(config, protocol="infant"))
    with pytest.raises(UsageError, match="'other' labels in 'aseg'.*drop one of the two"):
        usable_cards(cards, replace(config, protocol="infant", model="other"))
    with pytest.raises(UsageError, match="martian"):
        usable_cards(cards, replace(config, protocol="martian"))
