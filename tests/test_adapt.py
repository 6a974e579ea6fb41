"""Site adaptation from end to end on tiny heads, with a base model that knows only an atlas."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import pretended
from tests.cards import small_card
from tests.datasets import config, make_dataset
from tlseg_bids.adapt import inspect as adapt_inspect
from tlseg_bids.adapt import material, page, work
from tlseg_bids.adapt.judge import Verdict, decide, folds, half, program_labels
from tlseg_bids.adapt.reading import IGNORE
from tlseg_bids.adapt.record import asked_as_child, domain_of, joined_licence
from tlseg_bids.adapt.site import collect, fine_tune, match
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.scan import Age, Scan
from tlseg_bids.cli.progress import Progress
from tlseg_bids.errors import DataError, NoInputError, ScanError, UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import build
from tlseg_bids.plan import make
from tlseg_bids.postprocess import to_native
from tlseg_bids.preprocess.prepare import prepare
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import load_model
from tlseg_bids.train import finetune_run
from tlseg_bids.train.dataset import Sample, label_centroids, load_classes
from tlseg_bids.train.draw import atlas
from tlseg_bids.volume import Grid, Volume, load_volume
from tlseg_bids.zoo.card import Domain
from tlseg_bids.zoo.card_file import write_card
from tlseg_bids.zoo.licence import is_permissive
from tlseg_bids.zoo.proof import check_proof
from tlseg_bids.zoo.registry import load_cards
from tlseg_bids.zoo.weights import describe, load_weights

PROTOCOL = load_protocol("aseg")
SIDE, SPACING = 40, 2.0
NETWORK = {"network": "unet", "features": [8, 16], "stem": 2, "prior_channels": 33, "detail": 8}
SETTLER = {"network": "unet", "features": [2, 4], "prior_channels": 33}
SHOWN = ("cerebral white matter", "thalamus", "putamen", "caudate", "lateral ventricle")


def head(seed: int = 0, shift_mm: float = 0.0, flip: bool = False) -> np.ndarray:
    """A label map of balls: five structures a side, the right ones a little smaller."""
    labels = np.zeros((SIDE,) * 3, np.int16)
    grid = np.stack(np.meshgrid(*[(np.arange(SIDE) - (SIDE - 1) / 2) * SPACING] * 3,
                                indexing="ij"), -1)  # fmt: skip
    rng = np.random.default_rng(seed)
    names = PROTOCOL.table["name"].str.lower()
    places = np.random.default_rng(7).uniform(-16, 16, (len(SHOWN), 2))
    for number, name in enumerate(SHOWN):
        for side, sign in (("left", -1), ("right", 1)):
            index = int(PROTOCOL.table["index"][names == f"{side} {name}"].iloc[0])
            centre = np.array([sign * 17, *places[number]]) + rng.normal(0, 1, 3)
            centre[1] += shift_mm
            radius = (17, 10, 9, 8, 7)[number] * (1.0 if sign < 0 else 0.9)
            labels[np.linalg.norm(grid - centre, axis=-1) < radius] = index
    return labels[::-1] if flip else labels


def affine() -> np.ndarray:
    matrix = np.diag([SPACING] * 3 + [1.0])
    matrix[:3, 3] = -(SIDE - 1) / 2 * SPACING
    return matrix


def paint(labels: np.ndarray, seed: int) -> np.ndarray:
    """An image in which every pair of structures has its own brightness."""
    rng = np.random.default_rng(seed)
    mirrored = {int(i): min(int(i), int(m)) for i, m in zip(
        PROTOCOL.table["index"], PROTOCOL.table["mirror"], strict=True)}  # fmt: skip
    values = {low: 100 + 90 * n for n, low in enumerate(sorted(set(mirrored.values()) - {0}))}
    image = np.zeros(labels.shape, np.float32)
    for index in np.unique(labels):
        image[labels == index] = 0 if index == 0 else values[mirrored[int(index)]]
    return image + rng.normal(0, 6, labels.shape).astype(np.float32) + 20


def save_nifti(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine())
    image.set_sform(affine(), 1)
    nib.save(image, path)


def write_site(root: Path, labels: dict[str, np.ndarray], rows: str | None = None) -> tuple:
    """A dataset of T1w scans of `head`s, and a derivative with the given labels."""
    bids, derivative = root / "bids", root / "labels"
    make_dataset(bids, ())
    for number in range(3):
        name = f"sub-0{number}"
        save_nifti(bids / name / "anat" / f"{name}_T1w.nii.gz", paint(head(number), number))
    (derivative).mkdir()
    (derivative / "dataset_description.json").write_text(
        json.dumps({"Name": "by hand", "BIDSVersion": "1.10.0", "License": "CC0-1.0"})
    )
    table = PROTOCOL.table[["index", "name"]].to_csv(sep="\t", index=False)
    (derivative / "seg-aseg_dseg.tsv").write_text(rows or table)
    for name, data in labels.items():
        save_nifti(derivative / name / "anat" / f"{name}_space-T1w_seg-aseg_dseg.nii.gz", data)
    return bids, derivative


def classes_of(labels: np.ndarray) -> torch.Tensor:
    number = {int(i): n for n, i in enumerate(load_classes(PROTOCOL).index)}
    table = np.zeros(256, np.uint8)
    for index in PROTOCOL.indices:
        table[index] = number[int(index)]
    return torch.from_numpy(table[labels])


def tiny_maps(_template: np.ndarray) -> list[Sample]:
    """Rehearsal heads small enough for a test."""
    return [
        Sample(f"map-{n}", "rehearsal", classes_of(head(20 + n)), {}, affine(),
               np.arange(len(PROTOCOL)), "0" * 64, PROTOCOL, affine())
        for n in range(2)
    ]  # fmt: skip


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with the model ``atlas``: an untrained network and a blurred atlas."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    channel = {int(i): c for c, i in enumerate(PROTOCOL.indices)}
    shares = np.zeros((len(PROTOCOL), SIDE, SIDE, SIDE), np.float32)
    for seed in range(30, 36):
        labels = head(seed, shift_mm=4.0)
        for index in np.unique(labels):
            shares[channel[int(index)]] += (labels == index) / 6
    prior = torch.nn.functional.avg_pool3d(torch.from_numpy(shares)[None], 2)[0]
    template = torch.full((len(PROTOCOL), 3), torch.nan)
    torch.manual_seed(0)
    network = build(**NETWORK, out_channels=[len(PROTOCOL)])
    tensors = {f"segmenter.{key}": value for key, value in network.state_dict().items()}
    settler = build(**SETTLER, out_channels=[len(PROTOCOL)]).state_dict()
    tensors |= {f"settler.{key}": value for key, value in settler.items()}
    file, path = folder / "atlas.safetensors", folder / "atlas.toml"
    prior = (prior * 255).round().to(torch.uint8)
    save_file({**tensors, "template": template, "prior.aseg": prior}, file)
    write_card(small_card(
        "atlas", networks={"segmenter": NETWORK, "settler": SETTLER},
        strategy={"name": "sliding", "window": 40},
        preprocess={"box_mm": [[-40.0, 40.0]] * 3, "spacing_mm": 2.0, "rounds": 1,
                    "settler": {"spacing_mm": 4.0}},
        weights=describe(file, "MIT", path),
    ), path)  # fmt: skip
    monkeypatch.setattr(material, "rehearsal_samples", tiny_maps)
    return folder


def answer(job, model):
    """Label a scan whose template frame is its own."""
    volume = load_volume(job.scan.path)
    prepared = prepare(volume, job.card.preprocess, np.eye(4))
    return prepared, to_native(segment(model, prepared, Ask()), volume, model.protocol)


def recipe(folder: Path, **values) -> str:
    lines = {"summary": "for a test", "learning_rate": 0.02, "max_steps": 25, "rehearsal": 0.2,
             "distillation": 0.1, "shares": [1.0], "painted": 0.0, "warmup": 2, "ema": 0.5,
             **values}  # fmt: skip
    path = folder / "recipe.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
    return str(path)


class Told(Progress):
    """Keeps what it is told; may stop the run."""

    def __init__(self, stop_at: str = "") -> None:
        self.lines, self.stop_at = [], stop_at

    def step(self, scan, name, number, of):  # noqa: ARG002
        self.lines.append(name)
        if self.stop_at and self.stop_at in name and number % 25 == 12:
            raise KeyboardInterrupt

    def finish(self, scan, status, note=""):
        self.lines.append(f"{scan} {status} {note}")


def asked(bids: Path, derivative: Path, models: Path, **options):
    options = {"budget_minutes": 5.0, "base": "atlas", "site": "lab", "device": "cpu", **options}
    if "fine_tune" not in options:
        options["fine_tune"] = recipe(bids.parent)
    return config(bids, labels_dir=derivative, model_dirs=(models,), **options)


@pytest.fixture
def site(tmp_path):
    return write_site(tmp_path, {f"sub-0{n}": head(n) for n in range(2)})


def test_a_model_is_adapted_kept_and_taken_by_the_next_run(site, base, capsys):
    what = asked(*site, base)
    assert fine_tune(what, answer, Told()) == 0
    folder = what.out_dir / "models" / "lab"
    record = json.loads((folder / "adaptation.json").read_text())
    assert record["Kept"], record["Reason"]
    assert record["Gain"] > 0.02
    assert record["Unlabelled"] == ["sub-02_T1w"]
    assert len(record["HeldOut"]) == 2
    assert "The adapted model is kept" in capsys.readouterr().out
    page = (folder / "adaptation.html").read_text()
    assert "Adapted, this part not seen" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "curves.tsv").read_text().startswith("run\tstep\tseconds\tloss\tsoft_dice\n")

    cards = {card.name: card for card in load_cards((base,), what.out_dir)}
    card = cards["lab"]
    assert card.parent == "atlas"
    assert card.domain.suffixes == ("T1w",)
    assert card.weights.licence == "MIT AND CC0-1.0 AND not stated: for use at the site"
    assert not card.weights.permissive
    assert set(card.training["data"][-1]["subjects"]) == {"sub-00_T1w", "sub-01_T1w"}
    assert card.evidence[0]["mean"] > 0.02
    after = [one["DiceAfter"] for one in record["HeldOut"]]
    assert card.evidence[0]["sd"] == pytest.approx(np.std(after, ddof=1))
    before = np.mean([one["DiceBefore"] for one in record["HeldOut"]])
    assert card.evidence[0]["parent_mean"] == pytest.approx(before)
    parent, child = load_weights(cards["atlas"]), load_weights(card)
    own = [key for key in parent if key.startswith(("settler.", "template", "prior."))]
    assert "settler" in card.networks and len(own) > 10
    assert all(torch.equal(parent[key].nan_to_num(), child[key].nan_to_num()) for key in own)
    rows = card.training["segmenter"]["per_structure"]
    assert {"name", "before", "after", "n"} == set(rows[0])

    again = Told()
    before = (folder / "lab.safetensors").stat().st_mtime_ns
    assert fine_tune(what, answer, again) == 0
    assert again.lines == []
    assert (folder / "lab.safetensors").stat().st_mtime_ns == before


@pytest.mark.gpu
@pytest.mark.parametrize("persons", [1, 2])
def test_a_model_is_adapted_on_a_gpu(tmp_path, base, persons):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    what = asked(*write_site(tmp_path, {f"sub-0{n}": head(n) for n in range(persons)}), base,
                 device="cuda")  # fmt: skip
    assert fine_tune(what, answer, Told()) == 0
    record = json.loads((what.out_dir / "models" / "lab" / "adaptation.json").read_text())
    assert record["Gain"] > 0.02, record["Reason"]


@pytest.mark.slow
def test_a_model_is_adapted_on_a_device_that_is_not_there(site, base, monkeypatch):
    """Nothing is mixed with the processor's tensors, and a GPU has a kernel for all of it."""
    what = asked(*site, base)
    monkeypatch.setattr(make, "choose_device", lambda *_: (str(pretended.DEVICE), ()))
    with pretended.device(monkeypatch) as counted:
        assert fine_tune(what, answer, Told()) == 0
    record = json.loads((what.out_dir / "models" / "lab" / "adaptation.json").read_text())
    assert record["Kept"] and record["Gain"] > 0.02, record["Reason"]
    assert counted.asked.total() > 10_000
    assert not pretended.without_kernel(counted.asked, "CUDA")


