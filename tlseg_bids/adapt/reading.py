"""What a site's labels mean to a model: which protocol they are in, and the way to its channels.

Four cases. The labels are in the model's protocol; in one that a shipped mapping leads to the
model's (finer labels); in one that a shipped mapping leads to from the model's (coarser labels:
several channels of the model are one structure there); or in a protocol of the site's own, which
its look-up table names and for which the model gets a new head.

Structures of the model that no label image of the site shows are taken as not labelled: they are
merged into the background, so that the loss asks nothing of the model about them.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from tlseg_bids.errors import DataError, amount, listed
from tlseg_bids.labels.mapping import LEFT_OUT, known_mappings, load_mapping
from tlseg_bids.labels.protocol import LabelProtocol, known_protocols, load_protocol
from tlseg_bids.labels.sides import mirrored_name, side_of, unpaired, without_side

IGNORE = 255
"""Channel of voxels of which nothing is known, as in `tlseg_bids.train.dataset`."""

MOST_STRUCTURES = 254
STRAY_SHARE = 0.01
AGREEING_NAMES = 0.5
BACKGROUND = "Background"


@dataclass(frozen=True, eq=False)
class Reading:
    """How the labels of a site are read into the channels that a model is trained on.

    Parameters
    ----------
    source : LabelProtocol
        What the labels are written in.
    target : LabelProtocol
        Rows are the channels: the model's protocol, or the site's own.
    pairs : dict
        Label to channel, `IGNORE` where nobody can say what the voxel is.
    group : ndarray of int, shape (channels,)
        The channel that each channel is merged into (partial labels); itself where it is told
        apart.
    new_head : bool
        Whether `target` is not the model's protocol, so that the model needs a new head.
    notes : tuple of str
        Sentences for the report: what is merged, left out or ignored.
    unmerged : ndarray of int, shape (channels,), or None
        `group` before the structures that no label image shows were merged into the background;
        None where it is the same.
    """

    source: LabelProtocol
    target: LabelProtocol
    pairs: dict[int, int]
    group: np.ndarray
    notes: tuple[str, ...] = ()
    new_head: bool = False
    unmerged: np.ndarray | None = None

    def channels(self, labels: np.ndarray) -> np.ndarray:
        """Channels uint8 of an array of labels, `IGNORE` for labels that are in no table.

        Negative labels are background.
        """
        table = np.full(int(labels.max(initial=0)) + 1, IGNORE, np.uint8)
        for label, channel in self.pairs.items():
            if 0 <= label < len(table):
                table[label] = channel
        return table[np.maximum(labels, 0)]

    def labelled(self) -> np.ndarray:
        """Channels of the structures that the labels tell apart, background left out."""
        alone = np.flatnonzero(self.group == np.arange(len(self.group)))
        return alone[alone > 0]

    @property
    def mirrored(self) -> bool:
        """Whether the labels hold in the mirror: every structure of a side has its partner."""
        return not unpaired(self.target.table)

    def indices(self, channels: np.ndarray) -> np.ndarray:
        """Labels of `target`, int16, of an array of channels; `IGNORE` becomes background."""
        table = np.zeros(256, np.int16)
        table[: len(self.target)] = self.target.indices
        return table[channels]


def read_as(
    voxels: Mapping[int, int],
    names: Mapping[int, str] | None,
    seg: str,
    model: LabelProtocol,
    new_head: bool = False,
) -> Reading:
    """Decide what the labels are.

    Parameters
    ----------
    voxels : mapping
        Every label that occurs in the site's label images, and how many voxels have it.
    names : mapping or None
        Index to name as the look-up table says; None where there is no table.
    seg : str
        Value of the entity ``seg`` of the label images, "" where they have none.
    model : LabelProtocol
        The model's protocol.
    new_head : bool
        Keep a known protocol that is not the model's as it is, instead of mapping it.

    Returns
    -------
    Reading
        Of the known protocols whose names agree with the table, the one that leaves the fewest
        voxels without a meaning is taken, if these are at most `STRAY_SHARE`; else the labels are
        the site's own.

    Raises
    ------
    DataError
        If nothing says what the labels mean, or the site's own protocol is none.
    """
    found = {label: count for label, count in voxels.items() if label != 0 and count}
    if not found:
        raise DataError("no label image shows any structure", "--labels", "label some voxels")
    best: tuple[float, LabelProtocol] | None = None
    for name in _candidates(seg, model.name):
        protocol = model if name == model.name else load_protocol(name)
        if not _names_agree(protocol, found, names, seg):
            continue
        stray = _stray_share(protocol, found)
        if stray <= STRAY_SHARE and (best is None or stray < best[0]):
            best = (stray, protocol)
    if best is None:
        return _own(found, names, seg, model.name)
    if new_head and best[1].name != model.name:
        return _kept(best[1], found)
    return _known(best[1], model, found)


def own_protocol(name: str, names: Mapping[int, str], indices: Iterable[int]) -> LabelProtocol:
    """A label protocol from a look-up table: sides, partners, abbreviations and colours are made.

    Parameters
    ----------
    name : str
        Value of the entity ``seg``.
    names : mapping
        Index to name.
    indices : iterable of int
        The structures that are wanted, in any order; 0 is added.
    """
    wanted = sorted(set(indices) - {0})
    if len(wanted) > MOST_STRUCTURES:
        raise DataError(
            f"the labels name {len(wanted)} structures, and a model can learn "
            f"{MOST_STRUCTURES}", "--labels", "merge structures, or leave some out",
        )  # fmt: skip
    rows = {index: names[index] for index in wanted}
    by_name = {_plain(text): index for index, text in rows.items()}
    table = [(0, BACKGROUND, "BG", "#000000", "none", 0, "background", 0)]
    partners = {
        index: by_name.get(_plain(mirrored_name(text)), index) for index, text in rows.items()
    }
    for number, (index, text) in enumerate(rows.items()):
        side, partner = side_of(text), partners[index]
        if partner == index or partners[partner] != index:
            side, partner = "none", index
        red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.65, 0.95)
        colour = "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
        table.append((index, text, _short(text), colour, side, partner, "other", 0))
    columns = [
        "index", "name", "abbreviation", "color", "hemisphere", "mirror", "group", "subcortical14",
    ]  # fmt: skip
    return LabelProtocol(name, pd.DataFrame(table, columns=columns))


def _candidates(seg: str, model: str) -> list[str]:
    """Known protocols that could be meant: named, the model's, and those a mapping connects."""
    known, mappings = known_protocols(), known_mappings()
    connected = [n for n in known if {f"{n}_to_{model}", f"{model}_to_{n}"} & set(mappings)]
    order = [n for n in (seg, model) if n == model or n in connected]
    return list(dict.fromkeys([*order, *connected]))


