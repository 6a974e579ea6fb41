"""A model's page in Markdown, written from its card alone."""

from __future__ import annotations

from typing import Any

from tlseg_bids.errors import amount
from tlseg_bids.zoo.card import ModelCard, age_text
from tlseg_bids.zoo.licence import is_permissive

MIB = 2**20
SECONDS_PER_HOUR = 3600
BARS = "▁▂▃▄▅▆▇█"


def domain_text(card: ModelCard) -> str:
    """The domain in a few words, for a table."""
    domain = card.domain
    words = ["+".join(card.channels) or "/".join(domain.suffixes) or "any suffix"]
    if domain.age_years is not None:
        words.append(f"{domain.age_years[0]:g}–{domain.age_years[1]:g} y")
    if domain.skull_stripped is not None:
        words.append("skull-stripped" if domain.skull_stripped else "whole head")
    if domain.contrast_agent is not None:
        words.append("with contrast agent" if domain.contrast_agent else "without contrast agent")
    if domain.voxel_mm is not None:
        words.append(f"{domain.voxel_mm[0]:g}–{domain.voxel_mm[1]:g} mm")
    return ", ".join(words)


def page(card: ModelCard, picture: str | None = None, caption: str = "") -> str:
    """The page of a model.

    Parameters
    ----------
    card : ModelCard
        The model.
    picture : str, optional
        Path of a picture of its work, relative to the page.
    caption : str
        What the picture shows; its alternative text, too.

    Returns
    -------
    str
        Markdown. The same card gives the same text.
    """
    parts = [
        f"# {card.name}\n\n{_text(card.summary)}",
        _facts(card),
        "" if picture is None else f"![{_text(caption)}]({picture})\n\n*{_text(caption)}*",
        f"## For which scans\n\n{_domain(card)}",
        f"## Evidence\n\n{_evidence(card)}",
        f"## Known failures\n\n{_bullets(card.known_failures) or 'None is written down.'}",
        f"## Training\n\n{_training(card)}",
        f"## Licence\n\n{_licence(card)}",
        f"## How to cite\n\n{_citations(card)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def index(cards: list[ModelCard]) -> str:
    """The list of all pages."""
    rows = [
        (f"[{card.name}]({card.name}.md)", card.version, domain_text(card),
         ", ".join(card.heads), card.weights.licence, f"{card.weights.bytes / MIB:.1f}")
        for card in cards
    ]  # fmt: skip
    table = _table(("model", "version", "for", "labels", "licence", "MiB"), rows)
    return (
        "# Models\n\nA page for each model of the package, written from its card by "
        "`python docs/models/make.py`. `tlseg-zoo list` prints the same with the evidence, "
        "[cards.md](../cards.md) says what a card is and how a scan gets its model.\n\n"
        f"{table}\n"
    )


def _facts(card: ModelCard) -> str:
    heads = []
    for name in card.heads:
        structures = amount(len(card.protocol_of(name)) - 1, "structure")
        heads.append(f"`{name}` ({structures})")
    rows = [
        ("version", f"{card.version}, {card.status}"),
        ("labels", ", ".join(heads)),
        ("image channels", " and ".join(card.channels) or "one"),
        ("adapted from", f"`{card.parent}`" if card.parent else "nothing"),
        ("weights", f"{card.weights.bytes / MIB:.1f} MiB, SHA-256 `{card.weights.sha256}`"),
        ("memory", f"{card.memory.host_gib:g} GiB and {card.memory.host_bytes_per_voxel:g} bytes "
                   f"per voxel of the scan; {card.memory.device_gib:g} GiB on a GPU"),
    ]  # fmt: skip
    return _table(("", ""), rows)


def _domain(card: ModelCard) -> str:
    domain = card.domain
    told = [f"Suffix: {' or '.join(domain.suffixes) or 'any'}."]
    if card.channels:
        told.append(f"It sees {' and '.join(card.channels)} of one visit together.")
    if domain.age_years is None:
        told.append("Any age, also where the age is not known.")
    else:
        low, high = (age_text(years) for years in domain.age_years)
        told.append(f"Ages from {low} to {high}; a scan of unknown age is refused.")
    agent = {None: "Before or after contrast agent.", True: "After contrast agent only.",
             False: "Without contrast agent only."}[domain.contrast_agent]  # fmt: skip
    told.append(agent)
    if domain.agents:
        told.append(f"Contrast agents whose name begins with {', '.join(domain.agents)}.")
    skull = {None: "Whole heads and brains alone.", True: "Skull-stripped scans only.",
             False: "Whole heads only."}[domain.skull_stripped]  # fmt: skip
    told.append(skull)
    if domain.voxel_mm is not None:
        told.append(f"Voxel edges from {domain.voxel_mm[0]:g} to {domain.voxel_mm[1]:g} mm.")
    return _bullets(told)


def _evidence(card: ModelCard) -> str:
    if not card.evidence:
        return "Nothing was measured."
    rows = [
        (row["dataset"], ", ".join(row.get("suffixes", ())) or "–", _years(row), str(row["n"]),
         row["metric"], row.get("structures", "–"), f"{row['mean']:.3f} ± {row['sd']:.3f}",
         row["how"])
        for row in card.evidence
    ]  # fmt: skip
    return _table(("dataset", "scans", "years", "n", "metric", "over", "mean ± sd", "how"), rows)


def _years(row: dict[str, Any]) -> str:
    limits = row.get("age_years")
    return "–" if limits is None else f"{limits[0]:g}–{limits[1]:g}"


def _training(card: ModelCard) -> str:
    parts = []
    data = [row for row in card.training.get("data", ()) if isinstance(row, dict)]
    if data:
        rows = []
        for row in data:
            subjects = row.get("subjects", ())
            rows.append(
                (str(row.get("dataset", "?")), str(row.get("licence", "?")), str(len(subjects)))
            )
        parts.append(_table(("dataset", "licence", "subjects"), rows))
        total = sum(len(row.get("subjects", ())) for row in data)
        whose = "the one subject" if total == 1 else f"each of the {total} subjects"
        parts.append(f"The card holds the SHA-256 of the files of {whose}.")
    for role in card.networks:
        if isinstance(run := card.training.get(role), dict):
            parts.append(f"### {role.capitalize()}\n\n{_run(card, role, run)}")
    return "\n\n".join(parts) or "The card says nothing of it."


def _run(card: ModelCard, role: str, run: dict[str, Any]) -> str:
    network = {k: v for k, v in card.networks[role].items() if k != "network"}
    told = ", ".join(f"{key} = {value}" for key, value in network.items())
    rows = [("network", f"{card.networks[role]['network']} ({told})")]
    rows += [(key.replace("_", " "), str(run[key])) for key in ("recipe", "seed", "steps", "code")
             if key in run]  # fmt: skip
    if run.get("started_from"):
        rows.append(("started from", ", ".join(map(str, run["started_from"]))))
    if "seconds" in run:
        rows.append(("time", f"{run['seconds'] / SECONDS_PER_HOUR:.1f} hours"))
    for key, name in (("curve_loss", "loss"), ("curve_soft_dice", "soft Dice in training")):
        if values := run.get(key):
            rows.append((name, f"{_spark(values)} from {values[0]:g} to {values[-1]:g}"))
    return _table(("", ""), rows)


def _spark(values: list[float]) -> str:
    """A curve as a row of bars, between its least and its greatest value."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / ((high - low) or 1)
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _licence(card: ModelCard) -> str:
    told = [f"**{card.weights.licence}**"]
    data = [row for row in card.training.get("data", ()) if isinstance(row, dict)]
    if data:
        told.append(
            "The weights carry the licences of the data that they were trained with: "
            + "; ".join(f"{row.get('dataset', '?')}: {row.get('licence', '?')}" for row in data)
            + "."
        )
    if card.permissive:
        told.append("Every use is allowed; `--licence permissive` admits this model.")
    else:
        why = card.restrictions or (card.weights.licence,)
        bound = [str(row.get("dataset", "?")) for row in data
                 if not is_permissive(str(row.get("licence", "")))]  # fmt: skip
        because = f" because of {' and '.join(bound)}" if bound else ""
        told.append(
            f"Not every use is allowed{because} ({'; '.join(why)}); `--licence permissive` leaves "
            "this model out."
        )
    return "\n\n".join(told)


def _citations(card: ModelCard) -> str:
    links = [f"<{c}>" if "://" in c else f"<https://doi.org/{c}>" for c in card.citations]
    told = "Name the model with its version and the hash of its weights, and cite:"
    return f"{told}\n\n{_bullets(links)}"


def _bullets(lines: list[str] | tuple[str, ...]) -> str:
    return "\n".join(f"- {line if line.startswith('<http') else _text(line)}" for line in lines)


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """One line, without what Markdown would take for HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
