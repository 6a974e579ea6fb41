"""`tlseg-train RECIPE.toml`: run a training recipe, or resume it.

``tlseg-train pack`` puts the scans of recipes into one file, ``tlseg-train export`` makes a model
of checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tlseg_bids.cli import values
from tlseg_bids.cli.options import Parser
from tlseg_bids.errors import TlsegError

ROLES = ("locator", "settler", "segmenter")
PACKED_MIB = 60.0
INTERRUPTED = 130

EPILOG = """\
further commands (each has --help):
  tlseg-train pack RECIPE…      the scans of recipes in one file that --data takes
  tlseg-train export CARD.toml  a model of checkpoints

Several GPUs: torchrun --nproc-per-node N -m tlseg_bids.cli.train RECIPE.toml --device cuda …
"""


def parser() -> Parser:
    """The command line of `tlseg-train RECIPE`."""
    p = Parser(
        prog="tlseg-train", description="Run a training recipe, or resume it.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("recipe", type=Path, help="TOML file, see tlseg_bids/train/recipes")
    _data(p)
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for checkpoints")
    p.add_argument("--threads", type=values.count, default=2)
    p.add_argument("--device", default="cpu", help="torch device: cpu, cuda, cuda:1")
    p.add_argument("--name", help="name of the checkpoint, instead of the recipe's")
    p.add_argument("--start", default=None, help="checkpoint or model card to start from")
    p.add_argument("--steps", type=int, default=None)
    p.add_argument("--seed", type=int, default=None)
    p.add_argument("--accumulate", type=int, default=None, help="examples a step (and process)")
    p.add_argument("--batch", type=int, default=None, help="examples in the network at a time")
    p.add_argument("--fold", default=None, help="K/N: leave out every N-th subject from the K-th")
    card = p.add_argument_group("a model of it, when the run is over")
    card.add_argument("--card", type=Path, metavar="CARD.toml",
                      help="what its card shall say, see tlseg_bids/train/models")  # fmt: skip
    _checkpoints(card, required=False)
    card.add_argument("--models", type=Path, help="folder of the model (default: OUT/models)")
    return p


def pack_parser() -> Parser:
    """The command line of `tlseg-train pack`."""
    p = Parser(
        prog="tlseg-train pack",
        description="Put all labelled scans of recipes into one file, images in 8 bits.",
    )
    p.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE", help="TOML files")
    _data(p)
    p.add_argument("--output", type=Path, required=True, help="the file (.npz)")
    p.add_argument("--limit", type=float, default=PACKED_MIB, metavar="MIB",
                   help="refuse a larger file (default: %(default)g MiB)")  # fmt: skip
    return p


def export_parser() -> Parser:
    """The command line of `tlseg-train export`."""
    p = Parser(
        prog="tlseg-train export",
        description="Make a model of checkpoints: a safetensors file and its card.",
    )
    p.add_argument("card", type=Path, metavar="CARD.toml",
                   help="what its card shall say, see tlseg_bids/train/models")  # fmt: skip
    _checkpoints(p, required=True)
    p.add_argument("--data", type=Path, help="datasets, for licences that checkpoints lack")
    p.add_argument("--out", type=Path, required=True, help="folder of the model")
    return p


def _data(p: Parser) -> None:
    p.add_argument("--data", type=Path, required=True,
                   help="folder that holds the datasets, or their packed file")  # fmt: skip


def _checkpoints(p: argparse._ActionsContainer, required: bool) -> None:
    p.add_argument("--locator", type=Path,
                   help="checkpoint, or card of the model whose locator is kept; not needed where "
                   "CARD.toml says which model the scans are placed by")  # fmt: skip
    p.add_argument(
        "--settler",
        type=Path,
        help="checkpoint, or card of the model whose settler is kept (optional)",
    )
    p.add_argument("--segmenter", type=Path, required=required,
                   help="checkpoint, or card of the model whose segmenter is kept")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["pack"]:
        return _guarded(_pack, pack_parser(), words[1:])
    if words[:1] == ["export"]:
        return _guarded(_export, export_parser(), words[1:])
    return _guarded(_run, parser(), words)


def _guarded(
    command: Callable[[argparse.Namespace], None], it: Parser, words: Sequence[str]
) -> int:
    try:
        command(it.parse_args(words))
    except SystemExit as stop:
        return int(stop.code or 0)
    except TlsegError as error:
        print(f"tlseg-train: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tlseg-train: stopped; the same command goes on from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> None:
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    import torch

    from tlseg_bids.cli.progress import draws
    from tlseg_bids.train.loop import train
    from tlseg_bids.train.recipe import load_recipe
    from tlseg_bids.train.watch import Bar, Watch

    keys = ("name", "start", "steps", "seed", "accumulate", "batch")
    overrides = {k: getattr(options, k) for k in keys if getattr(options, k) is not None}
    if options.fold:
        overrides["fold"] = fold(options.fold)
    recipe = load_recipe(options.recipe, overrides)
    checkpoints = _partners(options, recipe.role) if options.card else {}
    torch.set_num_threads(options.threads)
    watch = Bar(sys.stderr) if draws(sys.stderr) else Watch()
    path = train(recipe, options.data, options.out, watch, device=options.device)
    if os.environ.get("RANK", "0") != "0":
        return
    print(path)
    if options.card:
        models = options.models or options.out / "models"
        _make_card(options, {**checkpoints, recipe.role: path}, models)


def fold(text: str) -> list[int]:
    """``K/N`` as [K, N].

    Raises
    ------
    UsageError
        If it is nothing of the kind, or K is not below N.
    """
    from tlseg_bids.errors import UsageError

    parts = text.split("/")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts) or int(parts[0]) >= int(parts[1]):
        raise UsageError(f"'{text}' is no fold", "--fold", "write K/N with K from 0 to N-1: 0/4")
    return [int(part) for part in parts]


def _partners(options: argparse.Namespace, role: str) -> dict[str, Path]:
    """The checkpoints of the other networks; a mistake is told before the run, not after it."""
    from tlseg_bids.errors import UsageError
    from tlseg_bids.train.export import read_description, read_part

    said = read_description(options.card)
    others = {name: getattr(options, name) for name in ROLES if name != role}
    placed = "placed_by" in said.get("preprocess", {})
    for name, path in others.items():
        needless = name == "settler" or (name == "locator" and placed)
        if path is None and not needless:
            raise UsageError(
                f"a model needs a {name}, too", "--card", f"name its checkpoint with --{name}"
            )
        if path is not None:
            read_part(path, name)
    return {name: path for name, path in others.items() if path is not None}


def _make_card(options: argparse.Namespace, checkpoints: dict[str, Path], models: Path) -> None:
    from tlseg_bids.train.export import export, read_description

    card = export(read_description(options.card), checkpoints, options.data, models)
    print(f"{models / card.name}.toml: {card.weights.bytes / 2**20:.1f} MiB, "
          f"{card.weights.licence}")  # fmt: skip


def _export(options: argparse.Namespace) -> None:
    checkpoints = {role: path for role in ROLES if (path := getattr(options, role))}
    _make_card(options, checkpoints, options.out)


def _pack(options: argparse.Namespace) -> None:
    from tlseg_bids.train.recipe import load_recipe
    from tlseg_bids.train.supply import pack

    recipes = [load_recipe(path, to_train=False) for path in options.recipes]
    size = pack(recipes, options.data, options.output, round(options.limit * 2**20))
    print(f"{options.output}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