def test_one_person_is_divided_in_halves_and_a_killed_run_goes_on(tmp_path, base):
    site = write_site(tmp_path, {"sub-00": head(0)})
    what = asked(*site, base)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(what, answer, Told(stop_at="fold 2"))
    folder = what.out_dir / "models"
    assert not (folder / "lab" / "adaptation.json").exists()
    (kept,) = (folder / ".work").iterdir()
    assert {"course.json", "sub-00_T1w.npz", "fold-left.pt"} <= {p.name for p in kept.iterdir()}
    cut = finetune_run.load_checkpoint(kept / "fold-left.pt")
    finetune_run.save_checkpoint({**cut, "seconds": 5000.0}, kept / "fold-left.pt")
    told = Told()
    assert fine_tune(what, answer, told) == 0
    assert not any("fold 1" in line for line in told.lines)
    record = json.loads((folder / "lab" / "adaptation.json").read_text())
    assert record["Seconds"] > 5000, "training before the interruption counts"
    assert [one["Part"] for one in record["HeldOut"]] == ["sub-00_T1w left", "sub-00_T1w right"]
    assert not kept.exists()


def test_a_resumed_run_ends_where_an_uncut_one_does(tmp_path, base, monkeypatch):
    monkeypatch.setattr(finetune_run, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("tlseg_bids.adapt.choose.SLOWER", 1e6)  # however busy the machine is
    states = []
    for name, stop in (("a", ""), ("b", "final")):
        site = write_site(tmp_path / name, {"sub-00": head(0)})
        what = asked(*site, base, budget_minutes=600.0)  # so that no clock decides the steps
        if stop:
            with pytest.raises(KeyboardInterrupt):
                fine_tune(what, answer, Told(stop_at=stop))
            (kept,) = (what.out_dir / "models" / ".work").iterdir()
            cut = finetune_run.load_checkpoint(kept / "final.pt")
            assert 0 < cut["step"] < 25
        fine_tune(what, answer, Told())
        states.append(load_file(what.out_dir / "models" / "lab" / "lab.safetensors"))
    for key, value in states[0].items():
        torch.testing.assert_close(
            value.float(), states[1][key].float(), atol=2e-3, rtol=2e-3, equal_nan=True
        )


def test_the_base_stays_where_the_child_is_not_better(site, base):
    what = asked(*site, base, fine_tune=recipe(site[0].parent, learning_rate=1e-12, max_steps=10))
    assert fine_tune(what, answer, Told()) == 0
    folder = what.out_dir / "models" / "lab"
    record = json.loads((folder / "adaptation.json").read_text())
    assert not record["Kept"]
    assert record["Reason"].startswith("The base stays")
    assert not (folder / "card.toml").exists()
    assert "base stays" in (folder / "adaptation.html").read_text()
    assert "lab" not in {card.name for card in load_cards((base,), what.out_dir)}


def test_the_figures_of_a_child_that_is_not_kept_are_of_the_share_that_was_judged(
    site, base, monkeypatch
):
    def judged_near_the_parent(before, after, _rehearsal):
        gain = float(np.mean(np.subtract(after[0.1], before)))
        return Verdict(False, 0.0, gain, 0.0, "The base stays.", 0.1)

    monkeypatch.setattr(work, "decide", judged_near_the_parent)
    how = recipe(site[0].parent, shares=[0.1, 1.0], max_steps=10)
    what = asked(*site, base, fine_tune=how)
    assert fine_tune(what, answer, Told()) == 0
    folder = what.out_dir / "models" / "lab"
    record = json.loads((folder / "adaptation.json").read_text())
    gains = [one["DiceAfter"] - one["DiceBefore"] for one in record["HeldOut"]]
    assert np.mean(gains) == pytest.approx(record["Gain"])
    assert record["Share"] == 0 and record["JudgedShare"] == 0.1
    assert "<dd>0.1, judged and not kept</dd>" in (folder / "adaptation.html").read_text()


def test_a_final_run_on_a_slow_machine_is_as_long_as_what_was_judged(site, base, monkeypatch):
    def slow_at_last(tuning, checkpoint, report, _limit_s, *least):
        limit_s = 1e-4 if checkpoint.stem == "final" else 1e6
        return finetune_run.run(tuning, checkpoint, report, limit_s, *least)

    monkeypatch.setattr(work, "run", slow_at_last)
    what = asked(*site, base, fine_tune=recipe(site[0].parent, max_steps=10))
    fine_tune(what, answer, Told())
    rows = (what.out_dir / "models/lab/curves.tsv").read_text().splitlines()[1:]
    steps = {row.split("\t")[0]: int(row.split("\t")[1]) for row in rows}
    assert list(steps.values()) == [10, 10, 8]
    sentence = (
        "The machine became slower, so runs ended before their 10 steps: those of the folds after "
        "10, 10, the final one after 8."
    )
    record = json.loads((what.out_dir / "models/lab/adaptation.json").read_text())
    assert record["Reasons"][-1] == sentence and record["Steps"] == 8
    page = (what.out_dir / "models/lab/adaptation.html").read_text()
    assert sentence in page and "<dt>Steps of the final run</dt><dd>8</dd>" in page


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (head(1, flip=True), "left and right are swapped"),
        (np.roll(head(1), 10, 1), "the labels are shifted against the scan by about"),
    ],
)
def test_wrong_labels_are_refused_with_a_reason_and_the_others_go_on(
    tmp_path, base, wrong, sentence, caplog
):
    site = write_site(tmp_path, {"sub-00": head(0), "sub-01": wrong})
    what = asked(*site, base, fine_tune=recipe(tmp_path, max_steps=10))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(what, answer, Told(stop_at="fold 2"))
    assert f"sub-01_T1w is left out: {sentence}" in caplog.text, "before anything is trained"
    assert fine_tune(what, answer, Told()) == 1
    record = json.loads((what.out_dir / "models/lab/adaptation.json").read_text())
    assert [one["Name"] for one in record["Refused"]] == ["sub-01_T1w"]
    assert sentence in record["Refused"][0]["What"]
    assert [one["Scan"] for one in record["Scans"]] == ["sub-00_T1w"]