def _names_agree(
    protocol: LabelProtocol, found: Mapping[int, int], names: Mapping[int, str] | None, seg: str
) -> bool:
    """Whether index and name of the table are mostly those of the protocol."""
    own = dict(zip(protocol.indices.astype(int), protocol.table["name"], strict=True))
    if names is None:
        return seg in ("", protocol.name)
    both = [(own[label], names[label]) for label in found if label in own and label in names]
    same = sum(_alike(one, other) for one, other in both)
    return bool(both) and same >= AGREEING_NAMES * len(both)


def _stray_share(protocol: LabelProtocol, found: Mapping[int, int]) -> float:
    known = set(map(int, protocol.indices))
    return sum(n for label, n in found.items() if label not in known) / sum(found.values())


def _known(source: LabelProtocol, model: LabelProtocol, found: Mapping[int, int]) -> Reading:
    """Labels in the model's protocol, or in one that a mapping connects with it."""
    channel = {int(label): c for c, label in enumerate(model.indices)}
    group = np.arange(len(model))
    notes = [f"The labels are read as protocol '{source.name}'."]
    if source.name == model.name:
        pairs = dict(channel)
    elif f"{source.name}_to_{model.name}" in known_mappings():
        mapping = load_mapping(f"{source.name}_to_{model.name}")
        pairs = {s: IGNORE if t == LEFT_OUT else channel[t] for s, t in mapping.pairs.items()}
        notes += mapping.describe()
    else:
        mapping = load_mapping(f"{model.name}_to_{source.name}")
        pairs = dict.fromkeys(mapping.unreached, IGNORE)
        for target in set(mapping.pairs.values()) - {LEFT_OUT}:
            members = [s for s, t in mapping.pairs.items() if t == target]
            first = channel[target if target in members else members[0]]
            pairs[target] = first
            group[[channel[s] for s in members]] = first
        group[[channel[s] for s in mapping.left_out]] = 0
        notes += mapping.describe()
    notes += _told_alone(model)
    stray = sorted(set(found) - set(pairs))
    pairs |= dict.fromkeys(stray, IGNORE)
    if stray:
        notes.append(f"Labels {listed(stray)} are not in that protocol and count as unknown.")
    return _partial(Reading(source, model, pairs, group, tuple(notes)), found)


