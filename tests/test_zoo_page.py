"""A page per model, written from its card, and the pages that are there are current."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cards import evidence, small_card
from PIL import Image

from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.zoo.card import Domain, Weights
from tlseg_bids.zoo.page import page
from tlseg_bids.zoo.registry import load_cards

FOLDER = Path(__file__).parents[1] / "docs" / "models"
MAKE = FOLDER / "make.py"


@pytest.fixture(scope="module")
def make():
    return runpy.run_path(str(MAKE))


ASEG, BRAINCOLOR = [len(load_protocol(name)) - 1 for name in ("aseg", "braincolor")]
BOUND = small_card(
    "bound",
    version="2.1",
    summary="Labels <b>adults</b>.",
    heads=("aseg", "braincolor"),
    domain=Domain(("T1w",), (18, 90), False, None, (0.5, 2.0)),
    weights=Weights("ab" * 32, 2**20, "CC-BY-NC-3.0 AND MIT", "bound.safetensors"),
    parent="any",
    evidence=(evidence(suffixes=["T1w"], age_years=[19, 34], how="five folds | cross-validated"),),
    known_failures=("Lesions <are> missed.",),
    citations=("10.1000/x", "https://example.org/y"),
    training={
        "data": [
            {"dataset": "malc", "licence": "CC BY-NC 3.0", "subjects": {"1": "ff", "2": "0"}},
            {"dataset": "labelmaps", "licence": "MIT", "subjects": {}},
        ],
        "segmenter": {
            "recipe": "r", "seed": 3, "steps": 50, "seconds": 5400, "started_from": ["any 0.1"],
            "curve_loss": [0.9, 0.5, 0.1], "curve_soft_dice": [0.2, 0.2],
        },
    },
)  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "# bound",
        "Labels &lt;b>adults&lt;/b>.",
        "| version | 2.1, experimental |",
        f"| labels | `aseg` ({ASEG} structures), `braincolor` ({BRAINCOLOR} structures) |",
        "| adapted from | `any` |",
        f"| weights | 1.0 MiB, SHA-256 `{'ab' * 32}` |",
        "- Ages from 18.0 years to 90.0 years; a scan of unknown age is refused.",
        "- Without contrast agent only.",
        "- Voxel edges from 0.5 to 2 mm.",
        "| malc | T1w | 19–34 | 15 | dice | – | 0.800 ± 0.050 | five folds \\| cross-validated |",
        "- Lesions &lt;are> missed.",
        "| malc | CC BY-NC 3.0 | 2 |",
        "| labelmaps | MIT | 0 |",
        "The card holds the SHA-256 of the files of each of the 2 subjects.",
        "| started from | any 0.1 |",
        "| time | 1.5 hours |",
        "| loss | █▅▁ from 0.9 to 0.1 |",
        "| soft Dice in training | ▁▁ from 0.2 to 0.2 |",
        "**CC-BY-NC-3.0 AND MIT**",
        "- <https://doi.org/10.1000/x>",
        "- <https://example.org/y>",
    ],
)
def test_a_page_says_what_the_card_says(line):
    assert line in page(BOUND).splitlines()


def test_the_licence_says_why():
    text = page(BOUND)
    assert "Not every use is allowed because of malc" in text
    assert "`--licence permissive` leaves this model out" in text
    free = replace(BOUND, weights=replace(BOUND.weights, licence="MIT"), training={})
    assert "Every use is allowed" in page(free)


def test_a_bare_card_has_a_page_too():
    text = page(small_card())
    for line in ("Nothing was measured.", "None is written down.", "The card says nothing of it."):
        assert line in text
    assert "- Any age, also where the age is not known." in text


def test_headings_are_not_broken_by_a_card():
    text = page(replace(BOUND, summary="one\n# two\n\n## three", known_failures=("a\n\n# b",)))
    assert re.findall(r"^# .*", text, re.MULTILINE) == ["# bound"]


def test_every_page_is_current():
    answer = subprocess.run(
        (sys.executable, MAKE, "--check"), capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stdout.strip()) == (0, "all current"), answer.stderr
    for card in load_cards():
        assert (FOLDER / f"{card.name}.md").is_file()


def test_a_page_that_is_old_missing_or_without_a_card_is_named(make, tmp_path):
    for name, text in make["pages"]([BOUND], tmp_path).items():
        (tmp_path / name).write_text(text)
    assert make["stale"]([BOUND], tmp_path) == []
    assert make["stale"]([replace(BOUND, version="2.2")], tmp_path) == ["README.md", "bound.md"]
    assert make["stale"]([], tmp_path) == ["README.md", "bound.md"]
    (tmp_path / "bound.md").unlink()
    (tmp_path / "gone.png").write_bytes(b"")
    assert make["stale"]([BOUND], tmp_path) == ["bound.md", "gone.png"]


def test_the_picture_is_small_and_says_what_it_shows(make, tmp_path):
    protocol = load_protocol("aseg")
    shape, affine = (60, 70, 50), np.diag([3.0, 3, 3, 1])
    labels = np.zeros(shape, np.int16)
    labels[10:50, 10:60, 10:40] = protocol.indices[1]
    labels[30:50, 10:60, 10:40] = protocol.indices[2]
    noise = np.random.default_rng(0).integers(0, 1000, shape, np.int16)
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "dseg.nii.gz")
    nib.save(nib.Nifti1Image(noise, affine), tmp_path / "scan.nii.gz")
    content = make["draw"](small_card(), tmp_path / "scan.nii.gz", tmp_path / "dseg.nii.gz", "It")
    assert len(content) <= 300_000
    (tmp_path / "small.png").write_bytes(content)
    assert make["caption_of"](tmp_path / "small.png") == "It"
    text = make["pages"]([small_card()], tmp_path)["small.md"]
    assert "![It](small.png)\n\n*It*" in text
    with Image.open(tmp_path / "small.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels.max(-1) - pixels.min(-1)).max() > 30  # labels are coloured


def test_pictures_are_small_and_have_a_caption(make):
    pictures = sorted(FOLDER.glob("*.png"))
    assert "any.png" in {picture.name for picture in pictures}
    for picture in pictures:
        assert picture.stat().st_size <= 300_000
        assert make["caption_of"](picture)
