"""The training loop: resumable to the step, decided by its seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlseg_bids.bids.atomic import atomic
from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.networks import build, channels_last
from tlseg_bids.preprocess.intensity import standard_landmarks, standardise
from tlseg_bids.train.curves import Laps, time_left, write_curve
from tlseg_bids.train.dataset import Sample, align, build_template, default_protocol
from tlseg_bids.train.descent import build_optimiser, open_scope, rate_at, set_rate
from tlseg_bids.train.draw import Draw, Example, atlas
from tlseg_bids.train.parallel import Team, joined, prepare
from tlseg_bids.train.recipe import Recipe, code_version, load_checkpoint
from tlseg_bids.train.resume import check_data, check_same, code_trail, generator_state
from tlseg_bids.train.start import adopt, load_start
from tlseg_bids.train.supply import licences, load_samples
from tlseg_bids.train.synth import Random
from tlseg_bids.train.teach import Teacher, set_age_scale
from tlseg_bids.train.watch import Silence, Watch
from tlseg_bids.zoo.card_file import file_sha256

REPORT_EVERY = 50
LARGEST_GRADIENT = 5.0
PRIOR_SPACING_MM = 4.0
COMPILED_AT_MOST = 64  # variants of the network: heads times choices of sub-voxels


def new_state(recipe: Recipe, samples: dict[str, list[Sample]], start: dict | None) -> dict:
    """Template, atlases and standard scale: taken from `start`, else made from the samples.

    The samples are aligned with the template and, if the recipe says so, put on the scale.
    """
    first = next(iter(samples.values()))
    template = start["template"] if start else build_template(first, default_protocol())
    state = {"template": template, "priors": {}, "standard": (start or {}).get("standard", [])}
    every = [sample for found in samples.values() for sample in found]
    if recipe.standard:
        images = [image.numpy() for sample in every for image in sample.images.values()]
        if not images and not state["standard"]:
            raise UsageError(
                "there is no image to take the standard scale from", f"recipe '{recipe.name}'",
                "give a dataset images, or leave out standard",
            )  # fmt: skip
        state["standard"] = state["standard"] or standard_landmarks(images).tolist()
        for sample in every:
            sample.images = {
                suffix: torch.from_numpy(standardise(image.numpy(), np.array(state["standard"])))
                for suffix, image in sample.images.items()
            }
    else:
        state["standard"] = []
    for found in samples.values():
        align(found, template)
    known = start["priors"] if start else {}
    for name in recipe.prior_heads:
        taught = [s for found in samples.values() for s in found if s.taught == name]
        if not taught and name not in known:
            raise UsageError(
                f"the network is handed an atlas of '{name}', and no dataset is learned in it",
                f"recipe '{recipe.name}'",
                "add such a dataset, --start from a model that has the atlas, or lower "
                "prior_channels",
            )  # fmt: skip
        alike = [s for s in taught if s.dataset == taught[0].dataset]
        spacing_mm = recipe.prior_mm.get(name, PRIOR_SPACING_MM)
        state["priors"][name] = (
            known[name] if name in known else atlas(alike, recipe.box_mm, spacing_mm, recipe.mirror)
        )
    return state


def lineage(start: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The runs that a run's starting weights went through, eldest first."""
    if start is None:
        return []
    recipe = start["recipe"]
    own = {
        "recipe": recipe["name"],
        "seed": recipe["seed"],
        "steps": start["step"],
        "seconds": round(start["seconds"]),
        "data": start["data"],
    }
    return [*start.get("lineage", []), own]


def train(
    recipe: Recipe, root: Path, out: Path, log: Callable | Watch = print, until: int | None = None,
    device: str = "cpu",
) -> Path:  # fmt: skip
    """Run a recipe, or its first `until` steps; returns the checkpoint `OUT/<name>.pt`.

    A checkpoint that is there already is resumed: weights, moments, averages and the generators'
    states, so that a run that was cut off ends where an uncut one would. Beside it lie the curve
    as a table and a picture, written anew with every checkpoint. Under `torchrun` the processes
    share the run, and the first one writes and reports.

    Parameters
    ----------
    root : Path
        Folder of the datasets, or one packed file (`tlseg_bids.train.pack`).
    log : callable or Watch
        A callable like `print`, or what else follows the run.
    device : str
        A torch device.

    Raises
    ------
    UsageError
        If there is no such device, or the checkpoint is another recipe's or of another number of
        processes.
    NoInputError, DataError
        If data are missing or damaged, or not those of the checkpoint, or the loss is no number.
    CannotCreateError, OutputError
        If a checkpoint cannot be written; the one before is still whole.
    """
    path = out / f"{recipe.name}.pt"
    last = recipe.steps if until is None else min(until, recipe.steps)
    with joined(device) as team:
        prepare(team.device, recipe.deterministic)
        torch.manual_seed(recipe.seed)
        saved = load_checkpoint(path) if path.exists() else None
        run = Training(recipe, root, saved, device, team)
        if len(set(team.gather(torch.tensor([run.step])).flatten().tolist())) > 1:
            raise UsageError(
                "the processes of this run find different checkpoints", path,
                "give --out a folder that all machines share",
            )  # fmt: skip
        watch = log if isinstance(log, Watch) else Watch(log)
        _go_on(run, path, last, watch if team.first else Silence())
    return path


