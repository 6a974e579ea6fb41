"""The published systems and our engine on the same folds, with the same minutes of training.

Usage: ``python benchmarks/systems.py DATA WORK [--minutes M] [--datasets malc infant]
[--folds K …] [--systems NAME …] [--threads N] [--limit N] [--spacing MM]`` runs what is missing;
``python benchmarks/systems.py DATA WORK --table`` prints what is there.

For each dataset, fold and system: the recipe is put on the dataset without the fold's subjects,
its step is timed, it is trained for so many steps as the minutes (of the processor) hold, and the
held-out scans are labelled as the program does it. The published systems are placed by the
default model, our engine by the locator of ``benchmarks/start/any-1.toml``, which has seen no real
scan, and by its own labels. Networks are narrowed (`setups.py`) so that two cores take more
steps; the table tells the parameters and the steps. With ``--spacing 4`` the published systems
work on voxels of 4 mm, their windows and tiles as large in millimetres, so that a step has a 64th
of the voxels: enough to train them in minutes, too coarse for the borders of structures. Our
engine, which folds 2 mm into channels anyway, stays at 1 mm; from random weights its body has
such voxels, too. A row per scan and set of structures is appended to WORK/systems.tsv; a run that
was cut off goes on where it was: finished systems are not repeated, and training resumes from its
checkpoint.

`malc`: T1w, manual BrainCOLOR labels, five folds. `infant`: T2w (with T1w where a system sees
both), joint-label-fusion labels, four folds. HD95 is the mean over the structures found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import pandas as pd
import torch
from setups import DATASETS, MORE, START, SYSTEMS, TRAIN, Setup
from systems_table import COLUMNS, known, markdown

from tlseg_bids import app, placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.cli.evaluate import main as evaluate
from tlseg_bids.flow import Job
from tlseg_bids.metrics import weighted_dice
from tlseg_bids.networks.patches import REACH
from tlseg_bids.postprocess import to_native
from tlseg_bids.segment.model import load_model
from tlseg_bids.train.export import export, read_description
from tlseg_bids.train.loop import Training, train
from tlseg_bids.train.recipe import Recipe, load_checkpoint, load_recipe
from tlseg_bids.train.watch import Silence
from tlseg_bids.volume import load_scan
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.weights import load_weights

TRIAL_STEPS = (16, 48)  # steps that warm up, and how many have passed when the trial ends


def rules(dataset: str, setup: Setup) -> dict[str, Any]:
    """How a system reads the dataset."""
    known = load_recipe(TRAIN / "recipes" / ("infant.toml" if dataset == "infant" else
                                             "adult-t1w.toml")).datasets[dataset]  # fmt: skip
    own = {**known, "real": 1.0, "weight": 1.0, **setup.own}
    if not setup.ours:
        recipe = load_recipe(TRAIN / "recipes" / f"{setup.recipe}.toml")
        theirs = [rules for name, rules in recipe.datasets.items() if name in DATASETS]
        own["mix"] = theirs[0].get("mix", {})
    if dataset == "infant":
        own["images"] = list(setup.suffixes)
    if setup.protocol:
        own["head"] = setup.protocol
    return own


def on_dataset(setup: Setup, dataset: str, fold: int, stage: str = "") -> Recipe:
    """The recipe of a system (or of the stage before it) for a fold of a dataset."""
    recipe = load_recipe(TRAIN / "recipes" / f"{stage or setup.recipe}.toml")
    network, spec = dict(recipe.network), DATASETS[dataset]
    if setup.features:
        inner = network["of"] = dict(network["of"]) if "of" in network else network
        inner["features"] = setup.features
        if "of" not in recipe.network:
            network = {k: v for k, v in inner.items() if k != "of"}
    channels = recipe.channels if dataset == "infant" else []
    if "image_channels" in network:
        network["image_channels"] = max(len(channels), 1)
    changes = {"network": network, "channels": channels, "fold_datasets": [dataset],
               "fold": [fold, spec["folds"]], "start": "", "checkpoint_minutes": 2.0,
               **setup.changes}  # fmt: skip
    if stage:
        return replace(recipe, **{**changes, "fold": [], "fold_datasets": []})
    heads = [setup.protocol or spec["protocol"]]
    heads += [h for h in recipe.more_heads if h not in heads]
    if setup.ours:  # our engine keeps the template's head, and rehearses
        heads += [] if "aseg" in heads else ["aseg"]
        rehearsed = {
            "labelmaps": {"weight": 0.2},
            dataset: {**rules(dataset, setup), "weight": 0.8},
        }
        if dataset == "malc":
            recipe = load_recipe(TRAIN / "recipes" / "adult-t1w.toml")
            network = recipe.network
        changes |= {"network": {**network, **setup.network}}
        return replace(recipe, **changes, protocol=heads[0], more_heads=heads[1:],
                       datasets=rehearsed)  # fmt: skip
    return replace(recipe, **changes, protocol=heads[0], more_heads=heads[1:],
                   datasets={dataset: rules(dataset, setup)})  # fmt: skip


def coarser(recipe: Recipe, setup: Setup, spacing_mm: float) -> Recipe:
    """A recipe on larger voxels: windows, tiles and rims keep their millimetres (but for the 32
    voxels of the 2.5-D network's patches).

    Our engine stays at 1 mm, or, where its setup follows, has a body on such voxels: it reads
    voxels of half the size, and folds them.
    """
    ratio = min(spacing_mm, setup.coarsest_mm) / recipe.spacing_mm
    if setup.ours:
        ratio = max(ratio / 2, 1.0) if setup.follows else 1.0
    if ratio == 1:
        return recipe
    patch = [round(n / ratio) for n in recipe.sides]
    rim, begins = round(recipe.places.rim / ratio), recipe.places.begins
    size = [(high - low) / recipe.spacing_mm / ratio for low, high in recipe.box_mm]
    if begins:
        begins = fewer(begins, ratio, [int(n) - side for n, side in zip(size, patch, strict=True)])
    places = replace(recipe.places, begins=begins, rim=rim)
    network = dict(recipe.network)
    if network["network"] == "patches":
        network["reach"] = round(network.get("reach", REACH) / ratio)
    spacing_mm = recipe.spacing_mm * ratio
    return replace(recipe, spacing_mm=spacing_mm, patch=patch, places=places, network=network)


def fewer(begins: list[list[int]], ratio: float, last: list[int]) -> list[list[int]]:
    """First voxels of tiles, counted in larger voxels; the last tile ends with the volume."""
    return [
        [min(round(n / ratio), most) for n in axis] for axis, most in zip(begins, last, strict=True)
    ]


def strategy(said: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A card's strategy, with the windows that the recipe was trained with.

    A network that learned in patches anywhere is not asked with halves; see ADR 0019.
    """
    found = dict(said)
    if found.pop("halves", False):
        found = {"name": "sliding", "window": recipe.patch, "overlap": 0.33, "mirror": True}
    if found["name"] == "tiles" or (found["name"] == "sliding" and recipe.spacing_mm > 1):
        found["window"] = recipe.patch
    if "begins" in found:
        found["begins"] = recipe.places.begins
    return found


def trained(
    recipe: Recipe, data: Path, out: Path, minutes: float, steps: int | None = None
) -> Path:  # fmt: skip
    """Train a recipe for so many minutes of a processor, or steps.

    Where minutes decide, the number of steps comes from the first few, which count, and is kept.
    It is the processor's time that counts, as other work on the machine does not change it.
    """
    path = out / f"{recipe.name}.steps.json"
    plan = json.loads(path.read_text()) if path.is_file() else {"seconds": 0.0}
    if steps is not None:
        plan["steps"] = steps
    if "steps" not in plan:
        first, last = TRIAL_STEPS
        clock = Clock()
        (out / f"{recipe.name}.pt").unlink(missing_ok=True)  # of a trial that was cut off
        train(replace(recipe, steps=10**6), data, out, clock, until=last)
        seconds = (clock.ends[last] - clock.ends[first]) / (last - first)
        seconds /= torch.get_num_threads()
        plan = {"seconds": clock.seconds, "steps": max(round(60 * minutes / seconds), last)}
        path.write_text(json.dumps(plan))
    clock, steps = Clock(), plan["steps"]
    found = train(replace(recipe, steps=steps, checkpoint_every=steps), data, out, clock)
    path.write_text(json.dumps({**plan, "seconds": plan["seconds"] + clock.seconds}))
    return found


class Clock(Silence):
    """Notes the processor's time when a run begins and after each of its steps, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def begin(self, run: Training) -> None:  # noqa: ARG002
        """The run is loaded."""
        self.ends.append(time.process_time())

    def step(self, run: Training) -> None:  # noqa: ARG002
        """A step is over."""
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Of the steps so far, for each thread; 0 where nothing ran."""
        return (self.ends[-1] - self.ends[0]) / torch.get_num_threads() if self.ends else 0.0


def minutes_of(checkpoints: list[Path]) -> float:
    """Minutes of the processor that runs took."""
    plans = [path.with_name(f"{path.stem}.steps.json").read_text() for path in checkpoints]
    return sum(json.loads(plan)["seconds"] for plan in plans) / 60


def run(options: argparse.Namespace, dataset: str, fold: int, system: str) -> pd.DataFrame:
    """Train, label and score one system on one fold."""
    setup, name = MORE[system], f"{system}-{dataset}-f{fold}"
    out = options.work / "runs"
    out.mkdir(parents=True, exist_ok=True)
    share, start, runs = 1.0, setup.start, []
    if setup.before:  # sees no scan of the datasets, so that folds and systems share it
        first = f"{Path(setup.before).name}-{dataset}"
        first = replace(on_dataset(setup, dataset, fold, setup.before), name=first)
        first = coarser(first, setup, options.spacing)
        runs = [trained(first, options.data, out, options.minutes / 3)]
        start, share = str(runs[0]), 2 / 3
    recipe = coarser(on_dataset(setup, dataset, fold), setup, options.spacing)
    recipe = replace(recipe, name=name, start=start)
    checkpoint = trained(recipe, options.data, out, share * options.minutes, options.steps)
    suffix = DATASETS[dataset]["suffix"]
    zoo, labelled = options.work / "zoo" / name, options.work / "out" / name
    told = {"summary": f"{system}, fold {fold} of {dataset}",
            "domain": {"suffixes": recipe.channels or [suffix]}}  # fmt: skip
    parts = {"locator": START} if setup.ours else {}
    exported(setup.card, told, recipe, {**parts, "segmenter": checkpoint}, options.data, zoo)
    held_out = subjects(options.data / dataset, fold, DATASETS[dataset]["folds"])[: options.limit]
    label(options.data / dataset, zoo, labelled, held_out, suffix)
    table = scored(options.data / dataset, labelled, recipe.protocol, suffix)
    record(zoo / f"{name}.toml", table, dataset, fold)
    saved = load_checkpoint(checkpoint)
    count = sum(value.numel() for value in saved["average"].values())
    table = table.assign(dataset=dataset, fold=fold, system=system, parameters=count,
                         steps=saved["step"], minutes=minutes_of([*runs, checkpoint]))  # fmt: skip
    return table[list(COLUMNS)]


def exported(
    card: str, told: dict[str, Any], recipe: Recipe, parts: dict[str, Path], data: Path, zoo: Path
) -> None:  # fmt: skip
    """Write the model ZOO, named as the folder, with a card's description and what is `told`."""
    said = read_description(TRAIN / "models" / f"{card}.toml")
    kept = {key: value for key, value in said.items() if key not in ("parent", "calibration")}
    kept |= {"name": zoo.name, "evidence": [], "strategy": strategy(said["strategy"], recipe)}
    export({**kept, **told}, parts, data, zoo)


def record(path: Path, table: pd.DataFrame, dataset: str, fold: int) -> None:
    """Write what was measured into a system's card, so that the program knows how good it is.

    With it ``tlseg … --models WORK/zoo/NAME --model NAME`` labels scans with the system.
    """
    rows = [
        {
            "dataset": dataset, "n": len(found), "metric": "dice", "how": f"fold {fold}, held out",
            "mean": round(float(found["dice"].mean()), 4),
            "sd": round(float(found["dice"].std()), 4) if len(found) > 1 else 0.0,
            "structures": "14 sub-cortical" if structures == "14" else "all structures",
            "suffixes": [DATASETS[dataset]["suffix"]], "skull_stripped": True,
        }
        for structures, found in table.groupby("structures")
    ]  # fmt: skip
    write_card(replace(read_card(path), evidence=tuple(rows)), path)


def subjects(folder: Path, fold: int, folds: int) -> list[str]:
    """Labels of the subjects that a fold leaves out, counted as training counts them."""
    every = sorted(path.name.removeprefix("sub-") for path in folder.glob("sub-*"))
    return [subject for i, subject in enumerate(every) if i % folds == fold]


def label(folder: Path, zoo: Path, out: Path, held_out: list[str], suffix: str) -> None:
    """Label the held-out subjects of a dataset as the program does it, but keep what it would
    refuse as no brain: a system that has learned little is to be scored, too."""
    card = read_card(zoo / f"{zoo.name}.toml")
    model = load_model(card, load_weights(card))
    for subject in held_out:
        every = {one: scan_of(folder, subject, one) for one in card.channels or (suffix,)}
        scan = every.pop(suffix)
        job = Job(scan, card, "", (), (), "", "cpu", 0.0, tuple(every.values()))
        begun = time.monotonic()
        volume, _ = load_scan(scan.path)
        prediction = app.finely(placing.find(volume, job, model), model)
        found = to_native(prediction, volume, model.protocol, card.calibration, True)
        seconds = time.monotonic() - begun
        anat = out / f"sub-{subject}" / "anat"
        anat.mkdir(parents=True, exist_ok=True)
        stem = f"sub-{subject}_space-{scan.suffix}_seg-{card.protocol}_dseg"
        nib.save(nib.Nifti1Image(found.labels.data, volume.grid.affine), anat / f"{stem}.nii.gz")
        (anat / f"{stem}.json").write_text(json.dumps({"Seconds": seconds}))


def scan_of(folder: Path, subject: str, suffix: str) -> Scan:
    """A skull-stripped scan of a dataset."""
    path = folder / f"sub-{subject}" / "anat" / f"sub-{subject}_{suffix}.nii.gz"
    return Scan(path, folder, {"sub": subject}, suffix, skull_stripped=True)


def scored(folder: Path, labelled: Path, protocol: str, suffix: str) -> pd.DataFrame:
    """A row per scan of a dataset and set of structures."""
    spec, scores = DATASETS[folder.name], labelled / "scores.tsv"
    asked = [str(labelled), str(folder / spec["labels"]), "-o", str(scores)]
    mapping = spec["mapping"].get(protocol)
    if evaluate(asked + (["--mapping", mapping] if mapping else [])):
        raise SystemExit(f"some scans of {labelled.name} could not be scored")
    table = pd.read_csv(scores, sep="\t")
    rows = []
    for scan, part in table.groupby("predicted"):
        if f"space-{suffix}" not in scan:
            continue
        sidecar = next(labelled.glob(f"sub-*/**/{scan.removesuffix('.nii.gz')}.json"))
        seconds = json.loads(sidecar.read_text())["Seconds"]
        for name, chosen in (("14", part[part["subcortical14"] == 1]), ("all", part)):
            if name == "all" and protocol == "subcortical":
                continue
            rows.append({
                "scan": scan.split("_space-")[0], "structures": name, "n": len(chosen),
                "dice": chosen["dice"].mean(), "weighted_dice": weighted_dice(chosen),
                "hd95_mm": chosen["hd95_mm"].mean(), "seconds": seconds,
            })  # fmt: skip
    return pd.DataFrame(rows)


def main(words: list[str]) -> int:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, help="as many for each, instead of minutes")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--folds", nargs="+", type=int, default=[0])
    parser.add_argument("--systems", nargs="+", choices=MORE,
                        default=list(SYSTEMS))  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--spacing", type=float, default=1.0, choices=(1.0, 2.0, 4.0), metavar="MM",
                        help="voxels of the published systems: 1, 2 or 4 mm")  # fmt: skip
    parser.add_argument("--limit", type=int, help="label only so many scans of a fold")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    options = parser.parse_args(words)
    read_card(START)
    results = options.work / "systems.tsv"
    if options.table:
        print(markdown(pd.read_csv(results, sep="\t", dtype={"structures": str}), list(MORE)))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for fold in options.folds:
        for dataset in options.datasets:
            for system in options.systems:
                if fold >= DATASETS[dataset]["folds"] or known(results, dataset, fold, system):
                    continue
                begun = time.monotonic()
                found = run(options, dataset, fold, system)
                found.to_csv(results, sep="\t", index=False, mode="a",
                             header=not results.is_file(), float_format="%.5g")  # fmt: skip
                print(f"{system}, fold {fold} of {dataset}: {time.monotonic() - begun:.0f} s",
                      flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
