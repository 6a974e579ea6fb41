"""A GPU that turns out to have too little memory costs no scan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import toy
from tests.datasets import make_dataset
from tlseg_bids import app
from tlseg_bids.cli.run import main
from tlseg_bids.plan import make
from tlseg_bids.postprocess import to_native
from tlseg_bids.segment import model

GPU = "cuda:0"


@pytest.fixture
def dataset(tmp_path) -> Path:
    bids = make_dataset(tmp_path / "bids", ())
    toy.write_scan(bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    toy.write_toy_model(tmp_path / "models")
    return tmp_path


def run(root: Path, name: str = "out") -> int:
    return main([
        str(root / "bids"), str(root / name), "participant", "--models", str(root / "models"),
        "--model", "toy", "--skip-bids-validation", "--nprocs", "1",
    ])  # fmt: skip


def with_gpu(monkeypatch, error: Exception) -> list[str]:
    """Plan for a GPU, on which loading the model raises `error`; the devices that were tried."""
    tried, known = [], model.load_model

    def load(card, tensors, device, *more):
        tried.append(device)
        if device == GPU:
            raise error
        return known(card, tensors, device, *more)

    monkeypatch.setattr(make, "choose_device", lambda *_: (GPU, ("as planned",)))
    monkeypatch.setattr(model, "load_model", load)
    return tried


def sidecar(root: Path, name: str = "out") -> dict:
    return json.loads(next((root / name / "sub-01" / "anat").glob("*aseg_dseg.json")).read_text())


def test_a_scan_that_the_gpu_has_no_memory_for_is_labelled_on_the_cpu(dataset, monkeypatch, caplog):
    assert run(dataset, "plain") == 0
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    tried = with_gpu(monkeypatch, full)
    assert run(dataset) == 0
    assert tried == [GPU, "cpu"]
    found, plain = sidecar(dataset), sidecar(dataset, "plain")
    assert found["Device"] == "cpu"
    assert "as planned" in found["Warnings"]
    assert (
        "cuda:0 had not enough memory for this scan, which was labelled on the CPU: end other "
        "programs on the GPU, or give --device cpu" in found["Warnings"]
    )
    assert found["QualityControl"] == plain["QualityControl"]
    assert "sub-01_T1w.nii.gz: cuda:0 had not enough memory" in caplog.text
    tried.clear()
    assert run(dataset) == 0
    assert tried == [], "the result is finished, whichever device it came from"


def test_labels_that_the_gpu_has_no_memory_to_bring_back_are_brought_back_on_the_cpu(
    dataset, monkeypatch, caplog
):
    assert run(dataset, "plain") == 0
    known, asked = model.load_model, []

    def full_at_first(*given, **more):
        asked.append(given)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return to_native(*given, **more)

    monkeypatch.setattr(make, "choose_device", lambda *_: (GPU, ()))
    monkeypatch.setattr(model, "load_model", lambda *given: known(*given[:2]))
    monkeypatch.setattr(app, "to_native", full_at_first)
    assert run(dataset) == 0
    assert len(asked) == 2
    found, plain = sidecar(dataset), sidecar(dataset, "plain")
    told = (
        "cuda:0 had not enough memory to bring the labels of this scan to its own voxels, which "
        "was done on the CPU: end other programs on the GPU"
    )
    assert told in found["Warnings"]
    assert f"sub-01_T1w.nii.gz: {told}" in caplog.text
    assert found["Device"] == GPU
    assert found["QualityControl"] == plain["QualityControl"]


def test_another_error_of_the_gpu_is_told_and_not_tried_again(dataset, monkeypatch, capsys):
    tried = with_gpu(monkeypatch, RuntimeError("CUDA error: an illegal memory access"))
    assert run(dataset) == 1
    assert tried == [GPU]
    assert "CUDA error: an illegal memory access" in capsys.readouterr().err


def test_lacking_memory_on_the_cpu_is_told(dataset, monkeypatch, capsys):
    def load(*_):
        raise MemoryError

    monkeypatch.setattr(model, "load_model", load)
    assert run(dataset) == 1
    assert "not enough memory – lower --nprocs, or use --device cpu" in capsys.readouterr().err