def _go_on(run: Training, path: Path, last: int, watch: Watch) -> None:
    """Steps up to the `last` one, with reports and checkpoints on the way."""
    minutes = run.recipe.checkpoint_minutes
    watch.begin(run)
    if run.remark:
        watch.say(run.remark)
    written = time.monotonic()
    try:
        while run.step < last:
            run.laps.begin()
            examples = [run.draw(run.rng) for _ in range(run.recipe.accumulate)]
            run.laps.end("drawing")
            run.learn(examples)
            run.laps.end("learning")
            watch.step(run)
            if run.step % REPORT_EVERY == 0 or run.step == run.recipe.steps:
                watch.report(run.report())
            late = run.team.any(bool(minutes) and time.monotonic() - written > 60 * minutes)
            if run.step % run.recipe.checkpoint_every == 0 or run.step == last or late:
                checkpoint(run, path)
                written = time.monotonic()
    finally:
        watch.end()


def checkpoint(run: Training, path: Path) -> None:
    """Write all that is needed to go on, whole or not at all, and the curve so far."""
    run.check_finite()
    content = run.content()
    if not run.team.first:
        return
    with atomic(path) as stream:
        torch.save(content, stream)
    write_curve(run.curve, run.recipe.name, path.parent)


def batches(examples: list[Example], size: int) -> list[list[Example]]:
    """Examples that ask for the same (`Example.asked`), at most `size` together."""
    if size == 1:
        return [[one] for one in examples]
    alike: dict[tuple, list[Example]] = {}
    for one in examples:
        alike.setdefault(one.asked, []).append(one)
    return [found[i : i + size] for found in alike.values() for i in range(0, len(found), size)]