def test_what_cannot_be_used_is_told_before_anything_is_trained(site, base, caplog):
    file = site[1] / "sub-00/anat/sub-00_space-T1w_seg-aseg_dseg.nii.gz"
    save_nifti(file, head(0)[:-1])
    with pytest.raises(KeyboardInterrupt):
        fine_tune(asked(*site, base), answer, Told(stop_at="fold 1"))
    assert "sub-00_T1w: the labels" in caplog.text and "on another grid" in caplog.text
    assert "without labels, and skipped: sub-02_T1w" in caplog.text


def test_if_all_labels_are_wrong_nothing_is_learned(tmp_path, base):
    site = write_site(tmp_path, {"sub-00": np.roll(head(0), 10, 1)})
    with pytest.raises(DataError, match=r"no labelled scan can be used; sub-00_T1w.*shifted"):
        fine_tune(asked(*site, base), answer, Told())


def test_a_budget_that_is_too_short_says_what_is_needed(site, base):
    with pytest.raises(UsageError, match=r"0.5 minutes are too few.*--budget.*give \d+ or more"):
        fine_tune(
            asked(*site, base, budget_minutes=0.5, fine_tune=recipe(site[0].parent)),
            lambda job, model: (_sleep(31), answer(job, model))[1], Told(),
        )  # fmt: skip


