"""What a model gains by a few labelled scans, and what it forgets.

``python benchmarks/adaptation.py DATA OUT TASK [--recipes auto …] [--scans 1 3 7] [--draws 0 1 2]
[--steps 300 | --minutes M] [--test 5] [--adults 3] [--until-kept]``

TASK is ``infant``: from `benchmarks/start/any-adult.toml`, which saw adult label maps and adult
contrasts alone, to infants' T2w; or ``malc``: from the default model (which saw none of
these adults) to all BrainCOLOR structures, with a head of its own.

A draw puts the persons in a random order: the last ``--test`` are tested on, the first n are
learned from. ``scratch`` is a recipe here: random weights in place of the parent's. Every share of
the way from the parent's weights to the child's is measured. The printed table takes the share that
goes furthest and loses no more on the synthesised rehearsal heads than the program allows
(`tlseg_bids.adapt.judge`; it also looks at held-out scans). Test scans are labelled as the program
would, in the frame that the model itself finds, and scored on their own grid; random weights that
learned a head of their own alone have no template's head to find it by, and get the base's.
``adults`` is the mean Dice of the 14 sub-cortical structures of some ``malc`` scans.

Rows of a draw, n, recipe and length are appended to OUT/TASK.tsv; what is there is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tlseg_bids.adapt.choose import AUTO, OWN_LABELS, choose_recipe
from tlseg_bids.adapt.inspect import Inspected, channels_of, inspect
from tlseg_bids.adapt.judge import (
    MOST_FORGOTTEN,
    Fold,
    dice_per_channel,
    held_out_dice,
    mean,
    native_labels,
    program_labels,
    rehearsal_dice,
    rehearsal_set,
)
from tlseg_bids.adapt.labels import collect
from tlseg_bids.adapt.matching import match
from tlseg_bids.adapt.site import base_jobs
from tlseg_bids.adapt.work import Asked, Work
from tlseg_bids.app import answer
from tlseg_bids.bids.discover import discover
from tlseg_bids.config import Config
from tlseg_bids.placing import find
from tlseg_bids.postprocess import to_native
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.train.adaptation import load_adaptation
from tlseg_bids.train.finetune import FineTuning, blended
from tlseg_bids.zoo.weights import load_weights

HERE = Path(__file__).parent
SCRATCH = "scratch"
TRIAL_STEPS = 9
TASKS = {
    "infant": ("infant", "derivatives/jlf", "T2w", ("any-adult", HERE / "start")),
    "malc": ("malc", "derivatives/manual", "T1w", ("any", None)),
}


class Silent:
    """No progress."""

    def begin(self, scans: int, models: int = 0) -> None: ...
    def step(self, scan: str, name: str, number: int, of: int) -> None: ...
    def finish(self, scan: str, status: str, note: str = "") -> None: ...


class Site:
    """A dataset with labels, every scan labelled once by the base.

    Parameters
    ----------
    data, out : Path
        The datasets; where the base's answers are kept.
    task : tuple
        A row of `TASKS`.
    new_head : bool
        Whether the labels keep their own protocol.
    persons : int, optional
        Only so many, the first by label.
    """

    def __init__(
        self, data: Path, out: Path, task: tuple, new_head: bool, persons: int | None = None
    ) -> None:
        dataset, labels, suffix, (base, folder) = task
        folders = () if folder is None else (folder,)
        config = Config(
            data / dataset, out / "none", "participant", base=base, model_dirs=folders,
            labels_dir=data / dataset / labels, device="auto", nprocs=torch.get_num_threads(),
        )  # fmt: skip
        scans = [one for one in discover(config)[0] if one.suffix == suffix]
        if persons is not None:
            scans = [
                one for one in scans if one.subject in sorted({s.subject for s in scans})[:persons]
            ]
        matched = match(config.labels_dir, scans)
        jobs, matched = base_jobs(config, matched)
        protocol = jobs[0].card.protocol_of(jobs[0].card.protocol)
        collected = collect(matched, protocol, new_head)
        self.work = Work(Asked(config, tuple(jobs), collected, ""), answer, Silent(), out)
        self.base = load_model(jobs[0].card, load_weights(jobs[0].card, True), jobs[0].device)
        self.jobs = self.work.jobs
        self.scans: dict[str, Inspected] = {}
        for one in collected.usable:
            kept = out / f"{base}-{one.name}.npz"
            self.scans[one.scan.subject] = inspect(
                one, self.jobs[one.name], self.base, collected.reading, answer, kept
            )
        self.reading = collected.reading


def adults_dice(model: Model, site: Site) -> float:
    """Mean Dice of the 14 sub-cortical structures, answered by the template's head."""
    deep = np.flatnonzero(site.base.protocol.table["subcortical14"].to_numpy(int) == 1)
    scores = []
    for one in site.scans.values():
        prepared = find(one.prepared.native, site.jobs[one.name], model)
        prediction = segment(model, prepared, Ask(head=len(model.heads) - 1))
        protocol = model.heads[-1]
        labels = to_native(prediction, one.prepared.native, protocol).labels.data
        found = one.labelled.group[channels_of(labels, protocol.indices)]
        dice = dice_per_channel(found, one.labelled.channels)
        scores.append(mean({c: d for c, d in dice.items() if c in deep}))
    return float(np.mean(scores))


