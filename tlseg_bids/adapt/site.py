"""Site adaptation from end to end: ``tlseg … participant --fine-tune``.

labels → inspect → choose → folds → final run → judge → record. Everything that takes time is kept
in a work folder named after the content key, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from tlseg_bids import __version__
from tlseg_bids.adapt.choose import AUTO
from tlseg_bids.adapt.corrected import corrected_only
from tlseg_bids.adapt.earlier import check_own
from tlseg_bids.adapt.inspect import Answer
from tlseg_bids.adapt.labels import Collected, collect
from tlseg_bids.adapt.matching import Matched, Refused, match, without
from tlseg_bids.adapt.record import CARD, NOT_KEPT, dataset_name, finished, site_licences
from tlseg_bids.adapt.work import Asked, Work
from tlseg_bids.bids.atomic import settle
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.lock import hold
from tlseg_bids.config import Config
from tlseg_bids.errors import DataError, UsageError, listed, one_line
from tlseg_bids.flow import Job
from tlseg_bids.plan import facts, make_plan
from tlseg_bids.runner import Progress
from tlseg_bids.train.adaptation import load_adaptation, presets
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import digest
from tlseg_bids.zoo.registry import find_card, load_cards

LOG = logging.getLogger(__name__)


def fine_tune(config: Config, answer: Answer, progress: Progress) -> int:
    """Adapt a model to the labelled scans.

    Parameters
    ----------
    config : Config
        With `fine_tune` and `labels_dir`.
    answer : callable
        How the program labels a scan.
    progress : Progress
        Told of every scan that is looked at and every run.

    Returns
    -------
    int
        0 if it ended, whether or not the child is kept; 1 if a labelled scan could not be used.

    Raises
    ------
    TlsegError
        If there is nothing to learn from, or the model cannot be adapted.
    """
    scans, unusable = discover(config)
    for one in unusable:
        LOG.warning("%s: %s – %s", one.scan.path.name, one.reason, one.hint)
    matched = match(config.labels_dir, scans, unusable)
    for note in matched.notes:
        LOG.warning("%s", note)
    jobs, matched = base_jobs(config, matched)
    card = jobs[0].card
    protocol = card.protocol_of(card.protocol)
    collected = collect(matched, protocol, _new_head(config))
    collected = corrected_only(collected, config.out_dir, keep=not config.dry_run)
    if config.dry_run:
        print(describe(config, card, collected), end="")
        return 0
    _tell(collected.refused)
    if collected.unlabelled:
        LOG.warning("without labels, and skipped: %s", listed(collected.unlabelled))
    folder = config.out_dir / "models" / config.site
    key = content_key(config, card, collected)
    with hold(folder.parent / f".{config.site}.lock", f"model '{config.site}' is being adapted"):
        settle(folder)
        record = finished(folder, key)
        if record is None:
            kept = (config.work_dir or folder.parent / ".work") / f"{config.site}-{key[:16]}"
            asked = Asked(config, tuple(jobs), collected, key)
            record = Work(asked, answer, progress, kept).adapt(folder)
            shutil.rmtree(kept, ignore_errors=True)
        else:
            LOG.info("the same inputs gave %s before; it is reused", folder)
    wrong = found_wrong(record, collected)
    _tell(wrong)
    place = folder if record["Kept"] or not (folder / CARD).is_file() else folder / NOT_KEPT
    print(f"{config.site}: {record['Reason']}\n{place}")
    return int(bool(collected.refused or wrong))


def base_jobs(config: Config, matched: Matched) -> tuple[list[Job], Matched]:
    """A job with the base model for every labelled scan, and the matches without those skipped.

    The base is ``--base``, else the model that the plan takes for most of the labelled scans; an
    earlier adaptation of the same name is never its own base.

    Raises
    ------
    UsageError
        If there is no such model, or it wants several images of a person; if the name belongs to a
        model that no adaptation wrote.
    DataError
        If no scan with labels can be read.
    """
    known = load_cards(config.model_dirs, config.out_dir)
    cards = [card for card in known if card.name != config.site]
    if config.site in {c.name for c in load_cards(config.model_dirs)}:
        raise UsageError(
            f"a model named '{config.site}' is there already", "--name", "choose another name"
        )
    check_own(config.out_dir / "models" / config.site, known)
    scans = [scan for scan, _ in matched.pairs]
    if config.base is None:
        plan = make_plan(scans, (), cards, config, __version__)
        found = Counter(job.card.name for job in plan.jobs).most_common(1)
        name = found[0][0] if found else cards[0].name
    else:
        name = find_card(cards, config.base, "--base").name
    plan = make_plan(scans, (), cards, replace(config, model=name), __version__)
    if not plan.jobs:
        why = "; ".join(f"{skip.scan.path.name}: {skip.reason}" for skip in plan.skips[:3])
        why = why or "; ".join(f"{one.name}: {one.what}" for one in matched.refused[:3])
        raise DataError(
            f"no labelled scan can be used; {why}", f"--labels {config.labels_dir}",
            "correct the first of these, then start again",
        )  # fmt: skip
    card = plan.jobs[0].card
    if card.channels:
        raise UsageError(
            f"model '{card.name}' wants {' and '.join(card.channels)} of a person together, and "
            "such models cannot be adapted", "--base", "name a model of one image",
        )  # fmt: skip
    return list(plan.jobs), without(matched, plan.skips)


def content_key(config: Config, card: ModelCard, collected: Collected) -> str:
    """SHA-256 over everything that an adaptation and its card depend on.

    That is: scans with what the dataset says of them, labels and what they mean, names and licences
    of the datasets, base, recipe, budget, seed, the model's name and the program's version.
    """
    asked = config.fine_tune or AUTO
    recipe = asked if asked in (AUTO, *presets()) else asdict(load_adaptation(asked))
    parts = {
        "scans": [
            (one.name, one.sha256, one.group.tolist(), facts(one.scan))
            for one in sorted(collected.usable, key=lambda one: one.name)
        ],
        "datasets": [site_licences(collected.usable), dataset_name(collected.usable, config.site)],
        "pairs": sorted(collected.reading.pairs.items()),
        "protocol": collected.reading.target.table.to_csv(),
        "card": digest(card),
        "recipe": recipe,
        "budget": config.budget_minutes,
        "seed": config.random_seed,
        "site": config.site,
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def found_wrong(record: dict[str, Any], collected: Collected) -> list[Refused]:
    """Labels that can be read and that the record's look at the scans found to be wrong.

    A record is reused where the usable labels are the same; others may have come or gone since.
    """
    looked_at = {one.name for one in collected.usable}
    seen = [Refused(one["Name"], one["What"], one["Hint"]) for one in record["Refused"]]
    return [one for one in seen if one.name in looked_at]


def _tell(refused: Iterable[Refused]) -> None:
    for one in refused:
        LOG.warning("%s: %s – %s", one.name, one.what, one.hint)


def describe(config: Config, card: ModelCard, collected: Collected) -> str:
    """What would be done, for ``--dry-run``."""
    lines = [f"base     {card.name} {card.version}", f"recipe   {config.fine_tune}"]
    lines += [f"labels   {note}" for note in collected.reading.notes]
    for one in collected.usable:
        lines += [f"{one.name}: {one.file.name}", *(f"  {note}" for note in one.notes)]
    lines += [f"{one.name}: {one.what} – {one.hint}" for one in collected.refused]
    lines += [f"{name}: no labels; skipped" for name in collected.unlabelled]
    return "\n".join(one_line(line) for text in lines for line in text.split("\n")) + "\n"


def _new_head(config: Config) -> bool:
    asked = config.fine_tune or AUTO
    return asked != AUTO and load_adaptation(asked).head == "new"