def _sleep(seconds: float) -> None:
    """Let time pass for the clock of the adaptation alone."""
    begun = work.time.monotonic
    work.time = type("Clock", (), {"monotonic": staticmethod(lambda: begun() + seconds)})


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(work, "time", work.time)


def test_a_model_cannot_adapt_itself_or_an_unknown_one(site, base):
    with pytest.raises(UsageError, match="no model is called 'nobody' – --base"):
        fine_tune(asked(*site, base, base="nobody"), answer, Told())
    with pytest.raises(UsageError, match="'atlas' is there already – --name"):
        fine_tune(asked(*site, base, site="atlas"), answer, Told())
    with pytest.raises(NoInputError, match="no recipe 'nonsense'"):
        fine_tune(asked(*site, base, fine_tune="nonsense"), answer, Told())


def test_dry_run_tells_what_would_be_learned(site, base, capsys):
    assert fine_tune(replace(asked(*site, base), dry_run=True), answer, Told()) == 0
    out = capsys.readouterr().out
    assert "base     atlas 1.0" in out
    assert "sub-02_T1w: no labels; skipped" in out
    assert "Not labelled, and merged into the background" in out


def test_a_run_keeps_the_originals_of_corrections_and_a_dry_one_does_not(tmp_path, base):
    changed = head(0)
    changed[np.roll(changed, 1, 1) == 10] = 10
    site = write_site(tmp_path, {"sub-00": changed})
    what = asked(*site, base, budget_minutes=0.01, fine_tune=recipe(tmp_path))
    name = "sub-00/anat/sub-00_space-T1w_seg-aseg_dseg"
    original = what.out_dir / f"{name}.nii.gz"
    save_nifti(original, head(0))
    for folder in (site[1], what.out_dir):
        (folder / f"{name}.json").write_text(json.dumps({"ContentKey": "k"}))
    kept = what.out_dir / "models" / ".originals"
    fine_tune(replace(what, dry_run=True), answer, Told())
    assert not kept.exists()
    with pytest.raises(UsageError, match="minutes are too few"):
        fine_tune(what, answer, Told())
    assert [path.read_bytes() for path in kept.iterdir()] == [original.read_bytes()]


