"""``tlseg-zoo``: which models there are, and whether their weights are here and whole."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tlseg_bids.cli.options import Parser, absolute
from tlseg_bids.cli.run import report
from tlseg_bids.errors import TlsegError

if TYPE_CHECKING:
    from tlseg_bids.zoo.card import ModelCard

MIB = 2**20
HEADINGS = ("name", "version", "status", "for", "protocol", "licence", "MiB", "weights")


def main(argv: list[str] | None = None) -> int:
    """Run ``tlseg-zoo``.

    Parameters
    ----------
    argv : list of str, optional
        The command line without the program's name.

    Returns
    -------
    int
        0, or the exit code of the error; of several damaged models, that of the last.
    """
    try:
        given = parser().parse_args(sys.argv[1:] if argv is None else list(argv))
        from tlseg_bids.zoo.registry import load_cards

        return given.run(load_cards(given.models), given)
    except SystemExit as stop:
        return int(stop.code or 0)
    except TlsegError as error:
        return report(error, "tlseg-zoo")


def parser() -> Parser:
    """The parser of ``tlseg-zoo``."""
    it = Parser(prog="tlseg-zoo", description="Models: what there is, whole or not, and fetching.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--models", nargs="+", type=absolute, default=[], metavar="DIR",
        help="folders with further models, OUT_DIR/models for example",
    )  # fmt: skip
    commands = it.add_subparsers(required=True, metavar="{list,show,verify,fetch}")
    for name, run, text in (
        ("list", list_models, "a line per model"),
        ("show", show_model, "the card of one model"),
        (
            "verify",
            verify_models,
            "check cards, sizes, hashes and networks; without NAME of every model",
        ),
        ("fetch", fetch_model, "download weights into the cache and check them"),
    ):
        command = commands.add_parser(name, help=text, description=text, parents=[shared])
        if name != "list":
            command.add_argument("name", metavar="NAME", nargs="?" if name == "verify" else None)
        command.set_defaults(run=run)
    return it


def list_models(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:  # noqa: ARG001
    """Print a table of the models, the preferred first."""
    from tlseg_bids.zoo.registry import ranked

    rows = [HEADINGS] + [_row(card) for card in ranked(cards)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def show_model(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:
    """Print one card as TOML, and where it and its weights are."""
    from tlseg_bids.zoo.card_file import to_toml
    from tlseg_bids.zoo.registry import find_card
    from tlseg_bids.zoo.weights import local_file

    card = find_card(cards, given.name, "NAME")
    print(f"# card     {card.path}")
    print(f"# weights  {local_file(card) or 'not on this machine'}")
    print(to_toml(card), end="")
    return 0


def verify_models(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:
    """Check the weights of one model, or of every model, and that its networks take them."""
    from tlseg_bids.segment.model import load_model
    from tlseg_bids.zoo.registry import find_card
    from tlseg_bids.zoo.weights import load_weights, verify

    code = 0
    for card in [find_card(cards, given.name, "NAME")] if given.name else cards:
        try:
            path = verify(card)
            load_model(card, load_weights(card, offline=True))
        except TlsegError as error:
            code = report(error, f"tlseg-zoo: {card.name}")
        else:
            print(f"{card.name} {card.version}: whole, {path}")
    return code


def fetch_model(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:
    """Fetch the weights of one model, unless they are here and whole."""
    from tlseg_bids.zoo.registry import find_card
    from tlseg_bids.zoo.weights import fetch, local_file, verify

    card = find_card(cards, given.name, "NAME")
    path = fetch(card) if card.weights.url and not _beside(card) else verify(card)
    print(f"{card.name} {card.version}: whole, {path if path else local_file(card)}")
    return 0


def _beside(card: ModelCard) -> bool:
    """Whether the weights lie beside the card, so that there is nothing to fetch."""
    from tlseg_bids.zoo.weights import cached_file, local_file

    return local_file(card) not in (None, cached_file(card))


def _row(card: ModelCard) -> tuple[str, ...]:
    from tlseg_bids.zoo.weights import cached_file, local_file

    path = local_file(card)
    where = "to be fetched" if card.weights.url else "missing"
    if path is not None:
        where = "fetched" if path == cached_file(card) else "here"
    return (
        card.name, card.version, card.status, _domain(card), card.protocol, card.weights.licence,
        f"{card.weights.bytes / MIB:.1f}", where,
    )  # fmt: skip


def _domain(card: ModelCard) -> str:
    """The domain in a few words."""
    domain = card.domain
    words = ["/".join(domain.suffixes) or "any suffix"]
    if domain.age_years is not None:
        words.append(f"{domain.age_years[0]:g}–{domain.age_years[1]:g} y")
    if domain.skull_stripped is not None:
        words.append("skull-stripped" if domain.skull_stripped else "whole head")
    if domain.contrast_agent is not None:
        words.append("with contrast agent" if domain.contrast_agent else "without contrast agent")
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main())
