"""What has to be told where different models labelled the scans of one stratum.

Two models give different volumes of one and the same scan, so a difference between scans that
different models labelled is not one between brains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tlseg_bids.errors import listed
from tlseg_bids.group.study import Row
from tlseg_bids.report.derivatives import SAME
from tlseg_bids.report.provenance import model_names

MOST_LABELS = 8


def notes_on_models(rows: Sequence[Row], numbers: Sequence[int]) -> list[str]:
    """Sentences on the rows `numbers` of one stratum; none if one model labelled all of them."""
    members = [rows[n] for n in numbers]
    counts = Counter(row.model for row in members)
    if len(counts) < 2:
        return []
    names = model_names(counts)
    shown = listed(f"{name}: {counts[model]}" for model, name in names.items())
    return [
        *_mixed(members, names),
        f"different models labelled the scans ({shown}), and their volumes differ in one and the "
        "same brain: outliers, and ComBat and the correction for head size where asked for, are of "
        "all these scans together; compare groups within one value of the columns 'model' and "
        f"'model_version', or label all scans with one model ({_command('')})",
    ]  # fmt: skip


def _mixed(members: Sequence[Row], names: dict[tuple[str, str, str], str]) -> list[str]:
    """A sentence on the participants whose comparable scans have different models."""
    models: dict[tuple[str, ...], set[tuple[str, str, str]]] = {}
    for row in members:
        key = (row.participant, *(row.entities.get(name, "") for name in SAME))
        models.setdefault(key, set()).add(row.model)
    mixed = {key[0]: None for key, several in models.items() if len(several) > 1}
    if not mixed:
        return []
    used = set().union(*(several for several in models.values() if len(several) > 1))
    shown = listed(name for model, name in names.items() if model in used)
    few = len(mixed) <= MOST_LABELS
    which = f"--participant-label {' '.join(mixed)} " if few else ""
    return [
        f"different models labelled the scans of {listed(f'sub-{label}' for label in mixed)} "
        f"({shown}): no change and no agreement is computed between scans of different models; for "
        "these, label all scans of a participant with one model that is made for all of them "
        f"({_command(which)}; tlseg-zoo list names the models)"
    ]


def _command(which: str) -> str:
    return f"tlseg BIDS_DIR OUT_DIR participant {which}--model NAME"
