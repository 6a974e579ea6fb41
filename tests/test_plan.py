"""Which model labels which scan, where, and why; made without reading a voxel."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cards import evidence, small_card, write_model

from tlseg_bids.bids.scan import Age, Scan, Unusable
from tlseg_bids.config import Config
from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.plan import Machine, choose, choose_device, content_key, describe, make_plan
from tlseg_bids.zoo.card import Domain, Memory

ADULT = Age(days=30 * 365.25, source="participants.tsv")
NO_GPU = Machine()
VERSION = "1.2.3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path):
    return Config(tmp_path / "bids", tmp_path / "out", "participant", device="cpu")


def write_scan(root: Path, entities=None, suffix="T1w", shape=(48, 50, 52), **changes) -> Scan:
    """A NIfTI file of noise at 1 mm, as discovery would describe it."""
    entities = entities or {"sub": "01"}
    folder = root / f"sub-{entities['sub']}" / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    scan = Scan(folder / "x", root, entities, suffix, **{"age": ADULT, **changes})
    path = folder / f"{scan.stem}_{suffix}.nii.gz"
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.integers(0, 999, shape, np.int16), np.eye(4)), path)
    return replace(scan, path=path)


# --- choosing ---------------------------------------------------------------------------------


def test_the_only_model_is_taken(tmp_path):
    choice = choose([small_card("one")], write_scan(tmp_path))
    assert (choice.card.name, choice.refused, choice.warnings) == ("one", (), ())
    assert choice.reason == (
        "the only model whose domain holds the scan; nothing was measured on such scans"
    )


def test_the_narrower_domain_wins_and_the_others_say_why(tmp_path):
    cards = [
        small_card("wide"),
        small_card("adult", domain=Domain(age_years=(18, 90))),
        small_card("infant", domain=Domain(age_years=(0, 2))),
    ]
    choice = choose(cards, write_scan(tmp_path))
    assert choice.card.name == "adult"
    assert choice.reason == (
        "the scan is in its domain, which is narrower than that of 'wide'; "
        "nothing was measured on such scans"
    )
    why = {other.model: other.reason for other in choice.refused}
    assert why["wide"].startswith("'adult' is preferred: the scan is in its domain, which is narr")
    assert why["infant"] == "meant for ages of 0 to 2 years, this scan was taken at 30.0 years"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "verified", "evidence": (evidence(),)}, "verified, and 'base' is not"),
        ({"parent": "base"}, "adapted from 'base' for such scans"),
        ({"evidence": (evidence(),)}, "it was measured on such scans, and 'base' was not"),
    ],
)
def test_the_reason_names_the_advantage(tmp_path, changes, reason):
    choice = choose([small_card("base"), small_card("z", **changes)], write_scan(tmp_path))
    assert choice.card.name == "z"
    assert reason in choice.reason


def test_outside_every_domain_the_most_robust_model_is_taken_with_a_warning(tmp_path):
    cards = [
        small_card("narrow", domain=Domain(("T2w",), (0, 1))),
        small_card("wide", domain=Domain(("T2w",))),
    ]
    choice = choose(cards, write_scan(tmp_path))
    assert choice.card.name == "wide"
    assert choice.reason == "the most robust model, as the scan is in no model's domain"
    assert choice.warnings == (
        "outside the domain of every model; model 'wide' is meant for T2w, this is a T1w",
    )
    assert choice.refused[0].reason.startswith("meant for T2w, this is a T1w; meant for ages")


def test_a_forced_model_is_taken_and_warns_where_it_refuses(tmp_path):
    cards = [small_card("wide"), small_card("t2", domain=Domain(("T2w",)))]
    scan = write_scan(tmp_path)
    choice = choose(cards, scan, forced="t2")
    assert choice.card.name == "t2"
    assert choice.warnings == ("model 't2' was forced and is meant for T2w, this is a T1w",)
    assert choice.refused[0].reason == "--model t2 was given"
    willing = choose(cards, scan, forced="wide")
    assert willing.warnings == ()
    assert willing.reason == "asked for with --model; the scan is in its domain"


def test_the_voxel_size_is_asked(tmp_path, config):
    coarse = write_model(tmp_path / "m", "coarse", domain=Domain(voxel_mm=(2, 5)))
    wide = write_model(tmp_path / "m", "wide")
    job = make_plan([write_scan(config.bids_dir)], (), [coarse, wide], config, VERSION).jobs[0]
    assert job.card.name == "wide"
    assert "meant for voxels of 2 to 5 mm, these are 1 × 1 × 1 mm" in job.refused[0].reason


# --- cards that a run may not use -------------------------------------------------------------


def test_a_permissive_licence_can_be_asked_for(tmp_path, config):
    free = write_model(tmp_path / "m", "free")
    bound = write_model(tmp_path / "m", "bound", licence="CC-BY-NC-4.0", domain=Domain(("T1w",)))
    scan = write_scan(config.bids_dir)
    assert make_plan([scan], (), [free, bound], config, VERSION).jobs[0].card.name == "bound"
    config = replace(config, licence="permissive")
    job = make_plan([scan], (), [free, bound], config, VERSION).jobs[0]
    assert job.card.name == "free"
    assert "licence CC-BY-NC-4.0 is not permissive" in job.refused[0].reason
    with pytest.raises(UsageError, match=r"no model has a permissive licence – --licence permiss"):
        make_plan([scan], (), [bound], config, VERSION)
    with pytest.raises(UsageError, match=r"'bound' may not be used.*CC-BY-NC-4.0 is.*drop one"):
        make_plan([scan], (), [free, bound], replace(config, model="bound"), VERSION)


def test_a_model_without_weights_is_refused_before_any_scan(tmp_path, config):
    here, gone = write_model(tmp_path / "m", "here"), write_model(tmp_path / "m", "gone")
    (tmp_path / "m" / "gone.safetensors").unlink()
    scan = write_scan(config.bids_dir)
    job = make_plan([scan], (), [here, gone], config, VERSION).jobs[0]
    assert job.refused[0].reason == "its weights file gone.safetensors is missing"
    with pytest.raises(DataError, match=r"model 'gone' cannot be used: gone: its weights file"):
        make_plan([scan], (), [here, gone], replace(config, model="gone"), VERSION)
    with pytest.raises(DataError, match=r"no model can be used: gone: .* – fetch weights with"):
        make_plan([scan], (), [gone], config, VERSION)
    with pytest.raises(DataError, match=r"no model can be used: there is none – .*cards – fetch"):
        make_plan([scan], (), [], config, VERSION)
    with pytest.raises(UsageError, match=r"no model is called 'x' – --model – known are: gone, he"):
        make_plan([scan], (), [here, gone], replace(config, model="x"), VERSION)


def test_offline_refuses_what_would_have_to_be_fetched(tmp_path, config):
    here, far = write_model(tmp_path / "m", "here"), write_model(tmp_path / "m", "far")
    weights = replace(far.weights, file=None, url="https://example.org/far.safetensors")
    far = replace(far, weights=weights, domain=Domain(("T1w",)))
    scan = write_scan(config.bids_dir)
    assert make_plan([scan], (), [here, far], config, VERSION).jobs[0].card.name == "far"
    job = make_plan([scan], (), [here, far], replace(config, offline=True), VERSION).jobs[0]
    assert job.card.name == "here"
    assert "--offline was given" in job.refused[0].reason


# --- the plan ---------------------------------------------------------------------------------


@pytest.fixture
def card(tmp_path):
    return write_model(tmp_path / "models", memory=Memory(1.0, 2.0**20, 2.0))


def test_voxels_are_never_read(config, card, monkeypatch):
    scan = write_scan(config.bids_dir)
    monkeypatch.setattr(nib.arrayproxy.ArrayProxy, "_get_scaled", lambda *_: pytest.fail("read"))
    assert len(make_plan([scan], (), [card], config, VERSION).jobs) == 1


def test_unusable_and_damaged_scans_are_skipped_with_reason_and_hint(config, card):
    good = write_scan(config.bids_dir)
    damaged = write_scan(config.bids_dir, {"sub": "02"})
    damaged.path.write_bytes(damaged.path.read_bytes()[:20])
    dangling = write_scan(config.bids_dir, {"sub": "03"})
    dangling.path.unlink()
    dangling.path.symlink_to("/nowhere/at/all")
    flat = write_scan(config.bids_dir, {"sub": "04"}, shape=(48, 50, 1))
    series = write_scan(config.bids_dir, {"sub": "05"}, shape=(48, 50, 52, 2))
    named = Unusable(write_scan(config.bids_dir, {"sub": "06"}), "the name is odd", "rename it")
    scans = [good, damaged, dangling, flat, series]
    plan = make_plan(scans, [named], [card], config, VERSION)
    assert [job.scan.subject for job in plan.jobs] == ["01"]
    reasons = {skip.scan.subject: skip.reason for skip in plan.skips}
    assert "cannot be read as NIfTI" in reasons["02"]
    assert "a link whose content is not here" in reasons["03"]
    assert "only 1 slice " in reasons["04"]
    assert "4 dimensions" in reasons["05"]
    assert reasons["06"] == "the name is odd"
    assert all(skip.hint and not skip.wanted for skip in plan.skips)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_skipped(config, card):
    scan = write_scan(config.bids_dir)
    scan.path.chmod(0)
    plan = make_plan([scan], (), [card], config, VERSION)
    assert "cannot be read" in plan.skips[0].reason


def test_a_file_that_breaks_off_on_disk_is_skipped(config, card, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tlseg_bids.plan.make.content_key", broken)
    plan = make_plan([write_scan(config.bids_dir)], (), [card], config, VERSION)
    assert plan.jobs == ()
    assert plan.skips[0].reason == "the file cannot be read to its end (Input/output error)"
    assert "copy it again" in plan.skips[0].hint


def test_a_missing_age_and_a_doubtful_affine_are_warnings(config, card):
    age = Age(source="participants.tsv says '89+', which is a bound and no age")
    scan = write_scan(config.bids_dir, age=age)
    image = nib.load(scan.path)
    image.header.set_sform(np.diag([1, 1, 1.2, 1]), 1)
    image.header.set_qform(np.eye(4), 1)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), scan.path)
    warnings = make_plan([scan], (), [card], config, VERSION).jobs[0].warnings
    assert any("the sform was used" in warning for warning in warnings)
    assert f"the age at the scan is not known ({age.source})" in warnings
    born = replace(scan, age=Age(pma_weeks=40, source="scans.tsv"))
    assert not any(
        "age" in w for w in make_plan([born], (), [card], config, VERSION).jobs[0].warnings
    )


def test_memory_is_estimated_from_the_header_and_compared_with_the_limit(config, card):
    scan = write_scan(config.bids_dir, shape=(64, 64, 64))
    job = make_plan([scan], (), [card], config, VERSION).jobs[0]
    assert job.memory_gib == pytest.approx(1 + 64**3 / 1024)
    assert job.warnings == ()
    job = make_plan([scan], (), [card], replace(config, memory_gib=100.0), VERSION).jobs[0]
    assert job.warnings == (
        "about 257.0 GiB of memory are expected and --mem allows 100.0 GiB; "
        "the scan is tried alone",
    )


def test_first_run_takes_the_first_that_can_be_read(config, card):
    runs = [write_scan(config.bids_dir, {"sub": "01", "run": run}) for run in ("10", "2", "1")]
    other = write_scan(config.bids_dir, {"sub": "01", "run": "3"}, suffix="T2w")
    accelerated = write_scan(config.bids_dir, {"sub": "01", "acq": "fast", "run": "2"})
    runs[2].path.write_bytes(b"damaged")
    config = replace(config, multi_run="first")
    plan = make_plan([*runs, other, accelerated], (), [card], config, VERSION)
    assert [job.scan for job in plan.jobs] == [runs[1], other, accelerated]
    wanted = [skip for skip in plan.skips if skip.wanted]
    assert [skip.scan for skip in wanted] == [runs[0]]
    assert wanted[0].reason == "--multi-run first: sub-01_run-2_T1w.nii.gz was taken"
    every = make_plan(runs[:2], (), [card], replace(config, multi_run="each"), VERSION)
    assert len(every.jobs) == 2


def test_the_content_key_follows_what_goes_into_the_derivatives(config, card):
    scan = write_scan(config.bids_dir)
    key = content_key(scan, card, config, VERSION)
    os.utime(scan.path, (1, 1))
    same = replace(config, nprocs=8, device="cuda", verbosity=2, out_dir=Path("/elsewhere"))
    assert content_key(scan, card, same, VERSION) == key
    other = replace(card, weights=replace(card.weights, sha256="1" * 64))
    different = [
        content_key(scan, card, config, "1.2.4"),
        content_key(scan, replace(card, version="2"), config, VERSION),
        content_key(scan, other, config, VERSION),
        content_key(replace(scan, sidecar={"Manufacturer": "x"}), card, config, VERSION),
        content_key(replace(scan, age=Age(days=1)), card, config, VERSION),
        content_key(replace(scan, contrast_agent="gadolinium"), card, config, VERSION),
        content_key(scan, card, replace(config, probabilities=True), VERSION),
        content_key(scan, replace(card, preprocess={"placed_by": "any"}), config, VERSION),
    ]  # fmt: skip
    content = bytearray(scan.path.read_bytes())
    content[-5] ^= 1
    scan.path.write_bytes(content)
    different.append(content_key(scan, card, config, VERSION))
    assert len({key, *different}) == len(different) + 1


def test_a_dry_run_reads_headers_alone(config, card, monkeypatch):
    scan = write_scan(config.bids_dir)
    assert len(make_plan([scan], (), [card], config, VERSION).jobs[0].key) == 64
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("the file was read"))
    dry = make_plan([scan], (), [card], replace(config, dry_run=True), VERSION)
    assert dry.jobs[0].key == ""


def test_the_plan_can_be_read(config, card):
    hostile = write_scan(config.bids_dir, {"sub": "02"})
    hostile = replace(hostile, path=hostile.path.with_name("x\x1b[31m\n_T1w.nii.gz"))
    plan = make_plan([write_scan(config.bids_dir), hostile], (), [card], config, VERSION)
    text = describe(plan)
    assert "sub-01/anat/sub-01_T1w.nii.gz\n  model    small 1.0: the only model" in text
    assert "  device   cpu, about" in text
    assert "x\\x1b[31m" in text
    assert "\x1b" not in text
    assert text.endswith("1 to label, 1 that cannot be used, 0 left out as asked\n")


# --- the device -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "machine", "device", "warning"),
    [
        ("auto", Machine(), "cpu", None),
        ("auto", Machine((3.0, 9.0)), "cuda:1", None),
        ("auto", Machine((3.0, 1.0)), "cpu", "cuda:0, has 3.0 GiB free and the model wants 4.0"),
        ("auto", Machine((), mps=True), "mps", None),
        ("cpu", Machine((9.0,), mps=True), "cpu", None),
        ("mps", Machine((9.0,), mps=True), "mps", None),
        ("cuda", Machine((3.0, 9.0)), "cuda:1", None),
        ("cuda:0", Machine((3.0, 9.0)), "cuda:0", "it was asked for, so it is tried"),
    ],
)
def test_the_device(wanted, machine, device, warning):
    found, warnings = choose_device(wanted, 4.0, machine)
    assert found == device
    assert (warning is None and not warnings) or warning in warnings[0]


@pytest.mark.parametrize(
    ("wanted", "machine", "message"),
    [
        ("cuda", Machine(), "this PyTorch was built without CUDA – --device cuda – use"),
        ("cuda", Machine(cuda_built=True), "PyTorch sees no CUDA device (a driver, or a container"),
        ("cuda:3", Machine((1.0, 2.0)), "cuda:3 is not there: the last CUDA device is cuda:1"),
        ("mps", Machine((9.0,)), "this machine has no Metal device"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused(wanted, machine, message):
    with pytest.raises(UsageError) as caught:
        choose_device(wanted, 4.0, machine)
    assert message in str(caught.value)


def test_an_absent_device_stops_the_run_even_without_a_readable_scan(config, card):
    with pytest.raises(UsageError, match="the device cuda is not there"):
        make_plan((), (), [card], replace(config, device="cuda"), VERSION, Machine())


def test_each_job_asks_for_its_own_card(config, card):
    scan = write_scan(config.bids_dir)
    auto = replace(config, device="auto")
    assert make_plan([scan], (), [card], auto, VERSION, Machine((2.0,))).jobs[0].device == "cuda:0"
    job = make_plan([scan], (), [card], auto, VERSION, Machine((1.9,))).jobs[0]
    assert job.device == "cpu"
    assert "run on the CPU" in job.warnings[0]


def test_this_machine_can_be_asked():
    machine = Machine.here()
    assert all(free >= 0 for free in machine.cuda_free_gib)
    assert choose_device("auto", 0.0, machine)[0] in ("cpu", "mps") or machine.cuda_free_gib
