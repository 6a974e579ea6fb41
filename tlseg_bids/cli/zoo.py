"""``tlseg-zoo``: which models there are, and whether their weights are here and whole."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from tlseg_bids.cli.options import Parser
from tlseg_bids.cli.run import report, until_closed
from tlseg_bids.cli.values import absolute
from tlseg_bids.errors import TlsegError

if TYPE_CHECKING:
    from tlseg_bids.zoo.card import ModelCard

MIB = 2**20
HEADINGS = ("name", "version", "status", "for", "labels", "licence", "MiB", "weights", "measured")


@until_closed
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
    commands = it.add_subparsers(required=True, metavar="{list,show,verify,fetch,export,import}")
    for name, run, text in (
        ("list", list_models, "domain, labels, licence, size and evidence of every model"),
        ("show", show_model, "the card of one model"),
        (
            "verify",
            verify_models,
            "check sizes, hashes, heads and stored answers; without NAME of every model",
        ),
        ("fetch", fetch_model, "download weights into the cache and check them"),
    ):
        command = commands.add_parser(name, help=text, description=text, parents=[shared])
        if name == "list":
            command.add_argument("--json", action="store_true", help="print JSON instead")
        elif name == "fetch":
            text = "only look whether they are here and whole"
            command.add_argument("--offline", action="store_true", help=text)
        if name != "list":
            command.add_argument("name", metavar="NAME", nargs="?" if name == "verify" else None)
        command.set_defaults(run=run)
    _exchange(commands, shared)
    return it


def _exchange(commands: argparse._SubParsersAction, shared: argparse.ArgumentParser) -> None:
    """The commands that take a model from one machine to another."""
    text = "write a model to one file (zip)"
    command = commands.add_parser("export", help=text, description=text, parents=[shared])
    command.add_argument("name", metavar="NAME")
    command.add_argument("file", type=absolute, metavar="FILE", help="a file, or a folder")
    command.set_defaults(run=export_one)
    text = "install a model from such a file, after checking everything in it"
    command = commands.add_parser("import", help=text, description=text, parents=[shared])
    command.add_argument("file", type=absolute, metavar="FILE")
    command.add_argument(
        "--to", type=absolute, required=True, metavar="DIR",
        help="folder of models: OUT_DIR/models, or one that --models will name",
    )  # fmt: skip
    command.set_defaults(run=import_one)


def export_one(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:
    """Write one model to a file."""
    from tlseg_bids.zoo.bundle import export_model
    from tlseg_bids.zoo.registry import find_card

    card = find_card(cards, given.name, "NAME")
    print(f"{card.name} {card.version}: {export_model(card, given.file)}")
    return 0


def import_one(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:  # noqa: ARG001
    """Install a model from a file."""
    from tlseg_bids.zoo.bundle import import_model

    card = import_model(given.file, given.to)
    print(f"{card.name} {card.version}: whole, {card.path}")
    return 0


def list_models(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:
    """Print a table of the models, or JSON, the preferred first."""
    from tlseg_bids.zoo.registry import ranked

    if given.json:
        print(json.dumps([_record(card) for card in ranked(cards)], indent=2, ensure_ascii=False))
        return 0
    blocks = [[HEADINGS]] + [_rows(card) for card in ranked(cards)]
    rows = [row for block in blocks for row in block]
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
    """Check size, hash, heads and stored answers of one model, or of every model."""
    from tlseg_bids.zoo.registry import find_card

    code = 0
    for card in [find_card(cards, given.name, "NAME")] if given.name else cards:
        try:
            said = _verified(card)
        except TlsegError as error:
            code = report(error, f"tlseg-zoo: {card.name}")
        else:
            print(f"{card.name} {card.version}: {said}")
    return code


def _verified(card: ModelCard) -> str:
    """What was checked of a model; raises where something is wrong."""
    from tlseg_bids.zoo.assemble import assemble, precision
    from tlseg_bids.zoo.proof import check_proof, has_proof
    from tlseg_bids.zoo.weights import load_weights, verify

    path = verify(card)
    tensors = load_weights(card, offline=True)
    said = f"whole, {path}\n  {precision(card, tensors)}, heads {', '.join(card.heads)}"
    for name in sorted(set(card.own_tables) - set(card.tables)):
        said += f"; the card holds no hash of the table of '{name}', so it cannot be checked"
    if not has_proof(tensors):
        assemble(card, tensors)
        return f"{said}; there is no stored answer to compare with"
    worst = max(check_proof(card, tensors).values())
    return f"{said}; answers as stored (within {worst:.4f} of a logit)"


def fetch_model(cards: tuple[ModelCard, ...], given: argparse.Namespace) -> int:
    """Fetch the weights of one model, unless they are here and whole."""
    from tlseg_bids.zoo.registry import find_card
    from tlseg_bids.zoo.weights import fetch, local_file, verify

    card = find_card(cards, given.name, "NAME")
    to_fetch = card.weights.url and not _beside(card)
    path = fetch(card, given.offline) if to_fetch else verify(card)
    print(f"{card.name} {card.version}: whole, {path if path else local_file(card)}")
    return 0


def _beside(card: ModelCard) -> bool:
    """Whether the weights lie beside the card, so that there is nothing to fetch."""
    from tlseg_bids.zoo.weights import cached_file, local_file

    return local_file(card) not in (None, cached_file(card))


def _where(card: ModelCard) -> str:
    """Whether the weights are here."""
    from tlseg_bids.zoo.weights import cached_file, local_file

    path = local_file(card)
    if path is None:
        return "to be fetched" if card.weights.url else "missing"
    return "fetched" if path == cached_file(card) else "here"


def _rows(card: ModelCard) -> list[tuple[str, ...]]:
    """The lines of a model in the table: one for each row of evidence, or one."""
    from tlseg_bids.zoo.page import domain_text

    measured = [_evidence(row) for row in card.evidence] or ["nothing"]
    first = (
        card.name, card.version, card.status, domain_text(card), "+".join(card.heads),
        card.weights.licence, f"{card.weights.bytes / MIB:.1f}", _where(card),
    )  # fmt: skip
    rest = ("",) * len(first)
    return [(*(rest if n else first), text) for n, text in enumerate(measured)]


def _evidence(row: dict[str, Any]) -> str:
    """A row of evidence in a few words."""
    on = " ".join(["/".join(row.get("suffixes", ())), row["dataset"]]).strip()
    over = f" ({row['structures']})" if "structures" in row else ""
    return f"{on}: {row['metric']}{over} {row['mean']:.3f} ± {row['sd']:.3f}, n = {row['n']}"


def _record(card: ModelCard) -> dict[str, Any]:
    """A model as JSON: what the table shows, in full."""
    from dataclasses import asdict

    return {
        "name": card.name, "version": card.version, "status": card.status,
        "summary": card.summary, "domain": asdict(card.domain), "heads": list(card.heads),
        "channels": list(card.channels), "parent": card.parent,
        "licence": card.weights.licence, "permissive": card.permissive,
        "bytes": card.weights.bytes, "sha256": card.weights.sha256, "weights": _where(card),
        "card": str(card.path), "evidence": list(card.evidence),
        "known_failures": list(card.known_failures), "citations": list(card.citations),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
