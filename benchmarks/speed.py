"""The engine beside networks of its peers' size, on one machine in one run.

``python benchmarks/speed.py SCAN [--model any] [--repeats 5] [--threads 2] [--peers …] [--out F]``

SCAN is a T1w or T2w. The engine is timed as it labels that scan: every pass of its networks with
the readings of the scan between them (finding the head, the frame, the answer), of these the
segmenter alone, from a scan in its place to probabilities, and the whole way from file to labels in
memory. The peers have random weights, which suffice for time, and see one volume of
192 × 224 × 192 voxels, as a head of 1 mm fills it, already read and in its place:

- ``synthseg``: a U-Net of 5 levels of 24·2ˡ features, two convolutions each (Billot et al. 2023,
  doi:10.1016/j.media.2023.102789), as PyTorch runs it by default, in float32;
- ``synthseg-openvino``: the same, float32, by OpenVINO, where that is installed;
- ``meshnet``: nine dilated convolutions of 30 features (Fedorov et al. 2017,
  arXiv 1612.00940), float32;
- ``views``: a 2-D U-Net of QuickNAT's size in time (64 features, four levels), three views, of
  which 8 slices are timed and multiplied by the number of slices.

The runs alternate; the table has medians, the least and the most. The engine's process keeps freed
memory as the program's does; the peers have one of their own, as PyTorch runs by default. The share
of the machine's peak is floating point operations a second, as `torch.utils.flop_counter` counts
the convolutions, over what a matrix product of 4096² in the same precision reaches here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from tlseg_bids import app, placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.flow import Job
from tlseg_bids.postprocess import to_native
from tlseg_bids.resources import peak_memory_gib, restart_peak, reuse_freed_memory
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.volume import Volume, load_scan
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import load_weights

VOLUME = (192, 224, 192)
CLASSES = 33
SLICES_TIMED = 8
Size = Sequence[int]


def double(inputs: int, outputs: int, kind: type[nn.Module]) -> nn.Sequential:
    """Two convolutions of width 3."""
    norm = nn.BatchNorm3d if kind is nn.Conv3d else nn.BatchNorm2d
    return nn.Sequential(
        kind(inputs, outputs, 3, padding=1), nn.ELU(),
        kind(outputs, outputs, 3, padding=1), nn.ELU(), norm(outputs),
    )  # fmt: skip


class PlainUNet(nn.Module):
    """A U-Net with max pooling and nearest upsampling."""

    def __init__(self, features: list[int], kind: type[nn.Module], inputs: int = 1) -> None:
        super().__init__()
        self.pool = F.max_pool3d if kind is nn.Conv3d else F.max_pool2d
        widths = [inputs, *features]
        self.down = nn.ModuleList(
            double(a, b, kind) for a, b in zip(widths[:-1], features, strict=True)
        )
        self.up = nn.ModuleList(
            double(deep + skip, skip, kind)
            for deep, skip in zip(features[:0:-1], features[-2::-1], strict=True)
        )
        self.head = kind(features[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat((F.interpolate(x, scale_factor=2.0), skips.pop()), 1))
        return self.head(x)


def meshnet() -> nn.Module:
    """Dilated convolutions at full resolution."""
    layers: list[nn.Module] = []
    inputs = 1
    for dilation in (1, 2, 4, 8, 16, 8, 4, 2, 1):
        layers += [
            nn.Conv3d(inputs, 30, 3, padding=dilation, dilation=dilation),
            nn.BatchNorm3d(30), nn.ReLU(),
        ]  # fmt: skip
        inputs = 30
    return nn.Sequential(*layers, nn.Conv3d(30, CLASSES, 1))


def peers(wanted: list[str], threads: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Name to what is timed, and the factor that makes a whole volume of it."""
    torch.manual_seed(0)
    volume = torch.rand(1, 1, *VOLUME)
    out: dict[str, tuple[Callable[[], object], float]] = {}
    if "synthseg" in wanted or "synthseg-openvino" in wanted:
        unet = PlainUNet([24 * 2**level for level in range(5)], nn.Conv3d).eval()
        out["synthseg"] = (lambda: unet(volume), 1.0)
        try:
            import openvino
        except ImportError:
            print("openvino is not installed: no synthseg-openvino")
        else:
            model = openvino.convert_model(unet, example_input=volume)
            model.reshape(list(volume.shape))
            options = {
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": threads,
            }
            compiled = openvino.Core().compile_model(model, "CPU", options)
            out["synthseg-openvino"] = (lambda: compiled([volume.numpy()]), 1.0)
    if "meshnet" in wanted:
        mesh = meshnet().eval()
        out["meshnet"] = (lambda: mesh(volume), 1.0)
    if "views" in wanted:
        flat = PlainUNet([64, 64, 64, 64], nn.Conv2d, inputs=7).eval()
        slices = torch.rand(SLICES_TIMED, 7, 256, 256)
        out["views"] = (lambda: flat(slices), 3 * 256 / SLICES_TIMED)
    return {name: out[name] for name in out if name in wanted}


