"""`tlseg-train RECIPE.toml`: run a training recipe, or resume it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line of `tlseg-train`."""
    p = argparse.ArgumentParser(prog="tlseg-train", description=__doc__)
    p.add_argument("recipe", type=Path, help="TOML file, see tlseg_bids/train/recipes")
    p.add_argument("--data", type=Path, required=True, help="folder that holds the datasets")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for checkpoints")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cpu", help="torch device: cpu, cuda, cuda:1")
    p.add_argument("--name", help="name of the checkpoint, instead of the recipe's")
    p.add_argument("--start", default=None, help="checkpoint or model card to start from")
    p.add_argument("--steps", type=int, default=None)
    p.add_argument("--seed", type=int, default=None)
    p.add_argument("--fold", default=None, help="K/N: leave out every N-th subject from the K-th")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit code."""
    options = parser().parse_args(argv)
    import torch

    from tlseg_bids.errors import TlsegError
    from tlseg_bids.train.loop import train
    from tlseg_bids.train.recipe import load_recipe

    overrides = {
        key: getattr(options, key)
        for key in ("name", "start", "steps", "seed")
        if getattr(options, key) is not None
    }
    if options.fold:
        overrides["fold"] = [int(part) for part in options.fold.split("/")]
    try:
        recipe = load_recipe(options.recipe, overrides)
        torch.set_num_threads(options.threads)
        print(train(recipe, options.data, options.out, device=options.device))
    except TlsegError as error:
        print(f"tlseg-train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