def _kept(source: LabelProtocol, found: Mapping[int, int]) -> Reading:
    """Labels in a known protocol, which the model gets a new head for."""
    pairs = {int(label): c for c, label in enumerate(source.indices)}
    pairs |= {label: IGNORE for label in found if label not in pairs}
    note = f"The labels are read as protocol '{source.name}': the model gets a new head for it."
    group = np.arange(len(source))
    return _partial(Reading(source, source, pairs, group, (note,), new_head=True), found)


def _partial(reading: Reading, found: Mapping[int, int]) -> Reading:
    """Merge the structures that no label image shows into the background, and say so."""
    shown = {reading.pairs[label] for label in found} - {IGNORE}
    group = reading.group.copy()
    told = reading.labelled()
    absent = [int(c) for c in told if c not in shown]
    for channel in absent:
        group[group == channel] = 0
    notes = reading.notes
    if absent:
        names = reading.target.table["name"].iloc[absent]
        notes += (f"Not labelled, and merged into the background in the loss: {listed(names)}.",)
    if not (set(told) - set(absent)):
        raise DataError(
            "no structure of the model is labelled", "--labels",
            "label structures that the model knows, or give a look-up table of your own",
        )  # fmt: skip
    return replace(reading, group=group, notes=notes, unmerged=reading.group)


def _own(
    found: Mapping[int, int], names: Mapping[int, str] | None, seg: str, model: str
) -> Reading:
    """Labels in a protocol of the site's own, whose name is neither a known one nor the model's."""
    if names is None:
        known = ", ".join(known_protocols())
        raise DataError(
            f"nothing says what the labels mean: no look-up table was found and '{seg or 'seg-'}' "
            "is no protocol of the model's", f"--labels, labels {listed(sorted(found)[:8])}",
            f"put seg-{seg or 'NAME'}_dseg.tsv with columns index and name at the root of the "
            f"derivative, or name the images seg-P_dseg with P one of {known}",
        )  # fmt: skip
    name = re.sub(r"[^0-9A-Za-z]", "", seg) or "site"
    known = [label for label in found if label in names]
    taken = name in (*known_protocols(), model)
    protocol = own_protocol(name + "site" if taken else name, names, known)
    pairs = {int(label): c for c, label in enumerate(protocol.indices)}
    pairs |= {int(label): 0 for label in names if label not in pairs}
    note = (
        f"The labels are a protocol of the site's own, '{protocol.name}' with "
        f"{amount(len(protocol) - 1, 'structure')}: the model gets a new head for it."
    )
    group = np.arange(len(protocol))
    notes = (note, *_told_sides(protocol))
    return Reading(protocol, protocol, pairs, group, notes, new_head=True)


def _told_sides(protocol: LabelProtocol) -> list[str]:
    """Sentences: which structures are taken as left and right of each other, and which as alone."""
    name = dict(zip(protocol.table["index"], protocol.table["name"], strict=True))
    pairs = [f"{name[left]} and {name[right]}" for left, right in protocol.pairs()]
    notes = ["The names tell no pairs of left and right."]
    if pairs:
        notes = [f"Pairs of left and right by the names: {listed(pairs)}."]
    return [*notes, *_told_alone(protocol)]


def _told_alone(protocol: LabelProtocol) -> list[str]:
    """A sentence on the structures whose side has no partner, if there are any."""
    alone = unpaired(protocol.table)
    if not alone:
        return []
    return [f"Of one side alone by the names: {listed(alone)}; so no scan is shown in the mirror."]


def _plain(name: str) -> str:
    return re.sub(r"[^0-9a-z]", "", name.lower())


def _alike(one: str, other: str) -> bool:
    """Whether two names of one index mean the same: ``Left-Thalamus-Proper``, ``Left thalamus``."""
    if side_of(one) != side_of(other):
        return False
    words = [set(re.findall(r"[a-z0-9]+", without_side(name).lower())) for name in (one, other)]
    return 2 * len(words[0] & words[1]) >= min(map(len, words)) > 0


def _short(name: str) -> str:
    words = re.findall(r"[0-9A-Za-z]+", name)
    return "".join(word[:3] for word in words)[:12] or name[:3]
