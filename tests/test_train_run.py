"""A training run as its user sees it: progress, curves, checkpoints, refusals and the card."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from heads import describe, tiny_recipe, write_heads
from PIL import Image

from tlseg_bids.cli.train import main
from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.train import loop
from tlseg_bids.train.curves import COLUMNS, Laps, time_left, write_curve
from tlseg_bids.train.descent import Descent
from tlseg_bids.train.draw import Example
from tlseg_bids.train.export import export, read_description
from tlseg_bids.train.loop import Training, batches, train
from tlseg_bids.train.parallel import find_device
from tlseg_bids.train.recipe import TABLES, Recipe, load_checkpoint
from tlseg_bids.train.resume import code_trail
from tlseg_bids.train.watch import Bar, Watch
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.weights import load_weights

TINY = """\
name = "{name}"
role = "{role}"
protocol = "aseg"
patch = 16
spacing_mm = 2.0
box_mm = [[-48, 48], [-48, 48], [-48, 48]]
steps = 2
warmup = 1

[network]
network = "unet"
features = [4, 8]
stem = 2
prior_channels = {prior}

[datasets.balls]
"""

CARD = """\
name = "tiny"
version = "0"
status = "experimental"
summary = "balls"
citations = ["none"]

[domain]

[strategy]
name = "sliding"
window = 16
"""


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """A folder with one dataset of two label maps."""
    return write_heads(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe() -> Recipe:
    """A segmenter small enough for a test."""
    return tiny_recipe()


@pytest.fixture(scope="module")
def begun(heads, tmp_path_factory) -> dict:
    """A checkpoint after one step."""
    folder = tmp_path_factory.mktemp("begun")
    return load_checkpoint(train(tiny_recipe(), heads, folder, _quiet, until=1))


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_resumed_run_draws_the_curve_of_an_uncut_one(
    heads, recipe, tmp_path, monkeypatch, optimiser
):
    monkeypatch.setattr(loop, "REPORT_EVERY", 2)
    recipe = replace(recipe, accumulate=2, descent=Descent(optimiser=optimiser))
    whole = load_checkpoint(train(recipe, heads, tmp_path / "whole", _quiet))
    train(recipe, heads, tmp_path / "cut", _quiet, until=3)
    cut = load_checkpoint(train(recipe, heads, tmp_path / "cut", _quiet))
    assert [row[0] for row in cut["curve"]] == [2, 4, 6]
    assert [row[2:4] for row in cut["curve"]] == [row[2:4] for row in whole["curve"]]
    for key, value in whole["network"].items():
        assert torch.equal(cut["network"][key], value), key
    lines = (tmp_path / "cut" / "tiny_curve.tsv").read_text().splitlines()
    assert lines[0].split("\t") == list(COLUMNS)
    table = [[float(cell) for cell in line.split("\t")] for line in lines[1:]]
    assert [row[0] for row in table] == [2, 4, 6]
    assert 0 < table[0][4] < table[1][4] < table[2][4], "seconds of drawing add up"
    assert table[2][4] + table[2][5] <= table[2][1] + 0.01
    assert table[2][2] == pytest.approx(cut["curve"][2][2], rel=1e-5)
    with Image.open(tmp_path / "cut" / "tiny_curve.png") as picture:
        assert picture.size == (900, 360)


def test_old_curves_have_no_parts(tmp_path):
    write_curve([(50, 10.0, 1.5, 0.25)], "old", tmp_path)
    row = (tmp_path / "old_curve.tsv").read_text().splitlines()[1]
    assert row.split("\t") == ["50", "10", "1.5", "0.25", "n/a", "n/a"]


def test_examples_that_share_a_forward_pass_teach_the_same(heads, recipe):
    runs = [Training(replace(recipe, batch=size), heads, None) for size in (1, 3)]
    runs[1].network.load_state_dict(runs[0].network.state_dict())
    examples = [runs[0].draw(runs[0].rng) for _ in range(4)]
    assert [len(found) for found in batches(examples, 3)] == [3, 1]
    for run in runs:
        run.learn(examples)
    losses = [torch.stack(run.losses) for run in runs]
    torch.testing.assert_close(*losses, atol=2e-3, rtol=2e-3)
    gradients = [torch.cat([p.grad.flatten() for p in run.network.parameters()]) for run in runs]
    apart = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert apart < 0.05, "bfloat16 rounds, but no example counts twice or not at all"


def test_examples_with_different_questions_stay_apart():
    asked = [(0, ()), (0, ((0, 0, 1),)), (1, ()), (0, ()), (0, ())]
    image, group = torch.zeros(1, 1, 4, 4, 4), torch.arange(2)
    examples = [Example(image, image, image[0], group, None, head, parts) for head, parts in asked]
    found = batches(examples, 2)
    assert sorted(len(batch) for batch in found) == [1, 1, 1, 2]
    assert all(len({(one.head, one.parts) for one in batch}) == 1 for batch in found)
    assert [batch[0] for batch in batches(examples, 1)] == examples


def test_minutes_bring_checkpoints_too(heads, recipe, tmp_path):
    class Stop(Watch):
        def step(self, run: Training) -> None:
            if run.step == 2:
                raise KeyboardInterrupt

    often = replace(recipe, checkpoint_every=100, checkpoint_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train(often, heads, tmp_path, Stop(_quiet))
    assert load_checkpoint(tmp_path / "tiny.pt")["step"] == 1
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_a_checkpoint_of_another_recipe_is_refused(heads, recipe, begun):
    other = replace(recipe, learning_rate=0.5, mix=replace(recipe.mix, t2w=0.5))
    with pytest.raises(UsageError, match=r"another learning_rate \(was 0.01, is 0.5\), mix.t2w "
                       r"\(was 0.15, is 0.5\).*tiny.pt.*--name"):  # fmt: skip
        Training(other, heads, begun)
    free = replace(recipe, steps=9, checkpoint_every=1, checkpoint_minutes=1.0, batch=2)
    assert Training(free, heads, begun).step == 1


def test_a_checkpoint_of_other_data_or_processes_is_refused(heads, recipe, begun):
    data = {**begun["data"], "balls/sub-00": "0" * 64}
    with pytest.raises(
        DataError, match=r"1 scan is not as in the checkpoint.*balls/sub-00.*tiny.pt.*--name"
    ):
        Training(recipe, heads, {**begun, "data": data})
    two = torch.stack([begun["generator"]] * 2)
    with pytest.raises(UsageError, match=r"of 2 processes, and here is 1.*nproc-per-node 2"):
        Training(recipe, heads, {**begun, "generator": two})
    with pytest.raises(UsageError, match=r"another kind of device.*tiny.pt.*--device"):
        Training(recipe, heads, {**begun, "generator": two[0, :16]})


def test_a_run_that_other_code_goes_on_with_says_so(heads, recipe, begun):
    run = Training(recipe, heads, {**begun, "code": "0+old"})
    assert "the program has changed" in run.remark
    assert run.content()["code"].startswith("0+old, from step 1: ")
    assert code_trail("0+old, from step 1: 1+new", 7, "1+new") == "0+old, from step 1: 1+new"
    assert Training(recipe, heads, begun).remark == ""


def test_numbers_below_one_are_refused(recipe):
    with pytest.raises(UsageError, match=r"accumulate is 0.*recipe 'tiny'.*above 0"):
        replace(recipe, accumulate=0)


def test_a_device_that_is_not_there_is_refused():
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UsageError, match=rf"no device '{name}'.*--device.*use cpu"):
            find_device(name)


def test_the_bar_says_how_long_and_how_well():
    stream, bar = io.StringIO(), None
    bar = Bar(stream)
    run = SimpleNamespace(recipe=SimpleNamespace(steps=4, name="tiny"), step=1,
                          recent=lambda: (1.25, 0.5))  # fmt: skip
    bar.begin(run)
    bar.say("a remark")
    for run.step in (2, 3, 4):
        bar.step(run)
    bar.report("a line for a log")
    bar.end()
    told = stream.getvalue()
    assert "loss 1.250, Dice 0.500" in told
    assert "4/4" in told and "1/4" in told
    assert "a remark" in told
    assert "a line for a log" not in told


def test_lines_say_it_where_there_is_no_terminal(heads, recipe, tmp_path):
    lines = []
    train(replace(recipe, steps=1), heads, tmp_path, lambda line, **_: lines.append(line))
    assert len(lines) == 1
    assert lines[0].startswith("tiny 1/1 ")
    assert "drawing" in lines[0] and lines[0].endswith("0 s left")


def test_time_left_is_short():
    found = [time_left(seconds) for seconds in (-3, 40.4, 750, 11100)]
    assert found == ["0 s", "40 s", "12 min", "3 h 05 min"]


def test_laps_add_to_what_was_there():
    laps = Laps(torch.device("cpu"), {"drawing": 5.0})
    laps.begin()
    laps.end("drawing")
    laps.end("learning")
    assert 5.0 <= laps.totals()["drawing"] < 6
    assert 0 <= laps.totals()["learning"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.toml"], "are required: --data – the command line – see tlseg-train --help"),
        (["pack", "x.toml", "--data", "d"], "--output – the command line – see tlseg-train pack"),
        (["export", "x.toml"], "see tlseg-train export --help"),
        (["x.toml", "--data", "d", "--nmae", "x"], "unrecognized arguments: --nmae x"),
        (["x.toml", "--data", "d", "--threads", "0"], "'0' is not a whole number of at least 1"),
        (["x.toml", "--data", "d", "--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_usage(words, message, capsys):
    assert main(words) == UsageError.exit_code == 64
    said = capsys.readouterr().err
    assert said.startswith("tlseg-train: ") and said.count("\n") == 1
    assert message in said


def test_help_is_no_mistake(capsys):
    assert [main([*word, "--help"]) for word in ([], ["pack"], ["export"])] == [0, 0, 0]
    assert "tlseg-train export CARD.toml" in capsys.readouterr().out


def test_a_run_ends_in_a_model_with_its_card(heads, tmp_path, capsys):
    for name, role, prior in (("place", "locator", 0), ("label", "segmenter", 33)):
        (tmp_path / f"{name}.toml").write_text(TINY.format(name=name, role=role, prior=prior))
    (tmp_path / "model.toml").write_text(CARD)
    words = ["--data", str(heads), "--out", str(tmp_path / "runs"), "--threads", "1"]
    model = ["--card", str(tmp_path / "model.toml")]
    assert main([str(tmp_path / "label.toml"), *words, *model]) == UsageError.exit_code
    assert "a model needs a locator, too – --card – name" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists(), "told before the run, not after it"

    assert main([str(tmp_path / "place.toml"), *words]) == 0
    locator = tmp_path / "runs" / "place.pt"
    assert main([str(tmp_path / "label.toml"), *words, *model, "--locator", str(locator)]) == 0
    written = tmp_path / "runs" / "models" / "tiny.toml"
    assert f"{written}: " in capsys.readouterr().out
    card = read_card(written)
    assert card.weights.licence == "CC0-1.0"
    history = card.training["segmenter"]
    assert history["settings"]["network"]["features"] == [4, 8]
    assert history["settings"]["datasets"] == {"balls": {}}
    assert history["code"] == load_checkpoint(locator)["code"]
    assert history["curve_step"] == [2]
    assert {"seconds", "drawing_seconds", "learning_seconds", "device"} <= set(history)
    assert set(card.training["data"][0]["subjects"]) == {"sub-00", "sub-01"}
    assert str(tmp_path) not in written.read_text()

    segmenter = tmp_path / "runs" / "label.pt"
    child = main(["export", str(tmp_path / "model.toml"), "--locator", str(written),
                  "--segmenter", str(segmenter), "--out", str(tmp_path / "child")])  # fmt: skip
    assert child == 0
    kept = read_card(tmp_path / "child" / "tiny.toml")
    assert kept.training["locator"]["taken_from"] == "tiny 0"
    assert kept.preprocess == card.preprocess
    before, after = load_weights(card), load_weights(kept)
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)


def test_a_checkpoint_of_another_role_is_refused(heads, begun, tmp_path, capsys):
    """Two networks of one shape could else be exchanged unnoticed; told before a run as well."""
    paths = _pair(begun, tmp_path)
    (tmp_path / "model.toml").write_text(CARD)
    card, locator, segmenter = (str(p) for p in (tmp_path / "model.toml", *paths.values()))
    words = ["export", card, "--data", str(heads), "--out", str(tmp_path / "zoo")]
    assert main([*words, "--segmenter", segmenter, "--locator", segmenter]) == 64
    said = capsys.readouterr().err
    assert "this is the checkpoint of a segmenter, and a locator is asked for" in said
    assert "name it with --segmenter" in said
    assert main([*words, "--segmenter", locator, "--locator", locator]) == 64
    assert "of a locator, and a segmenter is asked for" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()

    (tmp_path / "label.toml").write_text(TINY.format(name="label", role="segmenter", prior=33))
    run = [str(tmp_path / "label.toml"), "--data", str(heads), "--out", str(tmp_path / "runs")]
    assert main([*run, "--card", card, "--locator", segmenter]) == 64
    assert main([*run, "--card", card, "--locator", str(tmp_path / "gone.pt")]) == 66
    assert "no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_model_that_cannot_be_written_leaves_what_is_there(heads, begun, tmp_path, capsys):
    paths = [str(path) for path in _pair(begun, tmp_path).values()]
    (tmp_path / "model.toml").write_text(CARD)
    words = ["export", str(tmp_path / "model.toml"), "--data", str(heads),
             "--locator", paths[0], "--segmenter", paths[1], "--out"]  # fmt: skip
    assert main([*words, str(tmp_path / "model.toml")]) == 73
    assert "the file cannot be made" in capsys.readouterr().err

    assert main([*words, str(tmp_path / "zoo")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "zoo").iterdir()}
    assert set(before) == {"tiny.toml", "tiny.safetensors"}
    other = {key: value / 2 for key, value in begun["average"].items()}
    _pair({**begun, "average": other}, tmp_path)
    (tmp_path / "model.toml").write_text(CARD.replace("experimental", "perfect"))
    assert main([*words, str(tmp_path / "zoo")]) == 65
    assert "perfect" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "zoo").iterdir()}


def test_a_role_that_no_network_has_is_refused(recipe):
    with pytest.raises(UsageError, match=r"role is 'segmentor'.*use locator, settler, segmenter"):
        replace(recipe, role="segmentor")


def _pair(begun, folder: Path) -> dict[str, Path]:
    """The checkpoint of a run as that of a locator and of a segmenter."""
    tables = {key: {} for key in TABLES}
    template = torch.as_tensor(begun["template"])
    paths = {role: folder / f"{role}.pt" for role in ("locator", "segmenter")}
    for role, path in paths.items():
        recipe = {**begun["recipe"], **tables, "role": role}
        torch.save({**begun, "template": template, "recipe": recipe}, path)
    return paths


def test_a_model_of_data_without_a_licence_is_refused(heads, begun, tmp_path):
    both = _pair({**begun, "licences": {}}, tmp_path)
    (tmp_path / "model.toml").write_text(CARD)
    said = read_description(tmp_path / "model.toml")
    with pytest.raises(DataError, match=r"'balls' states no licence.*description.json.*--data"):
        export(said, both, None, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
    assert export(said, both, heads, tmp_path / "zoo").weights.licence == "CC0-1.0"


def test_a_restricted_part_of_the_data_restricts_a_model_of_alternatives(begun, tmp_path):
    stated = {"a": "MIT OR GPL-3.0-only", "b": "CC-BY-NC-4.0"}
    data = {f"{name}/sub-01": "0" for name in stated}
    both = _pair({**begun, "data": data, "licences": stated}, tmp_path)
    (tmp_path / "model.toml").write_text(CARD)
    weights = export(read_description(tmp_path / "model.toml"), both, None, tmp_path).weights
    assert weights.licence == "CC-BY-NC-4.0 AND (MIT OR GPL-3.0-only)"
    assert not weights.permissive


def test_what_a_card_shall_say_has_to_be_there(tmp_path):
    with pytest.raises(NoInputError, match=r"no such file.*gone.toml.*see"):
        read_description(tmp_path / "gone.toml")
    path = tmp_path / "model.toml"
    path.write_text("name = ")
    with pytest.raises(DataError, match=r"not valid TOML.*model.toml.*mend"):
        read_description(path)
    path.write_text('name = "x"')
    with pytest.raises(DataError, match=r"missing: version, .*citations.*model.toml.*add it"):
        read_description(path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("[prep]", r"unknown: prep .*model.toml.*known are name, .*preprocess"),
        ("preprocess = 3", r"3 is not a table .*model.toml, preprocess"),
        ("known_failures = [3]", r"3 is not text .*known_failures"),
        ("[memory]\nhost_gib = 'x'", r"'x' is not a number .*\[memory\], host_gib"),
        ("[calibration]\nheat = 1", r"unknown: heat .*\[calibration\]"),
    ],
)
def test_what_a_card_shall_say_has_to_be_of_its_kind(tmp_path, more, sentence):
    path = tmp_path / "model.toml"
    table = more.startswith("[")
    path.write_text(f"{CARD}\n{more}\n" if table else f"{more}\n{CARD}\n")
    with pytest.raises(DataError, match=sentence):
        read_description(path)


def test_a_standard_scale_needs_images(heads, recipe, tmp_path):
    with pytest.raises(
        UsageError, match=r"no image to take the standard scale.*leave out standard"
    ):
        train(replace(recipe, standard=True), heads, tmp_path, log=_quiet)


def test_a_fold_is_two_numbers(heads, tmp_path, capsys):
    path = tmp_path / "label.toml"
    path.write_text(TINY.format(name="label", role="segmenter", prior=33))
    for wrong in ("4/4", "a/4", "1"):
        assert main([str(path), "--data", str(heads), "--fold", wrong]) == UsageError.exit_code
        assert f"'{wrong}' is no fold – --fold – write K/N" in capsys.readouterr().err


def test_a_description_that_is_not_json_is_named(recipe, tmp_path):
    write_heads(tmp_path)
    path = tmp_path / "balls" / "dataset_description.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"not valid JSON.*dataset_description.json.*mend"):
        Training(recipe, tmp_path, None)
    path.write_text(json.dumps(["no", "table"]))
    assert Training(recipe, tmp_path, None).licences == {}
    describe(tmp_path, "balls", "CC0-1.0")
    assert Training(recipe, tmp_path, None).licences == {"balls": "CC0-1.0"}
    with pytest.raises(NoInputError, match=r"no such folder or file.*gone.*packed .npz"):
        Training(recipe, tmp_path / "gone", None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_resumes_to_the_step_and_repeats_itself(heads, recipe, tmp_path):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    recipe = replace(recipe, accumulate=2, batch=2)
    whole, twin = (
        load_checkpoint(train(recipe, heads, tmp_path / name, _quiet, device="cuda"))
        for name in ("whole", "twin")
    )
    train(recipe, heads, tmp_path / "cut", _quiet, until=3, device="cuda")
    cut = load_checkpoint(train(recipe, heads, tmp_path / "cut", _quiet, device="cuda"))
    assert whole["device"] == "cuda"
    assert cut["curve"][-1][2:4] == whole["curve"][-1][2:4] == twin["curve"][-1][2:4]
    for key, value in whole["network"].items():
        assert torch.equal(cut["network"][key], value), key
        assert torch.equal(twin["network"][key], value), key


@pytest.mark.slow
def test_a_compiled_network_learns_and_is_saved_under_its_own_names(
    heads, recipe, tmp_path, monkeypatch
):
    """With the network traced and its gradients derived, but no code generated for them."""
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda network: compiling(network, backend="aot_eager")
    )
    plain = load_checkpoint(train(replace(recipe, steps=1), heads, tmp_path / "a", _quiet))
    quick = replace(recipe, steps=1, compile=True)
    built = load_checkpoint(train(quick, heads, tmp_path / "b", _quiet))
    assert set(built["network"]) == set(plain["network"])
    assert built["curve"][0][2] == pytest.approx(plain["curve"][0][2], rel=0.02)


def _quiet(*words: object, **how: object) -> None:
    pass