class Engine:
    """The model as the program runs it on a scan."""

    def __init__(self, path: Path, name: str, threads: int) -> None:
        card = find_card(load_cards(()), name, "--model")
        suffix = "T2w" if "T2w" in path.name else "T1w"
        scan = Scan(path, path.parent, {"sub": "x"}, suffix)
        self.model: Model = load_model(card, load_weights(card, True), crew=Crew(threads))
        self.job = Job(scan, card, "", (), (), "", "cpu", 0.0)
        self.volume, _ = load_scan(path)
        self.prepared = placing.find(self.volume, self.job, self.model)

    def segmenter(self) -> None:
        """The segmenter's passes, from a scan in its place to probabilities."""
        app.finely(self.prepared, self.model)

    def network(self) -> None:
        """Every pass of the networks, resampling between them included."""
        volume = Volume(self.volume.data, self.volume.grid)  # with nothing kept from the last turn
        app.finely(placing.find(volume, self.job, self.model), self.model)

    def scan(self) -> None:
        """From file to labels in memory."""
        volume, _ = load_scan(self.job.scan.path)
        prediction = app.finely(placing.find(volume, self.job, self.model), self.model)
        to_native(prediction, volume, self.model.protocol, crew=self.model.crew)


def peak_flops(kind: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product."""
    a, b = (torch.rand(4096, 4096).to(kind) for _ in range(2))
    best = min(timed(lambda: a @ b) for _ in range(4))
    return 2 * 4096**3 / best


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    with torch.inference_mode():
        run()
    return time.perf_counter() - begun


def flops(run: Callable[[], object]) -> float:
    """Floating point operations of one call."""
    asked = {torch.ops.aten.mkldnn_convolution: _convolution}
    with FlopCounterMode(display=False, custom_mapping=asked) as counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())


def _convolution(x: Size, weight: Size, *_: object, out_shape: Size, **__: object) -> int:
    """Operations of a convolution that oneDNN was asked for by name."""
    return conv_flop_count(x, weight, out_shape)


_PEERS: dict[str, tuple[Callable[[], object], float]] = {}
"""Of the process that peers run in."""


def _ready(wanted: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    _PEERS.update(peers(wanted, threads))


def _names() -> list[str]:
    return list(_PEERS)


def _peer_turn(name: str) -> tuple[float, float]:
    run, factor = _PEERS[name]
    seconds, memory = _turn(run)
    return seconds * factor, memory


def _peer_flops(name: str) -> float:
    run, factor = _PEERS[name]
    return np.nan if "openvino" in name else flops(run) * factor


def _turn(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and the process's peak memory in it, GiB."""
    restart_peak()
    return timed(run), peak_memory_gib()


def main() -> None:
    """Time all in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scan", type=Path)
    parser.add_argument("--model", default="any")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peers", nargs="*", default=["synthseg", "synthseg-openvino", "meshnet", "views"]
    )
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    reuse_freed_memory()  # as the program does; the peers have a process of their own
    engine = Engine(asked.scan, asked.model, asked.threads)
    own = {
        "engine, network": engine.network,
        "engine, segmenter alone": engine.segmenter,
        "engine, whole scan": engine.scan,
    }
    with ProcessPoolExecutor(
        1, get_context("spawn"), _ready, (asked.peers, asked.threads)
    ) as beside:  # fmt: skip
        names = [*own, *beside.submit(_names).result()]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        memory: dict[str, float] = {}
        torch.set_num_threads(1)  # the engine shares out windows, the peers each operation
        for turn in range(asked.repeats + 1):  # the first turn warms up
            for name in names:
                mine = own.get(name)
                spent, memory[name] = (
                    _turn(mine) if mine else beside.submit(_peer_turn, name).result()
                )
                print(f"turn {turn} of {asked.repeats}: {name} {spent:.2f} s", flush=True)
                if turn:
                    seconds[name].append(spent)
        # counting is a mode of torch, which sees its own thread alone
        engine.model = replace(engine.model, crew=ALONE)
        counts = {
            name: flops(own[name]) if name in own else beside.submit(_peer_flops, name).result()
            for name in names
        }
    torch.set_num_threads(asked.threads)
    peaks = {kind: peak_flops(kind) for kind in {engine.model.precision, torch.float32}}
    base = statistics.median(seconds["engine, network"])
    found = []
    for name in names:
        middle = statistics.median(seconds[name])
        peak = peaks[engine.model.precision if name in own else torch.float32]
        found.append({
            "what": name, "seconds": middle, "least": min(seconds[name]),
            "most": max(seconds[name]), "ratio to the engine's network": middle / base,
            "TFLOP": counts[name] / 1e12, "share of peak": counts[name] / middle / peak,
            "process peak GiB": memory[name],
        })  # fmt: skip
    table = pd.DataFrame(found).round(3)
    print(table.to_string(index=False))
    if asked.out:
        table.to_csv(asked.out, sep="\t", index=False)


if __name__ == "__main__":
    main()
