"""Whatever the device, the same labels; and what goes to it and comes back is little."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tests import pretended, toy
from tests.datasets import made_up_job, make_dataset
from tests.scripts import load_benchmark
from tests.small import small_scans
from tests.test_segment import CARD, DETAILED, HALVES, tensors
from tlseg_bids import app, placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.cli.run import main
from tlseg_bids.crew import Crew
from tlseg_bids.flow import Prediction, Prepared, Segmentation
from tlseg_bids.metrics import dice
from tlseg_bids.networks import UNet
from tlseg_bids.plan import make
from tlseg_bids.postprocess import ProbabilityField, probability_maps, to_native
from tlseg_bids.preprocess.geometry import interpolated, resample
from tlseg_bids.preprocess.intensity import robust_scale, scaled
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import (
    Model,
    Models,
    fast_precision,
    learning_precision,
    load_model,
)
from tlseg_bids.volume import Grid, Volume, load_scan
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import load_weights

THERE = pretended.DEVICE
MIB = 2**20


@pytest.fixture
def counted(monkeypatch):
    """What goes to and from a device that lasts as long as the test."""
    with pretended.device(monkeypatch) as there:
        yield there


def test_what_is_mixed_or_read_too_soon_is_noticed(counted):
    here, there = torch.ones(2, 3), torch.ones(2, 3).to(THERE)
    assert there.device == THERE and (there + 1).device == THERE
    for mixed in (lambda: here + there, lambda: here.add_(there), lambda: there[here > 0]):
        with pytest.raises(RuntimeError, match="lie on the processor"):
            mixed()
    with pytest.raises(RuntimeError, match="not supported"):
        there.numpy()
    part = there[1]
    part[:] = 5
    np.testing.assert_array_equal(there.cpu().numpy(), [[1, 1, 1], [5, 5, 5]])
    assert counted.there == [24] and counted.back == [24]


def test_a_scan_is_brought_there_once_and_read_there(counted):
    random = np.random.default_rng(0)
    scan = Volume(
        random.normal(size=(40, 36, 30)).astype(np.float32), Grid((40, 36, 30), np.eye(4))
    )
    for step in (0.7, 1.3, 4.0):
        turned = np.array([[0.9, -0.3, 0, 2], [0.3, 0.9, 0, -4], [0, 0.1, 1, -3], [0, 0, 0, 1]])
        turned[:3, :3] *= step
        grid = Grid((20, 24, 22), turned)
        found = interpolated(scan, grid, crew=Crew(device=THERE))
        assert found.device == THERE
        np.testing.assert_allclose(found.cpu().numpy(), resample(scan, grid), atol=1e-5)
    assert [size for size in counted.there if size >= scan.data.nbytes] == [scan.data.nbytes]
    beyond = Grid((3, 3, 3), np.eye(4) + 500 * np.eye(4, 4, 3))
    assert (interpolated(scan, beyond, -2.0, Crew(device=THERE)).cpu() == -2).all()


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["noise", "background", "constant", "two values"])
def test_intensities_are_scaled_there_as_here(kind, masked):
    random = np.random.default_rng(3)
    image = random.gamma(2, 50, (31, 24, 20)).astype(np.float32)
    if kind == "background":
        image[:, :9] = 17
    elif kind == "constant":
        image[:] = 4
    elif kind == "two values":
        image = (image > 500).astype(np.float32)
    mask = random.random(image.shape) > 0.7 if masked else None
    where = None if mask is None else torch.from_numpy(mask).to(THERE)
    found = scaled(torch.from_numpy(image).to(THERE), 0.0, 99.9, where)
    np.testing.assert_allclose(found.cpu(), robust_scale(image, 0.0, 99.9, mask), atol=1e-6)


@pytest.mark.usefixtures("counted")
def test_nothing_that_counts_there_is_nothing():
    image = torch.ones(9, 9, 9).to(THERE)
    nowhere = torch.zeros(9, 9, 9, dtype=torch.bool).to(THERE)
    assert (scaled(image, mask=nowhere).cpu() == 0).all()


@pytest.mark.parametrize("fine", [True, False], ids=["fine", "coarse"])
@pytest.mark.parametrize(
    "card", [CARD, DETAILED, replace(DETAILED, strategy=HALVES)], ids=["plain", "fine", "halves"]
)
def test_a_network_answers_there_as_here(card, fine, monkeypatch):
    given = tensors(card)
    given["segmenter.heads.0.weight"] *= 100
    given["prior.aseg"] = torch.full((33, 8, 6, 6), 8).byte()
    scan = Volume(np.zeros((40, 30, 31), np.float32), Grid((40, 30, 31), np.eye(4)))
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 32, 24, 24)))
    grid = Grid((32, 24, 24), np.eye(4))
    prepared = Prepared(image.float(), grid, scan, np.eye(4), True, ())

    def run(model: Model) -> tuple[Prediction, Segmentation]:
        found = segment(model, prepared, Ask(fine=fine, mirror=card is DETAILED))
        return found, to_native(found, scan, model.protocol, crew=model.crew)

    here, labels_here = run(replace(load_model(card, given), precision=torch.float32))
    with pretended.device(monkeypatch):
        there, labels_there = run(load_model(card, given, THERE.type))
        probabilities = np.asarray(there.probabilities, np.float32)
        np.testing.assert_array_equal(there.channel, probabilities.argmax(0))
        maps = list(probability_maps(there.probabilities, there.grid, scan.grid))
        some = ProbabilityField(there.probabilities, there.grid, scan.grid).at(np.arange(2000))
    np.testing.assert_allclose(probabilities, np.asarray(here.probabilities, np.float32), atol=2e-3)
    assert len(np.unique(labels_here.labels.data)) > 3
    assert (labels_here.labels.data == labels_there.labels.data).mean() > 0.999
    np.testing.assert_allclose(
        labels_here.volumes.soft_mm3, labels_there.volumes.soft_mm3, rtol=1e-3
    )
    np.testing.assert_allclose(np.stack(maps).reshape(len(maps), -1)[:, :2000].T, some, atol=3e-3)


@pytest.mark.slow
def test_the_default_model_labels_a_scan_there_as_here(tmp_path: Path, monkeypatch):
    """Large is only the scan on its way there, labels and confidence on their way back, and what
    finds the brain, twice: the locator's look and the settler's. Neither is rounded to TF32."""
    small_scans(tmp_path, 1)
    (path,) = tmp_path.rglob("*_T1w.nii.gz")
    card = find_card(load_cards(()), "any", "--model")
    job = replace(made_up_job(Scan(path, tmp_path, {"sub": "01"}, "T1w")), card=card)
    weights = load_weights(card, True)

    def run(model: Model) -> tuple[Segmentation, Volume]:
        scan, _ = load_scan(path)
        prepared = placing.find(scan, job, model)
        answer = app.finely(prepared, model)
        return to_native(answer, scan, model.protocol, card.calibration, True, model.crew), scan

    here, scan = run(replace(load_model(card, weights), precision=torch.float32))
    encode, tf32 = UNet._encode, {}

    def noted(network: UNet, *given, **more):
        tf32.setdefault(network, set()).add(torch.backends.cudnn.allow_tf32)
        return encode(network, *given, **more)

    monkeypatch.setattr(UNet, "_encode", noted)
    with pretended.device(monkeypatch) as counted:
        model = load_model(card, weights, THERE.type)
        assert model.landmarks.atlas is not None  # brought back once for a model
        counted.there.clear(), counted.back.clear()
        there, _ = run(model)
    roles = {role: tf32[network] for role, network in model.networks.items()}
    assert roles == {"locator": {False}, "settler": {False}, "segmenter": {True}}
    assert [size for size in counted.there if size > MIB / 8] == [scan.data.nbytes]
    back = [size for size in counted.back if size > MIB / 8]
    assert back[-2:] == [here.labels.data.nbytes, here.confidence.nbytes]
    assert len(back) <= 4
    assert 0.5 < counted.most / 2**30 < 2
    assert len(counted.asked) > 40
    assert not pretended.without_kernel(counted.asked, "CUDA")
    assert not pretended.without_kernel(counted.asked, "MPS")
    of_a_processor = {"mkldnn_convolution", "_add_relu.Tensor"}
    assert (
        pretended.without_kernel({"abs", "add.Tensor"} | of_a_processor, "CUDA") == of_a_processor
    )
    assert set(np.unique(here.labels.data)) == set(np.unique(there.labels.data))
    for label in np.unique(here.labels.data):
        assert dice(here.labels.data == label, there.labels.data == label) > 0.995, label


def test_a_scan_goes_through_the_program_there(tmp_path: Path, monkeypatch):
    """The toy model, probabilities wanted; in the thread in which the program labels a scan."""
    bids = make_dataset(tmp_path / "bids", ())
    toy.write_scan(bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    toy.write_toy_model(tmp_path / "models")
    known, seen = app.run_job, []

    def there(*given):
        with pretended.device(monkeypatch) as counted:
            outcome = known(*given)
        seen.append(counted)
        return outcome

    def run(name: str) -> Path:
        assert main([
            str(bids), str(tmp_path / name), "participant", "--models", str(tmp_path / "models"),
            "--model", "toy", "--skip-bids-validation", "--nprocs", "1", "--probabilities",
        ]) == 0  # fmt: skip
        return tmp_path / name / "sub-01" / "anat"

    here = run("here")
    monkeypatch.setattr(make, "choose_device", lambda *_: (str(THERE), ()))
    monkeypatch.setattr(app, "run_job", there)
    found = run("there")
    assert len(seen) == 1 and seen[0].there and seen[0].back
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in here.iterdir())
    for one in here.glob("*.nii.gz"):
        images = [np.asarray(nib.load(folder / one.name).dataobj) for folder in (here, found)]
        assert np.isclose(*images, atol=0.01).mean() > 0.999, one.name
    (sidecar,) = found.glob("*aseg_dseg.json")
    assert json.loads(sidecar.read_text())["Device"] == str(THERE)


def test_a_gpu_is_one_scans_at_a_time_and_the_cpu_everyones():
    models, order, meeting = Models(), [], threading.Barrier(2, timeout=10)

    def take(device: str) -> None:
        with models.turn(device):
            order.append(f"{device} begins")
            if device == "cpu":
                meeting.wait()  # breaks unless both are in their turn
            time.sleep(0.05)
            order.append(f"{device} ends")

    for device in ("cuda:0", "cpu"):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(take, [device] * 2))
    assert order[:4] == ["cuda:0 begins", "cuda:0 ends"] * 2
    assert order[4:] == ["cpu begins"] * 2 + ["cpu ends"] * 2
    with models.turn("cuda:0"), models.turn("cuda:1"):
        pass


@pytest.mark.slow
def test_the_benchmark_counts_what_a_gpu_is_asked_for(tmp_path: Path):
    small_scans(tmp_path, 1)
    (path,) = tmp_path.rglob("*_T1w.nii.gz")
    found = load_benchmark("device").pretend(path, "any")
    assert list(found.index) == ["read", "find", "label", "back"]
    assert found["operations"]["read"] == 0
    assert (found["operations"][1:] > 100).all()
    assert 100 < found["of networks with an atlas"]["label"] < found["operations"]["label"]
    size_mib = np.prod(nib.load(path).shape) / MIB
    assert found["MiB there"]["find"] == pytest.approx(4 * size_mib, abs=0.5)
    assert found["MiB back"]["back"] == pytest.approx(3 * size_mib, abs=0.2)


def test_a_gpu_answers_in_float16_and_learns_in_bfloat16():
    assert fast_precision(torch.device("cuda")) == torch.float16
    model = load_model(CARD, tensors(CARD))
    for answers, learns in (
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        assert learning_precision(replace(model, precision=answers)) == learns


@pytest.mark.parametrize("card", [CARD, DETAILED], ids=["plain", "fine"])
def test_what_float16_has_no_numbers_for_is_computed_again(card, monkeypatch):
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 16, 16, 16))).float()
    scan = Volume(image[0].numpy(), Grid((16, 16, 16), np.eye(4)))
    prepared = Prepared(image, scan.grid, scan, np.eye(4), True, ())
    for factor, said in ((1.0, "float16"), (1e6, "float32")):
        given = tensors(card)
        given["segmenter.down.0.conv1.weight"] = factor * given["segmenter.down.0.conv1.weight"]
        exact = replace(load_model(card, given), precision=torch.float32)
        wanted = segment(exact, prepared, Ask())
        with pretended.device(monkeypatch):
            model = replace(load_model(card, given, THERE.type), precision=torch.float16)
            found = segment(model, prepared, Ask())
            probabilities = np.asarray(found.probabilities, np.float32)
        assert found.precision == said
        assert found.is_finite
        np.testing.assert_allclose(
            probabilities, np.asarray(wanted.probabilities, np.float32), atol=0.02
        )
