"""What a GPU is asked for when a scan is labelled on it, and how long it takes.

Usage: ``python benchmarks/device.py SCAN [--model any] [--device cuda] [--repeats 7]``

SCAN, a T1w or T2w, is labelled several times by one model that is loaded once: found, labelled and
brought back to its own voxels. Without ``--device`` this happens on a device that is not there
(`tests/pretended.py`), in float32, and what counts is counted: operations that a GPU would be asked
for, bytes that are carried there and back, and the memory that tensors take at most. On a GPU the
table has seconds, and the memory that PyTorch took; below it stand the network's two passes alone,
asked for operation by operation and as a graph that was captured once (`torch.cuda.CUDAGraph`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import pretended  # noqa: E402
from tlseg_bids import app, placing  # noqa: E402
from tlseg_bids.bids.scan import Scan  # noqa: E402
from tlseg_bids.flow import Job, Prediction, Prepared  # noqa: E402
from tlseg_bids.networks import UNet  # noqa: E402
from tlseg_bids.postprocess import to_native  # noqa: E402
from tlseg_bids.segment.model import Model, fast, load_model  # noqa: E402
from tlseg_bids.volume import Volume, load_scan  # noqa: E402
from tlseg_bids.zoo.registry import find_card, load_cards  # noqa: E402
from tlseg_bids.zoo.weights import load_weights  # noqa: E402

MIB = 2**20


class Way:
    """A scan on its way through a model, step by step."""

    def __init__(self, path: Path, name: str, device: str) -> None:
        card = find_card(load_cards(()), name, "--model")
        suffix = "T2w" if "T2w" in path.name else "T1w"
        scan = Scan(path, path.parent, {"sub": "x"}, suffix)
        self.model: Model = load_model(card, load_weights(card, True), device)
        self.job = Job(scan, card, "", (), (), "", device, 0.0)
        self.volume: Volume | None = None
        self.prepared: Prepared | None = None
        self.answer: Prediction | None = None

    def steps(self) -> dict[str, Callable[[], object]]:
        """What is timed, in its order."""
        return {"read": self.read, "find": self.find, "label": self.label, "back": self.back}

    def read(self) -> None:
        """From the file."""
        self.volume, _ = load_scan(self.job.scan.path)

    def find(self) -> None:
        """Where the brain is, and how the model sees it."""
        self.prepared = placing.find(self.volume, self.job, self.model)

    def label(self) -> None:
        """Probabilities."""
        self.answer = app.finely(self.prepared, self.model)

    def back(self) -> None:
        """Labels of the scan's own voxels."""
        calibration = self.job.card.calibration
        to_native(self.answer, self.volume, self.model.protocol, calibration, crew=self.model.crew)


def pretend(path: Path, name: str) -> pd.DataFrame:
    """What each step of the second of two turns asks of the device; the first loads what is kept.

    Returns
    -------
    DataFrame
        Rows ``read``, ``find``, ``label``, ``back``: operations, of these the segmenter's body,
        MiB carried there and back, and the most that lay there since the model was loaded.
    """
    rows, inside = {}, []
    body = UNet.body
    with pytest.MonkeyPatch.context() as patch, pretended.device(patch) as counted:
        way = Way(path, name, pretended.DEVICE.type)

        def heard(network: UNet, *given: object, **more: object) -> object:
            before = counted.asked.total()
            found = body(network, *given, **more)
            inside.append(counted.asked.total() - before)
            return found

        patch.setattr(UNet, "body", heard)
        for _ in range(2):
            for step, run in way.steps().items():
                inside.clear(), counted.asked.clear(), counted.there.clear(), counted.back.clear()
                run()
                rows[step] = {
                    "operations": counted.asked.total(),
                    "of networks with an atlas": sum(inside),
                    "MiB there": sum(counted.there) / MIB, "MiB back": sum(counted.back) / MIB,
                    "most GiB": counted.most / MIB / 1024,
                }  # fmt: skip
    return pd.DataFrame(rows).T.round(2)


def measure(path: Path, name: str, device: str, repeats: int) -> pd.DataFrame:
    """Seconds of each step on a GPU: median, least, most; and the memory that it took at most."""
    way, seconds = Way(path, name, device), {}
    for turn in range(repeats + 1):  # the first warms up
        torch.cuda.reset_peak_memory_stats(device)
        for step, run in way.steps().items():
            spent = timed(run, device)
            if turn:
                seconds.setdefault(step, []).append(spent)
    most = torch.cuda.max_memory_allocated(device)
    shown = way.prepared.image[None][(..., *(slice(0, n) for n in half(way)))].contiguous()
    network = way.model.networks["segmenter"]

    def both() -> None:
        with fast(way.model):
            for _ in range(2):
                network.body(shown)

    seconds["two passes"] = [timed(both, device) for _ in range(repeats + 3)][3:]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    seconds["two passes, captured"] = [timed(graph.replay, device) for _ in range(repeats)]
    table = pd.DataFrame({
        step: {"seconds": statistics.median(all_), "least": min(all_), "most": max(all_)}
        for step, all_ in seconds.items()
    }).T.round(4)  # fmt: skip
    table["most GiB"] = most / MIB / 1024
    return table


def half(way: Way) -> tuple[int, int, int]:
    """Voxels of what one pass of the segmenter sees."""
    window = way.job.card.strategy["window"]
    size = way.prepared.image.shape[1:]
    each = [window] * 3 if isinstance(window, int) else window
    return tuple(min(w, n) for w, n in zip(each, size, strict=True))


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds until the GPU has done all that it was asked for."""
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def main() -> None:
    """Label the scan and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scan", type=Path)
    parser.add_argument("--model", default="any")
    parser.add_argument("--device", help="a GPU; counted without one if not given")
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    if asked.device:
        print(measure(asked.scan, asked.model, asked.device, asked.repeats).to_string())
    else:
        print(pretend(asked.scan, asked.model).to_string())


if __name__ == "__main__":
    main()
