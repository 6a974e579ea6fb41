"""What reads a file that `fuzz.py` spoiled: every reader of the program, and the program whole."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import toy  # noqa: E402
from tests.datasets import config, make_dataset, table, write_nifti  # noqa: E402
from tests.studies import Person, write_derivatives  # noqa: E402
from tlseg_bids.adapt.labels import look_up_table  # noqa: E402
from tlseg_bids.bids.age import AgeReader  # noqa: E402
from tlseg_bids.bids.discover import check_dataset  # noqa: E402
from tlseg_bids.bids.root import write_root_files  # noqa: E402
from tlseg_bids.bids.sidecar import SidecarReader, contrast_agent, skull_stripped  # noqa: E402
from tlseg_bids.bids.status import read_status  # noqa: E402
from tlseg_bids.cli.options import parser, read_config_file  # noqa: E402
from tlseg_bids.cli.run import main, make_config  # noqa: E402
from tlseg_bids.errors import TlsegError  # noqa: E402
from tlseg_bids.group.run import run_group  # noqa: E402
from tlseg_bids.report.derivatives import all_failures  # noqa: E402
from tlseg_bids.report.subject import write_subject_report  # noqa: E402
from tlseg_bids.segment.model import load_model  # noqa: E402
from tlseg_bids.volume import load_labels, load_scan  # noqa: E402
from tlseg_bids.zoo.bundle import import_model  # noqa: E402
from tlseg_bids.zoo.card_file import read_card  # noqa: E402
from tlseg_bids.zoo.weights import load_weights  # noqa: E402


def put(path: Path, content: bytes) -> Path:
    """Write a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def dataset(folder: Path) -> Path:
    """A dataset of one scan with all its tables."""
    root = folder / "bids"
    if not root.exists():
        make_dataset(root, ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii",), {
            "participants.tsv": table("participant_id|age|sex|site", "sub-01|34|F|a"),
            "participants.json": {"age": {"Units": "years"}},
            "sub-01/sub-01_sessions.tsv": table("session_id|age_months|pma", "ses-1|6|45"),
            "sub-01/ses-1/sub-01_ses-1_scans.tsv":
                table("filename|age_days|acq_time",
                      "anat/sub-01_ses-1_T1w.nii|12|2020-01-01T10:00:00"),
            "sub-01/ses-1/anat/sub-01_ses-1_T1w.json":
                {"SkullStripped": True, "ContrastBolusIngredient": "gadolinium",
                 "Manufacturer": "Siemens", "MagneticFieldStrength": 3},
        })  # fmt: skip
        write_nifti(root / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.nii", (12, 14, 10),
                    np.diag([6.0, 6.0, 6.0, 1.0]))  # fmt: skip
    return root


ENTITIES = {"sub": "01", "ses": "1"}
AGES = (
    "participants.tsv", "sub-01/sub-01_sessions.tsv", "sub-01/ses-1/sub-01_ses-1_scans.tsv",
)  # fmt: skip


def scan_of(root: Path) -> Path:
    """Its scan."""
    return root / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.nii"


def read_image(folder: Path, content: bytes) -> object:
    """A scan, by the magic bytes with the fitting ending; and as labels."""
    path = put(folder / ("x.nii.gz" if content[:2] == b"\x1f\x8b" else "x.nii"), content)
    with suppress(TlsegError):
        load_labels(path)
    return load_scan(path)


def read_sidecar(folder: Path, content: bytes) -> object:
    """A sidecar under inheritance, and what is made of it."""
    path = scan_of(dataset(folder))
    put(path.with_suffix(".json"), content)
    found, problem = SidecarReader(dataset(folder)).metadata(path, ENTITIES, "T1w")
    contrast_agent(found, ENTITIES), skull_stripped(found)
    return said(problem)


def said(problem: str) -> object:
    """Forgiving readers return what they could not read."""
    if problem:
        raise TlsegError(problem)
    return None


def read_age(name: str) -> Callable[[Path, bytes], object]:
    """A table of the dataset, or the JSON beside it, as ages are read."""

    def read(folder: Path, content: bytes) -> object:
        root = dataset(folder)
        for other in AGES:  # a nearer table with an age would hide this one
            if Path(other).stem != Path(name).stem:
                (root / other).unlink(missing_ok=True)
        put(root / name, content)
        age = AgeReader(root).age(scan_of(root), ENTITIES)
        return said(age.source if age.days is None and age.pma_weeks is None else "")

    return read


def read_description(folder: Path, content: bytes) -> object:
    """A dataset's description, and the derivative's, which repeats some of it."""
    root = dataset(folder)
    put(root / "dataset_description.json", content)
    check_dataset(root)
    return write_root_files(folder / "out", root, (), {})


def read_old_description(folder: Path, content: bytes) -> object:
    """The description that lies in the output folder."""
    put(folder / "out2" / "dataset_description.json", content)
    return write_root_files(folder / "out2", dataset(folder), (), {})


def read_options(folder: Path, content: bytes) -> object:
    """A configuration file."""
    values = read_config_file(put(folder / "c.toml", content), parser())
    needed = {"bids_dir": folder, "out_dir": folder / "o", "level": "participant"}
    return make_config({**values, **needed}).to_toml()


def toy_model(folder: Path) -> Path:
    """The card of a small model."""
    path = folder / "models" / "toy.toml"
    return path if path.exists() else toy.write_toy_model(path.parent).path


