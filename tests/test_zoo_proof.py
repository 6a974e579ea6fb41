"""A model that is not what was exported is found: by hash, shapes, flags or answers."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
import torch
from cards import small_card, write_model
from safetensors.torch import save_file

from tlseg_bids.cli import zoo as command
from tlseg_bids.errors import DataError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import build
from tlseg_bids.zoo.assemble import assemble
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.proof import check_proof, has_proof, main, make_proof, renew
from tlseg_bids.zoo.registry import load_cards
from tlseg_bids.zoo.weights import describe, load_weights

HEADS = ("braincolor", "infant", "aseg")
SIZES = {name: len(load_protocol(name)) for name in HEADS}
NETWORKS = {
    "locator": {"network": "unet", "features": [2, 4], "stem": 2},
    "segmenter": {
        "network": "unet", "features": [3, 4], "stem": 2, "detail": 2, "image_channels": 2,
        "prior_channels": SIZES["infant"] + SIZES["aseg"],
    },
}  # fmt: skip
PREPROCESS = {
    "box_mm": [[-80.0, 80.0], [-100.0, 92.0], [-76.0, 84.0]],
    "locator": {"size": 96},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Three heads, two of them with an atlas, two image channels, sub-voxel answers, a locator."""
    torch.manual_seed(0)
    found = {}
    for role, arguments in NETWORKS.items():
        sizes = list(SIZES.values()) if role == "segmenter" else [SIZES["aseg"]]
        for key, value in build(**arguments, out_channels=sizes).state_dict().items():
            value = value + 0.3 * torch.randn(value.shape)
            found[f"{role}.{key}"] = value.half()
    for name in ("infant", "aseg"):
        found[f"prior.{name}"] = torch.randint(0, 255, (SIZES[name], 10, 12, 10)).to(torch.uint8)
    found["template"] = torch.zeros(SIZES["aseg"], 3)
    return found


