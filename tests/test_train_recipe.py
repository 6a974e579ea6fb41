"""What a recipe cannot ask for is told in a sentence, before a scan is read."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import tomli_w
from heads import tiny_recipe, write_heads

from tlseg_bids.cli.train import main
from tlseg_bids.errors import UsageError
from tlseg_bids.train import draw
from tlseg_bids.train.loop import Training
from tlseg_bids.train.recipe import Recipe, completed, load_recipe

RECIPE = """\
name = "tiny"
role = "segmenter"
protocol = "aseg"
patch = 16
spacing_mm = 2.0
box_mm = [[-48, 48], [-48, 48], [-48, 48]]

[network]
network = "unet"
features = [4, 8]
stem = 2
prior_channels = 33

[datasets.balls]
"""
MEMBERS = '{network = "members", of = {network = "unet", features = [4]}, each = %s}'
QUICKNAT = '{network = "quicknat", features = [4, 4], %s}'


def load(folder, text: str, network: str = "") -> Recipe:
    """The recipe with further lines; `network` is taken in place of its own."""
    values: dict[str, Any] = tomllib.loads(RECIPE)
    if network:
        values["network"] = tomllib.loads(f"network = {network}")["network"]
    more = tomllib.loads(text)
    changed = completed(more, values) | {
        "datasets": completed(more.get("datasets", {}), values["datasets"])
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(changed))
    return load_recipe(path)


def refusal(folder, text: str, network: str = "") -> str:
    with pytest.raises(UsageError) as told:
        load(folder, text, network)
    assert told.value.where.startswith((str(folder), "recipe", "the recipe", "[ageing]"))
    assert told.value.hint
    return str(told.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('patch = "a"', "patch is 'a' – .*recipe.toml – write a whole number or a list of whole"),
        ("patch = 15", "patch is 15, and the network needs sides that 4 divides.*multiples of 4"),
        ("patch = [16, 16, 15]", r"patch is \[16, 16, 15\], and the network needs sides"),
        ("patch = [16, 16]", r"patch is \[16, 16\] .*or three for the three axes"),
        ("patch = 0", "patch is 0 .*from 1 to 1024"),
        ("spacing_mm = nan", "spacing_mm is nan .*write a number"),
        ("spacing_mm = 1000.0", "spacing_mm is 1000.0 .*from 0.1 to 50"),
        (f"learning_rate = {'9' * 400}", "learning_rate is 999"),
        ("steps = 1.5", "steps is 1.5 .*write a whole number"),
        ("steps = 0", "steps is 0 .*write a whole number from 1"),
        ("mirror = 1", "mirror is 1 .*write true or false"),
        ("seed = true", "seed is True .*write a whole number"),
        ("box_mm = [[48, -48], [-48, 48], [-48, 48]]", r"box_mm is .*write \[\[left, right\]"),
        ("box_mm = [[-48, 48], [-48, 48]]", r"box_mm is .*write \[\[left, right\]"),
        ("box_mm = 5", "box_mm is 5 .*write a list of lists of numbers"),
        ("box_mm = [[0, 1], [0, 1], [0, 1]]", "thinner than a voxel of 4 mm.*make the box larger"),
        ('channels = ["T3w"]', r"channels is \['T3w'\].*name T1w and T2w, or leave the key out"),
        ('channels = ["T1w"]', r"channels is \['T1w'\].*for a network of one image"),
        ('channels = ["T1w", "T1w"]', r"channels is \['T1w', 'T1w'\]"),
        ('channels = ["T1w", "T2w"]', "image_channels is 1, and the recipe shows 2 at a time"),
        ("network.image_channels = 2", "image_channels is 2, and the recipe shows 1 at a time"),
        ('name = "a/b"', "name is 'a/b' .*without '/'"),
        ('name = ".."', "name is '..'"),
        ('base = 5', "base is 5 .*name the file of another recipe"),
        ('base = "recipe.toml"', "base is 'recipe.toml' .*does not build on it"),
        ('protocol = "asegg"', "no label protocol 'asegg' .*known are aseg"),
        ('more_heads = ["aseg"]', "a head occurs twice: aseg, aseg"),
        ('protocol = "braincolor"', "dataset 'balls' teaches 'aseg', and the heads are brainco"),
        ("fold = [3]", r"fold is \[3\].*write \[K, N\]"),
        ("fold = [5, 2]", r"fold is \[5, 2\].*write \[K, N\]"),
        ("shape = 5", "shape is 5 .*write a table"),
        ("shape.rotatoin = 5", r"unknown keys \['rotatoin'\].*\[shape\].*known are rotation"),
        ("shape.log_scale = [1.0]", r"log_scale is \[1.0\].*\[shape\] – write two numbers"),
        ("mix.real = 0.5", r"real is 0.5 .*nobody reads it.*\[mix\] – write real in the table of"),
        ("mix.t1w = 5", r"t1w is 5 .*\[mix\] – write a number from 0 to 1"),
        ('descent.optimiser = ["a"]', r"optimiser is \['a'\].*\[descent\] – write text"),
        ('descent = {optimiser = "sgd", momentum = 0.0}', "momentum is 0 .*between 0 and 1"),
        ("loss.rim = -1", r"rim is -1 .*\[loss\] – write a whole number from 0 to 64"),
        ("prior_mm.aseg = 0.0", "prior_mm is {'aseg': 0.0} .*a table of numbers from 0.1"),
        ("prior_mm.aesg = 2.0", "prior_mm names aesg, and the heads are aseg"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_told(tmp_path, text, words):
    said = refusal(tmp_path, text)
    assert re.search(words, said), said


@pytest.mark.parametrize(
    ("text", "network", "words"),
    [
        ("network.features = []", "", r"features is \[\].*\[network\] – write at least one"),
        ("network.features = [4, 0]", "", r"features is \[4, 0\].*list of whole numbers from 1"),
        ("network.stem = 3", "", "stem is 3 .*from 1 to 2"),
        ("network.detail = 4\nnetwork.stem = 1", "", "cannot be built .a sub-voxel answer needs"),
        ("network.prior_channels = 12", "", "prior_channels is 12 .*write 0, or .*: 33"),
        ("network.prior_channels = [1]", "", r"prior_channels is \[1\].*write a whole number"),
        ("network.out_channels = 3", "", r"unknown keys \['out_channels'\].*known are network"),
        ("network.network = 'unett'", "", "network is 'unett' .*one of unet, quicknat"),
        ("network.design.up = 'x'", "", "cannot be built .up is 'x', not nearest or transposed"),
        ("network.design.upp = 'x'", "", r"unknown keys \['upp'\].*\[network\], design"),
        ("", "{features = [4]}", "the network has no name .*write network ="),
        ("", QUICKNAT % "kernel = 4", "kernel is 4 .*write an odd number"),
        ("", QUICKNAT % "dropout = 2", "dropout is 2 .*from 0 to 1"),
        ("", QUICKNAT % "view = 'x'", "cannot be built .view is 'x'"),
        ("", MEMBERS % "[]", r"each is \[\].*write at least one"),
        ("", MEMBERS % "[1]", r"each is \[1\].*write a list of tables"),
        ("", MEMBERS % "[{features = [0]}]", r"features is \[0\].*of and each"),
        ("", MEMBERS % "[{design = {age = 4}}]", "or an age, which members do not learn .*unet al"),
        (
            "",
            "{network = 'members', each = [{}], "
            "of = {network = 'unet', features = [4, 8], design = {supervised = 1}}}",
            "a member has coarser answers .*leave out supervised",
        ),
        (
            "places = {kind = 'tiles', begins = [[0, 8], [0], [0]]}", MEMBERS % "[{}]",
            "tiles share the volume among 2 networks, and the recipe has 1 .*network = \"members\"",
        ),
        (
            "places = {kind = 'tiles', begins = [[0], [0], [0]], merged = [1]}", MEMBERS % "[{}]",
            "merged names network 1 of 1 .*from 0",
        ),
        ("places = {kind = 'windows', begins = [[0], [0]]}", "", "begins is .*three lists"),
        ("places = {kind = 'windows', begins = [[0], [], [0]]}", "", "begins is .*three lists"),
        ("places = {kind = 'views', axes = [7]}", "", r"axes is \[7\].*from 0 to 2"),
        ("places = {kind = 'views', axes = [0], slices = 6}", "", "sides that 4 divides"),
        ("places.kind = 'voxels'", "", "'unet' does not answer voxel by voxel .*patches"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_is_told(tmp_path, text, network, words):
    said = refusal(tmp_path, text, network)
    assert re.search(words, said), said


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("merge = [[9999, 0]]", "merge names 9999, which is no label there .*protocol 'aseg'"),
        ("merge = [[5]]", r"merge is \[\[5\]\].*write a list of lists of two whole numbers"),
        ("merge = 5", "merge is 5 .*two whole numbers"),
        ("fill = 9999\nimages = ['T1w']", "fill names 9999, which is no label there"),
        ("fill = 24", "the dataset names none .*balls., fill – add images"),
        ("ignore = [-1]", r"ignore is \[-1\].*from 0"),
        ("first = 0", r"first is 0 .*\[datasets.balls\] – write a whole number from 1"),
        ("weight = -1.0", "weight is -1.0 .*from 0"),
        ("weight = 0", "the weight of every dataset is 0 .*above 0"),
        ("real = 2", "real is 2 .*from 0 to 1"),
        ("images = 'T1w'", "images is 'T1w' .*write a list of texts"),
        ("mix.real = 0.5", r"real is 0.5 .*nobody reads it.*balls\], mix – write real in"),
        ("mix.t9w = 1", r"unknown keys \['t9w'\].*\[datasets.balls\], mix"),
        ("budget.what = 1", r"unknown keys \['what'\].*budget – known are axis, share"),
        ("moved.x = [1.0]", "moved is .*a table of lists of three numbers"),
        ("protocol = 'xx'", "no label protocol 'xx' .*known are aseg"),
        ("head = 'braincolor'", "no mapping leads from 'aseg' to 'braincolor' .*known are"),
        ("head = 'subcortical'", "'balls' teaches 'subcortical', and the heads are aseg"),
    ],
)
def test_a_rule_that_cannot_be_is_told(tmp_path, rules, words):
    said = refusal(tmp_path, f"[datasets.balls]\n{rules}")
    assert re.search(words, said), said


def test_a_recipe_and_networks_that_can_be_are_taken(tmp_path):
    assert load(tmp_path, "").sides == (16, 16, 16)
    two = load(tmp_path, 'channels = ["T2w", "T1w"]\nnetwork.image_channels = 2')
    assert two.channels == ["T2w", "T1w"]
    assert load(tmp_path, "mix.noise = 3.0\nlearning_rate = 1\nfold = [0, 2]").mix.noise == 3
    none = "[datasets.balls]\nreal = 0.3\nmix.real = 0.0"  # as a card's settings have it
    assert load(tmp_path, none).datasets["balls"]["real"] == 0.3
    assert load(tmp_path, "", QUICKNAT % "view = 'axial'").network["view"] == "axial"
    assert load(tmp_path, "", MEMBERS % "[{}, {stem = 1}]").role == "segmenter"


def test_the_command_ends_before_training_begins(tmp_path, capsys):
    (tmp_path / "wrong.toml").write_text(RECIPE.replace("patch = 16", "patch = 15"))
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert main([str(tmp_path / "wrong.toml"), *words]) == UsageError.exit_code == 64
    said = capsys.readouterr().err
    assert said.startswith("tlseg-train: patch is 15") and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_atlas_that_nobody_teaches_is_told(tmp_path):
    recipe = tiny_recipe()
    recipe.more_heads.append("braincolor")
    recipe.network["prior_channels"] = 143
    with pytest.raises(UsageError, match=r"an atlas of 'braincolor', and no dataset.*'tiny'.*add"):
        Training(recipe, write_heads(tmp_path), None)


def test_a_datasets_own_share_of_real_images_is_what_is_drawn(tmp_path, monkeypatch):
    """Beside the 0 that a card's settings have in every table of effects."""
    recipe, drawn = tiny_recipe(), []
    recipe.datasets["balls"] = {"real": 0.3, "mix": {"real": 0.0, "t1w": 1.0}}
    run = Training(recipe, write_heads(tmp_path), None)
    made = draw.example
    monkeypatch.setattr(draw, "example", lambda *given: drawn.append(given[-1]) or made(*given))
    run.draw(run.rng)
    assert (drawn[0].real, drawn[0].t1w) == (0.3, 1.0)