def test_labels_of_a_scan_with_a_fourth_axis_are_shown(tmp_path):
    bids, derivative = write_site(tmp_path, {"sub-00": head(0)})
    save_nifti(bids / "sub-00/anat/sub-00_T1w.nii.gz", paint(head(0), 0)[..., None])
    scans, _ = discover(config(bids))
    found = collect(match(derivative, scans), PROTOCOL)
    (one,) = found.usable
    known = np.where(one.channels == IGNORE, 0, one.channels)
    tested = work.Tested(one, one.name, {1: 0.5}, {1: 0.5}, known, known)
    sides = page._sides(tmp_path, SimpleNamespace(reading=found.reading), tested)
    assert [side.display.image.shape for side in sides] == [(SIDE,) * 3] * 3
    assert all((side.display.channels == sides[0].display.channels).all() for side in sides)


# --- judge and record ---------------------------------------------------------------------------


def test_folds_divide_persons_and_halves_one():
    assert [f.side for f in folds(["a", "a"])] == ["left", "right"]
    assert [f.held_out for f in folds(["a", "b", "a"])] == [(0, 2), (1,)]
    many = folds([str(n) for n in range(9)])
    assert len(many) == 4
    assert sorted(i for f in many for i in f.held_out) == list(range(9))
    assert len(folds(["a", "b", "c"], 2)) == 2