def site_dice(
    model: Model, site: Site, scans: list[Inspected], base_frame: bool = False
) -> list[float]:
    """Mean Dice over all labelled structures of every scan, on its own grid."""
    fold = Fold((0,))

    def labels(one: Inspected) -> np.ndarray:
        if base_frame:
            return native_labels(model, one)
        return program_labels(model, one, site.jobs[one.name], answer)

    return [mean(held_out_dice(labels(one), one, fold)) for one in scans]


def how_to(recipe: str, site: Site, shown: list[Inspected]):
    """The recipe of this name, for these scans."""
    if recipe == SCRATCH:
        like = load_adaptation(OWN_LABELS if site.reading.new_head else "new-only")
        return replace(
            like, name=SCRATCH, scope="all", rehearsal=0.0, distillation=0.0, division=0.0,
            shares=(1.0,),
        )  # fmt: skip
    return choose_recipe(recipe, shown, site.reading)[0]


def steps_of(trial: FineTuning, minutes: float) -> int:
    """Steps that a recipe takes in so much processor time, from a short run that is thrown away."""
    trial.learn()
    trial.step = 0
    begun = time.process_time()
    while trial.step < trial.steps:
        trial.learn()
    return round(60 * minutes * trial.steps / (time.process_time() - begun))


def adapt(
    site: Site, recipe: str, shown: list[Inspected], asked: argparse.Namespace, seed: int
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """Train one child; yields it at every share, the furthest first, with what is said of it."""
    how = how_to(recipe, site, shown)
    material = site.work.stock.whole(how, shown, site.base)
    parent = material.parent
    if recipe == SCRATCH:
        torch.manual_seed(seed)
        parent = replace(parent, network=site.work.stock.new_network(material.model).eval())
    make = partial(FineTuning, how, parent, material.samples, material.maps, seed=seed)
    steps = steps_of(make(steps=TRIAL_STEPS), asked.minutes) if asked.minutes else asked.steps
    tuning = make(steps=steps)
    begun = time.process_time(), time.monotonic()
    while tuning.step < steps:
        tuning.learn()
    spent = time.process_time() - begun[0], time.monotonic() - begun[1]
    heads = rehearsal_set(material.maps, parent.box_mm, parent.spacing_mm)
    before, state = np.array(rehearsal_dice(material.model, heads)), tuning.finish()
    for share in sorted(how.shares, reverse=True):
        child = site.work.stock.child(material, blended(parent.network, state, share))
        lost = before - rehearsal_dice(child, heads)
        each = " ".join(f"{one:.4f}" for one in lost)
        yield child, {
            "steps": steps, "used": how.name, "share": share,
            "rehearsal_lost": float(np.mean(lost)), "lost_each": each,
            "cpu_minutes": spent[0] / 60, "minutes": spent[1] / 60,
        }  # fmt: skip
        if asked.until_kept and np.mean(lost) <= MOST_FORGOTTEN:
            return


def taken(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every run the row of the largest share that forgets no more than allowed.

    Where there is none, the row of its smallest share, with `kept` false: the program would refuse
    it, and the base would stay.
    """
    keys = ["draw", "scans", "recipe", "length"]
    free = rows["share"].isna() | (rows["recipe"] == SCRATCH)
    rows = rows.assign(kept=free | (rows["rehearsal_lost"] <= MOST_FORGOTTEN))
    rank = rows["share"].fillna(0).where(rows["kept"], -rows["share"])
    return rows.loc[rank.groupby([rows[key] for key in keys]).idxmax()].sort_values(keys)


def summary(rows: pd.DataFrame) -> str:
    """Gain, adults' fall and time of the taken rows by recipe, scans and length.

    Means over draws (least to most), how many of them the program would keep, and the medians over
    recipes. A task whose base cannot answer in the labels' protocol has no gain.
    """
    base = rows[rows["scans"] == 0].set_index("draw")
    kept = taken(rows).query("scans > 0")
    kept = kept.assign(
        gain=kept["dice"] - kept["draw"].map(base.get("dice", pd.Series(dtype=float))),
        adults_fall=kept["draw"].map(base["adults"]) - kept["adults"],
    )
    columns = ["dice", "gain", "adults_fall", "cpu_minutes"]
    lines = [
        "| recipe | scans | length | kept | share | Dice | gain | adults' fall | CPU min |",
        "|---|--:|---|---|---|---|---|---|---|",
    ]
    for (recipe, scans, length), part in kept.groupby(["recipe", "scans", "length"]):
        cells = [
            f"{part[c].mean():.3f} ({part[c].min():.3f} to {part[c].max():.3f})"
            for c in columns[:3]
        ]
        shares = ", ".join(f"{share:g}" for share in sorted(part["share"].unique()))
        minutes = f"{part['cpu_minutes'].mean():.1f} |"
        kept_of = f"{part['kept'].sum()} of {len(part)}"
        lines.append(
            " | ".join((f"| {recipe}", str(scans), length, kept_of, shares, *cells, minutes))
        )
    for (scans, length), part in kept.groupby(["scans", "length"]):
        middle = part.groupby("recipe")[columns].mean().median()
        if part["recipe"].nunique() > 2:
            cells = [f"{middle[c]:.3f}" for c in columns[:3]]
            lines.append(" | ".join((f"| median of the recipes | {scans}", length, "", "", *cells,
                                     f"{middle['cpu_minutes']:.1f} |")))  # fmt: skip
    return "\n".join(lines)


class Table:
    """The rows so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = pd.read_csv(path, sep="\t") if path.is_file() else pd.DataFrame()

    def has(self, key: dict[str, Any]) -> bool:
        """Whether there are rows of this run."""
        return len(self.rows) > 0 and bool(
            (self.rows[list(key)] == pd.Series(key)).all(axis=1).any()
        )

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write."""
        self.rows = pd.concat([self.rows, pd.DataFrame([row])], ignore_index=True)
        self.rows.to_csv(self.path, sep="\t", index=False, float_format="%.4f")
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--recipes", nargs="+", default=[AUTO])
    parser.add_argument("--scans", nargs="+", type=int, default=[1, 3, 7])
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--until-kept", action="store_true")
    parser.add_argument("--test", type=int, default=5)
    parser.add_argument("--adults", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what was measured")
    asked = parser.parse_args()
    table = Table(asked.out / f"{asked.task}.tsv")
    if asked.table:
        print(summary(table.rows))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    kept = asked.out / "base"
    kept.mkdir(exist_ok=True)
    new_head = asked.task == "malc"
    site = Site(asked.data, kept, TASKS[asked.task], new_head)
    check = (*TASKS["malc"][:3], TASKS[asked.task][3])
    adults = Site(asked.data, kept, check, False, asked.adults)
    length = f"{asked.minutes:g} min" if asked.minutes else f"{asked.steps} steps"
    for draw in asked.draws:
        order = [str(p) for p in np.random.default_rng(draw).permutation(sorted(site.scans))]
        test = [site.scans[p] for p in order[-asked.test :]]

        def score(
            model: Model, test: list[Inspected] = test, base_frame: bool = False
        ) -> dict[str, float]:
            found = site_dice(model, site, test, base_frame)
            return {
                "dice": float(np.mean(found)), "dice_sd": float(np.std(found, ddof=1)),
                "adults": np.nan if base_frame else adults_dice(model, adults),
            }  # fmt: skip

        base = {"draw": draw, "scans": 0, "recipe": "base", "length": "none"}
        if not table.has(base):
            known = {"adults": adults_dice(site.base, adults)} if new_head else score(site.base)
            table.add({**base, **known})
        for count, recipe in product(asked.scans, asked.recipes):
            key = {"draw": draw, "scans": count, "recipe": recipe, "length": length}
            if table.has(key):
                continue
            shown = [site.scans[p] for p in order[:count]]
            people = {"learned": " ".join(order[:count]), "tested": " ".join(order[-asked.test :])}
            base_frame = recipe == SCRATCH and new_head
            for model, said in adapt(site, recipe, shown, asked, draw):
                table.add({**key, **said, **score(model, base_frame=base_frame), **people})
    print(summary(table.rows))


if __name__ == "__main__":
    main()