class Training:
    """The state of a run: networks, optimiser, generator and curve.

    Parameters
    ----------
    root : Path
        Folder of the datasets, or one packed file.
    saved : dict or None
        A checkpoint of the same recipe, to go on from.
    device : str
        A torch device; examples are made on it, too.
    team : Team, optional
        The processes that share the run; this one alone if not given.

    Raises
    ------
    UsageError, DataError
        If `saved` is of another recipe, other data or another number of processes.
    """

    def __init__(
        self, recipe: Recipe, root: Path, saved: dict[str, Any] | None, device: str = "cpu",
        team: Team | None = None,
    ) -> None:  # fmt: skip
        self.team = team or Team(device=torch.device(device))
        self.device = self.team.device
        if saved:
            check_same(recipe, Recipe(**saved["recipe"]), f"{recipe.name}.pt")
        fresh = recipe.start and not saved
        start = load_start(Path(recipe.start), recipe.role) if fresh else None
        samples = load_samples(recipe, root)
        self.recipe, self.code, self.lineage = recipe, code_version(), lineage(start)
        self.data = {f"{s.dataset}/{s.name}": s.sha256 for one in samples.values() for s in one}
        self.licences = (start or {}).get("licences", {}) | licences(recipe, root)
        self.packed = file_sha256(root) if root.is_file() else ""
        self.fixed = new_state(recipe, samples, saved or start)
        self.network, self.average = self._network(), self._network()
        if recipe.loss.joint and not hasattr(self.network, "every"):
            raise UsageError(
                f"the network '{recipe.network['network']}' answers for one head at a time",
                f"recipe '{recipe.name}', table [loss]",
                "leave out joint, or take the network unet",
            )  # fmt: skip
        every = [sample for found in samples.values() for sample in found]
        set_age_scale(self.network, [sample.age_years for sample in every])
        if start:
            adopt(self.network, recipe, start)
        self.average.load_state_dict(self.network.state_dict())
        self.optimiser = build_optimiser(
            self.network, recipe.descent, recipe.learning_rate, recipe.weight_decay
        )
        self.rng = Random(self.team.seed(recipe.seed), str(self.device))
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.losses: list[Tensor] = []
        self.steepness = torch.zeros(())  # norm of the last step's gradient
        self.remark = ""
        if saved:
            self._resume(saved)
        self.laps = Laps(self.device, (saved or {}).get("laps", {}))
        if recipe.compile:
            torch._dynamo.config.cache_size_limit = COMPILED_AT_MOST
            self.network.compile()
        priors = [prior.to(self.device) for prior in self.fixed["priors"].values()]
        self.draw = Draw(recipe, samples, priors, self.network)
        self.teach = Teacher(recipe, every, self.device)
        self.clock = time.monotonic()
        self._begun = (self.step, self.seconds)

    def _network(self) -> nn.Module:
        network = build(**self.recipe.network, out_channels=self.recipe.head_sizes)
        return channels_last(network).to(self.device)

    def _resume(self, saved: dict[str, Any]) -> None:
        where = f"{self.recipe.name}.pt"
        check_data(self.data, saved["data"], where)
        state = generator_state(saved, self.team, where)
        for name in ("network", "average", "optimiser"):
            getattr(self, name).load_state_dict(saved[name])
        try:
            self.rng.generator.set_state(state)
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                "the checkpoint's random numbers are those of another kind of device", where,
                "resume it on the --device where it began",
            ) from error  # fmt: skip
        self.step, self.seconds, self.curve = saved["step"], saved["seconds"], saved["curve"]
        if "losses" in saved:
            self.losses = list(saved["losses"][self.team.rank].to(self.device))
        self.lineage = saved["lineage"]
        self.licences = saved.get("licences", {}) | self.licences
        self.packed = self.packed or saved.get("packed", "")
        self.code = code_trail(saved["code"], self.step, self.code)
        if self.code != saved["code"]:
            self.remark = f"{where}: the program has changed since it began: {self.code}"

    def learn(self, examples: list[Example]) -> None:
        """One step: forward in bfloat16, backward, update, average."""
        recipe = self.recipe
        share = rate_at(recipe.descent, self.step, recipe.steps, recipe.warmup)
        set_rate(self.optimiser, recipe.learning_rate * share)
        anything = open_scope(self.network, recipe.descent, self.step, recipe.steps)
        torch.manual_seed(self.team.seed(recipe.seed + self.step))  # of dropout, alike when resumed
        self.optimiser.zero_grad(set_to_none=True)
        for batch in batches(examples, recipe.batch):
            losses = self.teach(self.network, batch)
            if anything:
                (losses[:, 0].sum() / len(examples)).backward()
            self.losses.extend(losses.detach())
        self.team.average_gradients(self.network.parameters())
        self.steepness = nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.step += 1
        share = 1 - min(self.recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.network.parameters()), share
            )

    def recent(self) -> tuple[float, float]:
        """Mean loss and soft Dice of this process since the last point of the curve."""
        if self.losses:
            loss, dice = torch.stack(self.losses).mean(0).tolist()
            return loss, dice
        return self.curve[-1][2:4] if self.curve else (math.nan, math.nan)

    def report(self) -> str:
        """Add a point to the curve and say it; every process has to call it."""
        self.check_finite()
        self._tick()
        loss, dice = self.team.mean(torch.stack(self.losses).mean(0)).tolist()
        self.losses = []
        laps = self.laps.totals()
        spent = [laps.get(part, 0.0) for part in ("drawing", "learning")]
        self.curve.append((self.step, self.seconds, loss, dice, *spent))
        share = f", drawing {spent[0] / sum(spent):.0%} of the time" if sum(spent) else ""
        steps, seconds = self.step - self._begun[0], self.seconds - self._begun[1]
        left = time_left((self.recipe.steps - self.step) * seconds / max(steps, 1))
        return (
            f"{self.recipe.name} {self.step}/{self.recipe.steps} {self.seconds:.0f} s "
            f"loss {loss:.3f} dice {dice:.3f}{share}, {left} left"
        )

    def check_finite(self) -> None:
        """Every process has to call it.

        Raises
        ------
        DataError
            If a loss since the last report, or the last step's gradient, is NaN or Inf, in any
            process.
        """
        broken = bool(self.losses) and not torch.stack(self.losses)[:, 0].isfinite().all()
        if self.team.any(broken or not self.steepness.isfinite()):
            raise DataError(
                f"the loss or its gradient is no number any more, at step {self.step}",
                f"recipe '{self.recipe.name}'",
                "the last checkpoint is from before: --start a run of another --name from it, "
                "with a lower learning_rate in its recipe",
            )  # fmt: skip

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def content(self) -> dict[str, Any]:
        """Everything that a checkpoint holds: tensors and plain values.

        The losses since the last report and the generators' states of all processes are among
        them; every process has to call it.
        """
        self._tick()
        states = self.team.gather(self.rng.generator.get_state())
        pending = self.team.gather(torch.stack(self.losses)) if self.losses else None
        return {
            **self.fixed,
            "template": torch.as_tensor(self.fixed["template"]),
            "recipe": asdict(self.recipe),
            "code": self.code,
            "lineage": self.lineage,
            "data": self.data,
            "licences": self.licences,
            "packed": self.packed,
            "processes": self.team.world,
            "device": self.device.type,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "laps": self.laps.totals(),
            "losses": torch.zeros(self.team.world, 0, 2) if pending is None else pending,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": states[0] if self.team.world == 1 else states,
        }