def test_halves_are_those_of_the_template():
    left = half(affine(), (SIDE,) * 3, "left")
    assert left[: SIDE // 2].all() and not left[SIDE // 2 :].any()
    assert (left ^ half(affine(), (SIDE,) * 3, "right")).all()


def test_the_child_is_kept_only_where_it_gains_and_forgets_nothing():
    kept = decide([0.7, 0.8], {1.0: [0.8, 0.9], 0.5: [0.75, 0.86]}, {0: 0.9, 1.0: 0.85, 0.5: 0.9})
    assert kept.kept and kept.share == kept.judged == 0.5
    assert kept.gain == pytest.approx(0.055)
    forgetful = decide([0.7], {1.0: [0.9]}, {0: 0.9, 1.0: 0.8})
    assert forgetful.judged == 1.0 and forgetful.share == 0
    assert not forgetful.kept and "loses 0.100 Dice on the rehearsal set" in forgetful.reason
    worse = decide([0.7, 0.7, 0.7], {1.0: [0.9, 0.6, 0.6]}, {0: 0.9, 1.0: 0.9})
    assert not worse.kept and "better on 1 of 3" in worse.reason
    flat = decide([0.7], {1.0: [0.5], 0.5: [0.7]}, {0: 0.9, 1.0: 0.9, 0.5: 0.9})
    assert not flat.kept and flat.judged == 0.5


def test_a_held_out_part_without_labels_is_not_judged():
    nan = float("nan")
    kept = decide([0.8, nan], {1.0: [0.85, nan]}, {0: 0.8, 1.0: 0.8})
    assert kept.kept and kept.gain == pytest.approx(0.05)
    assert "better on 1 of 1" in kept.reason
    assert kept.reason.endswith(" 1 held-out part shows no labelled structure and is not judged.")
    worse = decide([0.8, nan, 0.8, 0.8, nan], {1.0: [0.9, nan, 0.7, 0.7, nan]}, {0: 0.8, 1.0: 0.8})
    assert not worse.kept and "better on 1 of 3" in worse.reason
    assert "2 held-out parts show no labelled structure and are not judged." in worse.reason
    none = decide([nan, nan], {1.0: [nan, nan]}, {0: 0.8, 1.0: 0.8})
    assert not none.kept
    assert none.reason == (
        "The base stays: no held-out part shows a labelled structure, so nothing can be judged; "
        "label scans of two persons or more, or both halves of the brain."
    )


def test_a_half_without_labels_leaves_no_gap_in_card_and_record(tmp_path, base, monkeypatch):
    def kept_anyway(*scores):
        return replace(decide(*scores), kept=True, share=1.0)

    monkeypatch.setattr(work, "decide", kept_anyway)
    left = PROTOCOL.table["index"][PROTOCOL.table["hemisphere"] == "left"]
    site = write_site(tmp_path, {"sub-00": np.where(np.isin(head(0), left), head(0), 0)})
    what = asked(*site, base, fine_tune=recipe(tmp_path, max_steps=10))
    assert fine_tune(what, answer, Told()) == 0
    folder = what.out_dir / "models" / "lab"
    record = json.loads((folder / "adaptation.json").read_text())
    (one,) = record["HeldOut"]
    assert one["Part"] == "sub-00_T1w left"
    assert "1 held-out part shows no labelled structure" in record["Reason"]
    (row,) = {card.name: card for card in load_cards((base,), what.out_dir)}["lab"].evidence
    assert row["n"] == 1 and row["mean"] == pytest.approx(one["DiceAfter"])
    assert row["sd"] == 0
    assert "nan" not in (folder / "card.toml").read_text()


def test_licences_are_joined():
    assert joined_licence("MIT AND CC0-1.0", ["CC0-1.0"]) == "MIT AND CC0-1.0"
    unknown = joined_licence("MIT", ["not stated: for use at the site"])
    assert unknown == "MIT AND not stated: for use at the site"
    restricted = joined_licence("MIT OR GPL-3.0-only", ["CC-BY-NC-4.0"])
    assert restricted == "(MIT OR GPL-3.0-only) AND CC-BY-NC-4.0"
    assert not is_permissive(restricted)
    assert joined_licence(restricted, ["CC-BY-NC-4.0"]) == restricted


def test_the_domain_is_that_of_the_scans():
    scan = Scan(Path("x"), Path(), {"sub": "1"}, "T2w", age=Age(days=365.25), skull_stripped=True)
    other = replace(scan, age=Age(days=2 * 365.25))
    found = domain_of([scan, other], Domain())
    assert found.suffixes == ("T2w",)
    assert found.age_years == (0.7, 2.3)
    assert found.skull_stripped
    assert domain_of([scan, replace(other, age=Age())], Domain()).age_years is None


def test_a_sites_own_protocol_gets_a_new_head_that_the_next_run_knows(tmp_path, base, monkeypatch):
    atlases: list[tuple[str, ...]] = []

    def noted(samples, *place):
        atlases.append(tuple(one.name for one in samples))
        return atlas(samples, *place)

    monkeypatch.setattr(material, "atlas", noted)

    def own(labels: np.ndarray) -> np.ndarray:
        """Two structures of the site's own: white matter alone, and all nuclei together."""
        names = PROTOCOL.table.set_index("index")["name"].str.lower()
        found = np.zeros_like(labels)
        for index in np.unique(labels)[1:]:
            side = 2 if names[index].startswith("right") else 1
            found[labels == index] = side + (0 if "white" in names[index] else 10)
        return found

    rows = "index\tname\n0\tBackground\n1\tleft white\n2\tright white\n11\tleft nuclei\n"
    site = write_site(tmp_path, {}, rows=f"{rows}12\tright nuclei\n")
    (site[1] / "seg-aseg_dseg.tsv").rename(site[1] / "seg-lab_dseg.tsv")
    for number in range(2):
        name = f"sub-0{number}"
        path = site[1] / name / "anat" / f"{name}_space-T1w_seg-lab_dseg.nii.gz"
        save_nifti(path, own(head(number)))
    how = recipe(tmp_path, head="new", scope="two-stage", shares=[1.0, 0.6, 0.3])
    what = asked(*site, base, fine_tune=how)
    assert fine_tune(what, answer, Told()) == 0
    record = json.loads((what.out_dir / "models/lab/adaptation.json").read_text())
    assert record["Kept"], record["Reason"]
    (card,) = [c for c in load_cards((base,), what.out_dir) if c.name == "lab"]
    assert card.heads == ("lab", "aseg")
    table = (card.path.parent / "seg-lab_dseg.tsv").read_bytes()
    assert card.tables == {"lab": hashlib.sha256(table).hexdigest()}
    protocol = card.protocol_of("lab")
    assert protocol.table["index"].tolist() == [0, 1, 2, 11, 12]
    assert protocol.mirror.tolist() == [0, 2, 1, 4, 3]
    weights = load_weights(card)
    model = load_model(card, weights)
    assert [len(p) for p in model.heads] == [5, len(PROTOCOL)]
    assert model.frame_head == 1
    check_proof(card, weights)
    assert card.networks["segmenter"]["prior_channels"] == 5 + len(PROTOCOL)
    assert len(weights["prior.lab"]) == 5
    scans = set(atlases[0])
    assert len(scans) == 2
    assert [set(one) for one in atlases[1:]] == [scans - {one} for one in sorted(scans)], (
        "the atlas of a fold is made without the scan that it holds out"
    )


@pytest.mark.parametrize(
    ("what", "by_labels"),
    [("all", True), ("few", False), ("part", False), ("far", False), ("own", False)],
)
def test_a_sample_lies_where_its_labels_say_if_they_say_enough(what, by_labels, monkeypatch):
    monkeypatch.setattr(adapt_inspect, "MANY_LANDMARKS", 12 if what == "few" else 10)
    table = np.zeros(256, np.uint8)
    table[PROTOCOL.indices] = np.arange(len(PROTOCOL))
    channels = table[head(0)]
    points, mass = label_centroids(channels, len(PROTOCOL), affine())
    template = np.where(mass[:, None] > 0, points, np.nan)
    template[0] = np.nan
    if what == "part":
        channels[:, :, 0] = IGNORE
    frame = np.eye(4)
    frame[1, 3] = 30.0 if what == "far" else 4.0
    native = Volume(paint(head(0), 0), Grid(channels.shape, affine()))
    labelled = SimpleNamespace(
        name="sub-00_T1w", channels=channels, scan=SimpleNamespace(suffix="T1w"),
        group=np.arange(len(PROTOCOL)), sha256="0" * 64,
    )  # fmt: skip
    seen = SimpleNamespace(native=native, template_from_native=frame)
    reading = SimpleNamespace(target=PROTOCOL, new_head=what == "own")
    one = SimpleNamespace(labelled=labelled, prepared=seen)
    sample = adapt_inspect.sample_of(one, reading, template)
    expected = affine() if by_labels else frame @ affine()
    np.testing.assert_allclose(sample.template_from_voxel, expected, atol=1e-3)


def test_a_scan_without_a_brain_for_the_model_is_all_background():
    channels = np.ones((2, 2, 2), np.uint8)
    one = SimpleNamespace(labelled=SimpleNamespace(channels=channels))
    model = SimpleNamespace(protocol=PROTOCOL)

    def lost(_job, _model):
        raise ScanError("no brain found", "", "")

    def found(_job, _model):
        labels = np.full((2, 2, 2), PROTOCOL.indices[5], np.int16)
        return None, SimpleNamespace(labels=SimpleNamespace(data=labels))

    assert (program_labels(model, one, None, lost) == 0).all()
    assert (program_labels(model, one, None, found) == 5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ("T1w", "T2w")}, "sees several images at once.*small.*tlseg-train.*--base"),
        ({"frame": "infant"}, "no head in the template's protocol 'infant'.*small"),
    ],
)
def test_a_model_that_cannot_be_judged_is_not_adapted(change, message):
    with pytest.raises(UsageError, match=message):
        work.check_adaptable(small_card(**change))
    work.check_adaptable(small_card())