def read_weights(folder: Path, content: bytes) -> object:
    """Weights whose card states their hash, so that they are opened."""
    card = read_card(toy_model(folder))
    put(folder / "models" / "w.safetensors", content)
    known = replace(card.weights, sha256=hashlib.sha256(content).hexdigest(),
                    bytes=max(1, len(content)), file="w.safetensors")  # fmt: skip
    card = replace(card, weights=known)
    return load_model(card, load_weights(card, offline=True))


def read_model_card(folder: Path, content: bytes) -> object:
    """A card beside sound weights, as far as the networks."""
    toy_model(folder)
    card = read_card(put(folder / "models" / "x.toml", content))
    return load_model(card, load_weights(card, offline=True))


def read_bundle(folder: Path, content: bytes) -> object:
    """A model to be installed."""
    models = folder / "installed"
    shutil.rmtree(models, ignore_errors=True)
    before = {path for path in folder.iterdir() if path != models}
    try:
        return import_model(put(folder / "b.zip", content), models)
    finally:
        stray = {p for p in folder.iterdir() if p != models} - before - {folder / "b.zip"}
        assert not stray, f"written outside: {stray}"


def derivatives(folder: Path) -> Path:
    """An output folder of two labelled scans."""
    out = folder / "deriv"
    if not out.exists():
        (folder / "raw").mkdir()
        sizes = 1000.0 + np.arange(len(toy.PROTOCOL) - 1)
        write_derivatives(out, [Person("01", sizes), Person("02", sizes * 1.1)])
        (folder / "raw" / "participants.tsv").write_text(
            table("participant_id|age|sex", "sub-01|34|F", "sub-02|40|M")
        )
    return out


PERSON = "sub-01/anat/sub-01_space-T1w_seg-aseg"


def read_group(name: str) -> Callable[[Path, bytes], object]:
    """A file of the derivatives, or the participants table, at the level group."""

    def read(folder: Path, content: bytes) -> object:
        out = derivatives(folder)
        put(out / name, content)
        asked = replace(config(folder / "raw", out), level="group", validate=False)
        return run_group(asked)

    return read


def labelled(folder: Path) -> Path:
    """What the toy model made of a scan; `seg-own` is a copy in a protocol of the site."""
    out, root = folder / "labelled", folder / "to-label"
    if not out.exists():
        make_dataset(root, ())
        toy.write_scan(root / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
        participant(root, out, toy_model(folder).parent)
        for file in list((out / "sub-01" / "anat").glob("*seg-aseg*")):
            shutil.copy(file, file.with_name(file.name.replace("seg-aseg", "seg-own")))
        shutil.copy(out / "seg-aseg_dseg.tsv", out / "seg-own_dseg.tsv")
    return out


def participant(root: Path, out: Path, models: Path) -> tuple[int, str]:
    """The level participant with the toy model: exit code, and what it printed."""
    noise = io.StringIO()
    words = ("--models", models, "--model", "toy", "--skip-bids-validation", "--device", "cpu",
             "--nprocs", "1")  # fmt: skip
    with redirect_stderr(noise), redirect_stdout(noise):
        code = main([str(word) for word in (root, out, "participant", *words)])
    return code, noise.getvalue()


def read_report(name: str) -> Callable[[Path, bytes], object]:
    """A file of the derivatives, in the report of its subject."""

    def read(folder: Path, content: bytes) -> object:
        out = labelled(folder)
        sound = (out / name).read_bytes()
        put(out / name, content)
        try:
            return write_subject_report(out, "01", "tlseg", all_failures(out))
        finally:
            put(out / name, sound)

    return read


def read_rated(folder: Path, content: bytes) -> object:
    """Exported ratings, at the level group."""
    ratings = (put(folder / "r" / "x_ratings.tsv", content),)
    asked = replace(config(folder / "raw", derivatives(folder)), level="group", ratings=ratings)
    return run_group(asked)


def read_logs(name: str) -> Callable[[Path, bytes], object]:
    """A plan or a status table, as the status and the report read it."""

    def read(folder: Path, content: bytes) -> object:
        out = folder / "logged"
        put(
            out / "logs" / "plan_20250101T000000Z-a.tsv",
            b"scan\tstatus\tkey\nsub-01/x\tplanned\tk\n",
        )
        put(out / "logs" / name, content)
        all_failures(out)
        return read_status(out)

    return read


def read_front(name: str) -> Callable[[Path, bytes], object]:
    """A file of a dataset, through the whole level participant with the toy model."""

    def read(folder: Path, content: bytes) -> object:
        models, root, out = toy_model(folder).parent, folder / "whole", folder / "whole-out"
        for place in (root, out):
            shutil.rmtree(place, ignore_errors=True)
        make_dataset(root, (), {"participants.tsv": table("participant_id|age", "sub-01|34")})
        toy.write_scan(root / "sub-01" / "anat" / "sub-01_T1w.nii")
        toy.write_scan(root / "sub-02" / "anat" / "sub-02_T1w.nii", 2)
        put(root / name, content)
        code, told = participant(root, out, models)
        crashes = list((out / "logs").glob("crash_*"))
        for crash in crashes:
            assert "tlseg_bids.errors." in crash.read_text(), crash.read_text()
        assert code in (0, 1, 16, 65), f"exit code {code}: {told}"
        other = "sub-02/anat/sub-02_space-T1w_seg-aseg_dseg.json"
        assert code > 1 or (out / other).is_file(), "the other scan was not done"
        return said(told if code else "")

    return read


def read_lut(folder: Path, content: bytes) -> object:
    """The look-up table of a site's labels."""
    put(folder / "lut" / "seg-own_dseg.tsv", content)
    return look_up_table(folder / "lut" / "sub-1_seg-own_dseg.nii.gz", folder / "lut")