def card(**changes) -> ModelCard:
    return small_card(**{
        "protocol": "braincolor", "heads": HEADS, "channels": ("T1w", "T2w"),
        "networks": NETWORKS, "preprocess": PREPROCESS, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def proven(tensors) -> dict[str, torch.Tensor]:
    return {**tensors, **make_proof(card(), tensors)}


def test_a_sound_model_answers_as_stored_and_the_proof_is_small(proven):
    worst = check_proof(card(), proven)
    assert list(worst) == ["locator.0", "segmenter.0", "segmenter.1", "segmenter.2"]
    assert max(worst.values()) < 0.02
    size = sum(v.numel() * v.element_size() for k, v in proven.items() if k.startswith("proof."))
    assert size < 200_000
    assert len(proven["proof.input"]) == 2


def test_question_and_answer_are_the_same_every_time(proven):
    again = make_proof(card(), proven)
    assert all(torch.equal(value, proven[key]) for key, value in again.items())


def test_the_question_tells_left_from_right_and_one_axis_from_another(proven):
    image = proven["proof.input"][0].float()
    for other in (image.flip(0), image.flip(1), image.flip(2), image.permute(1, 0, 2)):
        assert (image - other).abs().mean() > 5


def parameters(tensors):
    return [k for k in tensors if k.startswith(("locator.", "segmenter.")) and tensors[k].dim() > 1]


def test_other_values_in_any_layer_are_found(tensors, proven):
    rng = torch.Generator().manual_seed(1)
    for key in parameters(tensors):
        changed = proven[key].float()
        changed += 0.2 * changed.std() * torch.randn(changed.shape, generator=rng)
        with pytest.raises(DataError, match=r"differ by up to .* from the answer stored at the ex"):
            check_proof(card(), {**proven, key: changed.half()})


def swapped(tensors, first, second):
    return {**tensors, first: tensors[second], second: tensors[first]}


def left_for_right(tensors):
    mirror = torch.as_tensor(load_protocol("aseg").mirror)
    return {**tensors, "segmenter.heads.2.weight": tensors["segmenter.heads.2.weight"][mirror]}


DAMAGED = [
    (lambda t: swapped(t, "segmenter.heads.0.weight", "segmenter.heads.1.weight"),
     f"head 0 of the segmenter has {SIZES['infant']} channels and the protocol 'braincolor' "
     f"{SIZES['braincolor']}"),
    (left_for_right, "the logits of 'segmenter.2' differ by up to"),
    (lambda t: {**t, "prior.aseg": t["prior.aseg"].flip(1)}, "'segmenter.[0-2]' differ"),
    (lambda t: {k: v for k, v in t.items() if ".heads.2." not in k},
     r"the segmenter has 2 heads in its weights and 3 in the card \(braincolor, infant, aseg\)"),
    (lambda t: {k: v for k, v in t.items() if k != "segmenter.up.0.conv1.weight"},
     r"do not fit the network 'segmenter'.*Missing key.*up\.0\.conv1"),
    (lambda t: {**t, "segmenter.prior_weight": torch.tensor(torch.nan).half()},
     "'segmenter.prior_weight' holds what is no finite number"),
    (lambda t: {**t, "segmenter.edges.bias": t["segmenter.edges.bias"].float()},
     "mix precisions: 'locator.* in float16 and 'segmenter.edges.bias' in float32"),
    (lambda t: {**t, "segmenter.heads.x.weight": torch.zeros(2).half()},
     "the segmenter has 4 heads in its weights and 3 in the card"),
    (lambda t: {**t, "segmenter.heads.0.weight": torch.tensor(1.0).half()},
     f"head 0 of the segmenter has 0 channels and the protocol 'braincolor' {SIZES['braincolor']}"),
    (lambda t: {**t, "segmenter.edges.bias": t["segmenter.edges.bias"].to(torch.float8_e4m3fn)},
     "mix precisions: .*'segmenter.edges.bias' in float8_e4m3fn"),
    (lambda t: {**t, "prior.aseg": t["prior.aseg"][:, 0]},
     r"the atlas of 'aseg' has the shape \(\d+, \d+, \d+\) and the type uint8, and not"),
    (lambda t: {**t, "prior.aseg": t["prior.aseg"][:, :0]}, r"'aseg' has the shape \(\d+, 0, "),
    (lambda t: {**t, "prior.aseg": torch.tensor(0)}, r"'aseg' has the shape \(\) and the type int"),
    (lambda t: {**t, "prior.aseg": t["prior.aseg"].float()}, "and the type float32, and not"),
    (lambda t: {**t, "teacher.weight": torch.zeros(1)}, "'teacher.weight' belongs to no network"),
    (lambda t: {**t, "prior.aseg": t["prior.aseg"][1:]}, "the atlas of 'aseg' has .* channels and"),
    (lambda t: {k: v for k, v in t.items() if k != "prior.infant"},
     "the atlases have .* channels and the segmenter takes"),
    (lambda t: {k: v for k, v in t.items() if k != "template"}, "no template for the locator"),
    (lambda t: {**t, "template": t["template"][1:]}, "the template has the shape"),
    (lambda t: {k: v for k, v in t.items() if not k.startswith("proof.")},
     "hold no stored question with its answer – .* – write one with"),
    (lambda t: {k: v for k, v in t.items() if k != "proof.card"},
     "what the card said at the export is missing or damaged"),
    (lambda t: {**t, "proof.card": torch.full((9,), 255, dtype=torch.uint8)},
     "what the card said at the export is missing or damaged"),
    (lambda t: {**t, "proof.card": torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)},
     "what the card said at the export is missing or damaged"),
    (lambda t: {**t, "proof.input": t["proof.input"][0]},
     r"the stored question has the shape \(\d+, \d+, \d+\), and not"),
    (lambda t: {**t, "proof.input": t["proof.input"][:, 1:]},
     r"the stored question has the shape \(2, \d+, \d+, \d+\), and not"),
    (lambda t: {**t, "proof.input": t["proof.input"][:, :0]},
     r"the stored question has the shape \(2, 0, \d+, \d+\), and not"),
    (lambda t: {k: v for k, v in t.items() if k != "proof.segmenter.1"},
     "the stored answer 'proof.segmenter.1' is missing or cut"),
    (lambda t: {**t, "proof.locator.0.mean": t["proof.locator.0.mean"] + 0.01},
     "the mean probabilities of 'locator.0' differ by up to 0.01"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGED, ids=[m[:40] for _, m in DAMAGED])
def test_damage_is_found_and_named(proven, damage, message):
    with pytest.raises(DataError, match=message) as caught:
        check_proof(card(), damage(proven))
    assert caught.value.hint


def network(role, **changes):
    return {"networks": {**NETWORKS, role: {**NETWORKS[role], **changes}}}


def halves(**changes):
    return {
        "strategy": {"name": "sliding", "halves": True, **changes},
        "preprocess": {**PREPROCESS, "spacing_mm": 1.0},
    }


CONTRADICTIONS = [
    ({"heads": ("braincolor", "aseg", "infant")}, "head 0 of the locator has"),
    ({"heads": ("braincolor",)}, "the tensor 'prior.aseg' belongs to no network or head"),
    ({"protocol": "aseg", "heads": ("aseg", "infant", "braincolor")}, "head 0 of the"),
    ({"channels": ()}, "the segmenter takes 2 image channels and the card has 1"),
    ({"channels": ("T2w", "T1w")}, r"'channels' is \[\"T2w\", \"T1w\"\] in the card and was"),
    (network("segmenter", stem=1), "do not fit the network 'segmenter'"),
    (network("segmenter", features=[3, 8]), "do not fit the network 'segmenter'"),
    (network("segmenter", detail=0), "do not fit.*Unexpected key"),
    (network("locator", stem=1), "do not fit the network 'locator'"),
    (network("locator", colour=3), "do not fit the network 'locator'.*unexpected keyword"),
    (network("locator", network="mesh"),
     r"no network 'mesh' – model card '.*', \[networks.locator\] – known are unet"),
    ({"networks": {"segmenter": NETWORKS["segmenter"]}}, "'locator.* belongs to no network"),
    ({"preprocess": {**PREPROCESS, "spacing_mm": 0.5}}, "'preprocess' is .* in the card and was"),
    ({"preprocess": {**PREPROCESS, "box_mm": [[-80, 80], [-80, 80], [-76, 84]]}},
     "voxels of 16 × 13.3 × 16 mm, which are no cubes"),
    ({"preprocess": {**PREPROCESS, "locator": {"size": 98}}}, "shown 98 voxels .* multiples of 4"),
    ({"strategy": {"name": "sliding", "window": 30}}, "the segmenter is shown 30 voxels"),
    (halves(window=64), r"a half of 64 voxels does not reach the middle of 160 – .*window"),
    (halves(window=96, trim=[0, 9, 0]), r"trim \[0, 9, 0\] leaves \[160, 174, 160\] of .* voxels"),
    (halves(window=96, trim=[80, 0, 0]), r"leaves \[0, 192, 160\] .* multiples of 4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), CONTRADICTIONS, ids=[f"{n}" for n in range(len(CONTRADICTIONS))]
)
def test_a_card_that_contradicts_its_weights_is_found(proven, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        check_proof(card(**changes), proven)
    assert caught.value.hint


def test_what_does_not_touch_the_answer_may_be_changed(proven):
    check_proof(card(summary="x", version="2", strategy={"name": "sliding", "window": 64}), proven)


SHARED = [
    ({"name": "whole"}, "the strategy 'whole' asks 1 network and the segmenter has 2"),
    ({"name": "views"}, "the strategy 'views' asks 3 networks and the segmenter has 2 – "),
    ({"name": "tiles", "window": 96, "begins": [[0], [0], [0]]}, "'tiles' asks 1 network and"),
    ({"name": "views", "axes": [2, 1], "merged": [2]},
     r"merged holds 2 and the networks are 0 to 1 – .*\[strategy\], merged"),
    ({"name": "tiles", "window": [160, 100, 160], "begins": [[0], [0, 90], [0]]},
     r"tiles of 100 voxels that begin at \[0, 90\] do not cover the 192 of axis 1 – .*begins"),
    ({"name": "tiles", "window": [160, 100, 160], "begins": [[0], [0, 101], [0]]}, "do not cover"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "message"), SHARED, ids=[m[:40] for _, m in SHARED])
def test_networks_that_share_a_volume_are_asked_all_and_cover_it(strategy, message):
    one = {"network": "unet", "features": [2, 4]}
    networks = {"segmenter": {"network": "members", "of": one, "each": [{}, {}]}}
    state = build(**networks["segmenter"], out_channels=SIZES["aseg"]).state_dict()
    tensors = {f"segmenter.{key}": value for key, value in state.items()}
    preprocess = {"box_mm": PREPROCESS["box_mm"], "spacing_mm": 1.0}
    wrong = small_card(networks=networks, preprocess=preprocess, strategy=strategy)
    assemble(replace(wrong, strategy={"name": "views", "axes": [2, 1], "merged": [1]}), tensors)
    begins = [[0], [0, 92], [0]]
    right = {"name": "tiles", "window": [160, 100, 160], "begins": begins}
    assemble(replace(wrong, strategy=right), tensors)
    with pytest.raises(DataError, match=message) as caught:
        assemble(wrong, tensors)
    assert caught.value.hint


def test_halves_are_for_sub_voxel_answers(tensors):
    blunt = {key: value for key, value in tensors.items() if ".details" not in key}
    blunt = {key: value for key, value in blunt.items() if ".edges" not in key}
    changes = network("segmenter", detail=0) | halves(window=96)
    with pytest.raises(DataError, match="halves and trim are for a segmenter with sub-voxel"):
        assemble(card(**changes), blunt)


# --- the file and the command -----------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "models", "alpha", proven=True)


def verify(model, capsys) -> tuple[int, str]:
    code = command.main(["verify", "alpha", "--models", str(model.path.parent)])
    out, err = capsys.readouterr()
    return code, out + err


def rewrite(model, tensors):
    """Other tensors under a hash that is right, as somebody would who exports carelessly."""
    file = model.path.parent / model.weights.file
    save_file(tensors, file)
    write_card(replace(model, weights=describe(file, "MIT", model.path)), model.path)


def test_verify_tells_what_was_checked(model, capsys):
    code, said = verify(model, capsys)
    assert code == 0
    assert "alpha 1.0: whole" in said
    assert "float32, heads aseg" in said
    assert "answers as stored (within 0.00" in said


def test_verify_says_where_there_is_no_answer_to_compare(tmp_path, capsys):
    model = write_model(tmp_path / "models", "alpha")
    code, said = verify(model, capsys)
    assert code == 0
    assert "no stored answer" in said


def test_one_flipped_bit_anywhere_is_found(model, capsys):
    file = model.path.parent / model.weights.file
    whole = file.read_bytes()
    for at in (9, len(whole) // 2, len(whole) - 1):
        content = bytearray(whole)
        content[at] ^= 1
        file.write_bytes(content)
        code, said = verify(model, capsys)
        assert code == DataError.exit_code
        assert "the weights have the SHA-256" in said


def test_a_head_that_was_exchanged_under_a_right_hash_is_found(model, capsys):
    tensors = load_weights(model)
    rewrite(
        model, {**tensors, "segmenter.heads.0.weight": tensors["segmenter.heads.0.weight"].flip(0)}
    )
    code, said = verify(model, capsys)
    assert code == DataError.exit_code
    assert "the logits of 'segmenter.0' differ by up to" in said


def test_a_flag_that_was_edited_in_the_card_is_found_and_can_be_accepted(model, capsys):
    text = model.path.read_text()
    model.path.write_text(text.replace("spacing_mm = 1.0", "spacing_mm = 2.0"))
    code, said = verify(model, capsys)
    assert code == DataError.exit_code
    assert '\'preprocess\' is {"spacing_mm": 2.0} in the card and was {"spacing_mm": 1.0}' in said
    assert main([str(model.path)]) == 0
    assert read_card(model.path).weights.sha256 in capsys.readouterr().out
    assert verify(model, capsys)[0] == 0


def test_renewing_changes_nothing_but_the_proof(tmp_path):
    before = write_model(tmp_path / "models", "alpha")
    tensors = load_weights(before)
    after = renew(before.path)
    again = load_weights(after)
    assert has_proof(again)
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    assert renew(before.path) == after
    assert replace(after, weights=before.weights) == before
    assert sorted(p.name for p in before.path.parent.iterdir()) == [
        "alpha.safetensors", "alpha.toml",
    ]  # fmt: skip


def test_a_card_without_its_weights_cannot_be_renewed(model, capsys):
    (model.path.parent / model.weights.file).unlink()
    assert main([str(model.path)]) == DataError.exit_code
    assert "proof: the weights do not lie beside the card" in capsys.readouterr().err


@pytest.mark.parametrize("model", load_cards(), ids=lambda card: card.name)
def test_every_model_of_the_package_answers_as_stored(model):
    tensors = load_weights(model, offline=True)
    assert max(check_proof(model, tensors).values()) < 0.02
    assert set(assemble(model, tensors)) == set(model.networks)
    stored = sum(v.numel() * v.element_size() for k, v in tensors.items() if k[:6] == "proof.")
    assert stored < 200_000
    assert tomllib.loads(model.path.read_text())["weights"]["bytes"] == model.weights.bytes