@pytest.mark.parametrize(
    ("segmenter", "why"),
    [
        ({"network": "members", "of": NETWORK, "each": [{}, {}]}, "is several networks"),
        ({**NETWORK, "design": {"decoders": "own"}}, "has a decoder for each head"),
        ({**NETWORK, "design": {"supervised": 1}}, "has answers of coarser levels"),
    ],
)
def test_a_model_that_can_have_no_new_head_is_refused_for_labels_that_need_one(segmenter, why):
    card = small_card(networks={"segmenter": segmenter})
    work.check_adaptable(card)
    with pytest.raises(UsageError, match=f"need a new head, and the model {why}, .*--base, or giv"):
        work.check_adaptable(card, new_head=True)
    work.check_adaptable(small_card(), new_head=True)


@pytest.mark.parametrize(
    ("strategy", "mirrored", "wanted"),
    [
        ({"window": 96}, True, {"window": 96}),
        ({"mirror": True}, True, {"mirror": True}),
        ({"mirror": True}, False, {"mirror": False}),
        ({"halves": True, "window": 96}, True, {"window": 96, "mirror": True}),
        ({"halves": True, "window": 96}, False, {"window": 96, "mirror": False}),
    ],
)
def test_a_child_is_asked_with_whole_images_and_their_mirror_images(strategy, mirrored, wanted):
    assert asked_as_child(small_card(strategy=strategy), mirrored).strategy == wanted
