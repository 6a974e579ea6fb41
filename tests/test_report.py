"""The subject's page: what it shows, what it must never let through, and where left is."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.datasets import make_dataset
from tlseg_bids import __version__
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.scan import Age, Scan
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.errors import CannotCreateError, DataError
from tlseg_bids.flow import Job, Outcome, Plan, Refusal, Segmentation, Skip
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol
from tlseg_bids.report import derivatives
from tlseg_bids.report.changes import changes
from tlseg_bids.report.citation import citation
from tlseg_bids.report.display import Display, load_display
from tlseg_bids.report.methods import methods_text
from tlseg_bids.report.mosaic import PLANES, mosaics
from tlseg_bids.report.subject import write_subject_report
from tlseg_bids.report.verdict import asymmetry_percent, verdict, volume_rows
from tlseg_bids.report.viewer import colours_of, label_colormap, viewer_data
from tlseg_bids.volume import Grid, Volume
from tlseg_bids.zoo.card import Domain, ModelCard, Weights
from tlseg_bids.zoo.registry import load_cards

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" & 'so'"
ASEG = load_protocol("aseg")
INDEX = dict(zip(ASEG.table["name"], ASEG.table["index"], strict=True))
COMMAND = "tlseg /data /out participant"


def ball_head(
    shape=(24, 30, 26), spacing=(2.0, 2.0, 2.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A round head in RAS+: thalami left and right, brain stem below; brighter on the left."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(shape) - 1) / 2
    places = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    x, y, z = np.moveaxis(places, -1, 0)
    labels = np.zeros(shape, np.int16)
    labels[(x + 8) ** 2 + y**2 + (z - 6) ** 2 < 49] = INDEX["Left thalamus"]
    labels[(x - 8) ** 2 + y**2 + (z - 6) ** 2 < 49] = INDEX["Right thalamus"]
    labels[x**2 + y**2 + (z + 9) ** 2 < 36] = INDEX["Brain stem"]
    image = np.where(x**2 + y**2 + z**2 < 484, 100.0, 0.0)
    image[(labels > 0) & (x < 0)] = 300
    image[(labels > 0) & (x >= 0)] = 200
    return image.astype(np.int16), labels, affine


def write_scan(
    out: Path, stem="sub-01_space-T1w", sidecar: dict | None = None, array=None, orientation=None
) -> Path:
    """A raw scan in `out`/raw and its derivatives in `out`; returns the dseg."""
    image, labels, affine = array or ball_head()
    if orientation is not None:
        affine = affine @ nib.orientations.inv_ornt_aff(orientation, image.shape)
        image = nib.apply_orientation(image, orientation)
        labels = nib.apply_orientation(labels, orientation)
    subject, suffix = stem.split("_")[0], stem.rpartition("space-")[2]
    raw = out / "raw" / subject / "anat" / f"{stem.replace('_space-', '_')}.nii.gz"
    dseg = out / subject / "anat" / f"{stem}_seg-aseg_dseg.nii.gz"
    for path, data in ((raw, image), (dseg, labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, affine), path)
    (out / "dataset_description.json").write_text(json.dumps({"DatasetLinks": {"raw": "raw"}}))
    source = f"bids:raw:{subject}/anat/{raw.name}"
    content = {
        "Sources": [source], "SpatialReference": source, "Device": "cpu", "PeakMemoryGib": 1.5,
        "Model": {"Name": "any", "Version": "1.2", "Sha256": "ab" * 32, "Licence": "Apache-2.0"},
        "ModelReason": "made for every age", "Seconds": {"segment": 12.25, "write": 0.5},
        "ModelsRefused": [{"Model": "infant", "Reason": "25 years is outside 0 to 2 years"}],
        "Warnings": [], "Flags": [], "QualityControl": {"mean_confidence": 0.912},
        "ContentKey": "00ff", "SkullStripped": True, **(sidecar or {}),
    }  # fmt: skip
    dseg.with_name(f"{stem}_seg-aseg_dseg.json").write_text(json.dumps(content))
    write_volumes(dseg, labels, float(abs(np.linalg.det(affine))))
    assert suffix in ("T1w", "T2w")
    return dseg


def write_volumes(dseg: Path, labels: np.ndarray, voxel_mm3: float) -> None:
    rows = []
    for index, name in zip(ASEG.table["index"], ASEG.table["name"], strict=True):
        count = int((labels == index).sum()) or 5  # every structure present
        rows.append((index, name, count * voxel_mm3, count * voxel_mm3 + 0.5, count, 0.9))
    columns = ["index", "name", "hard_mm3", "soft_mm3", "voxels", "mean_confidence"]
    base = dseg.name.removesuffix("_dseg.nii.gz")
    file = dseg.with_name(f"{base}_desc-volumes_dseg.tsv")
    pd.DataFrame(rows, columns=columns).to_csv(file, sep="\t", index=False)
    file.with_suffix(".json").write_text(json.dumps({"BrainVolume": {"Value": 1234567.0}}))


class Page(HTMLParser):
    """Elements and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._within: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " "
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if not self._within:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(out: Path, subject: str = "01", recorded=None, command: str = COMMAND) -> Page:
    path = write_subject_report(out, subject, command, recorded)
    assert path == out / f"sub-{subject}.html"
    return Page(path.read_text(encoding="utf-8"))


def words(text: str) -> str:
    return " ".join(text.split())


def scan_of(out: Path, name: str) -> Scan:
    subject = name.split("_", maxsplit=1)[0]
    return Scan(out / "raw" / subject / "anat" / name, out / "raw", {"sub": subject[4:]}, "T1w")


def test_a_volume_that_could_not_be_measured_says_why(tmp_path: Path) -> None:
    dseg = write_scan(tmp_path)
    file = dseg.with_name(dseg.name.replace("_dseg.nii.gz", "_desc-volumes_dseg.json"))
    why = "the scan is <b>skull-stripped</b>"
    file.write_text(json.dumps({
        "BrainVolume": {"Value": 1234567.0},
        "IntracranialVolume": {"Value": None, "Reason": why},
    }))  # fmt: skip
    text = words(report(tmp_path).text)
    assert f"Intracranial {why}" in text
    file.write_text(json.dumps({"IntracranialVolume": {"Value": 1456789.0}}))
    assert "Intracranial 1 456 789 mm³" in words(report(tmp_path).text)


def test_page_fetches_nothing(tmp_path: Path) -> None:
    write_scan(tmp_path)
    page = report(tmp_path)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "poster", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    assert not [a for a in page.all("link") if not (a["href"] or "").startswith("data:")]
    assert all("src" not in attributes for attributes in page.all("script"))
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    for attributes in page.all("a"):
        target = attributes["href"] or ""
        local = target.startswith("#") or (tmp_path / target).is_file()
        assert local or target.startswith("https://doi.org/"), target


def test_every_picture_is_described_and_saved(tmp_path: Path) -> None:
    dseg = write_scan(tmp_path)
    page = report(tmp_path)
    pictures = page.all("img")
    assert len(pictures) == 2 * len(PLANES)
    assert len({a["alt"] for a in pictures if len(a["alt"] or "") > 20}) >= len(PLANES) + 1
    assert all((a["alt"] or "").strip() for a in pictures)
    for plane in PLANES:
        name = dseg.name.replace("_dseg.nii.gz", f"_desc-{plane.name}_dseg.jpg")
        with Image.open(tmp_path / "sub-01" / "figures" / name) as picture:
            assert picture.mode == "RGB"
            assert np.asarray(picture).std() > 5


def test_page_tells_what_the_sidecar_tells(tmp_path: Path) -> None:
    write_scan(tmp_path)
    text = words(report(tmp_path).text)
    for said in (
        "any 1.2", "made for every age", "ab" * 32, "25 years is outside 0 to 2 years", "1.50 GiB",
        "12.8 s (segment 12.2, write 0.5)", "mean confidence 0.912", COMMAND,
        "Brain 1 234 567 mm³", "Skull stripped yes", "Apache-2.0", "Left thalamus", "L-THA",
        "no finding", "https://doi.org/10.1038/",
    ):  # fmt: skip
        assert said in text, said


def test_page_tells_which_scans_the_model_saw_together(tmp_path: Path) -> None:
    both = [f"bids:raw:sub-01/anat/sub-01_{suffix}.nii.gz" for suffix in ("T1w", "T2w")]
    write_scan(tmp_path, sidecar={"Sources": both})
    assert f"Seen together with {both[1]}" in words(report(tmp_path).text)


def test_page_reads_what_the_program_writes(tmp_path: Path) -> None:
    """Names of files, keys and columns agree with `bids.write` and `bids.runlog`."""
    image, labels, affine = ball_head()
    raw, out = tmp_path / "my data", tmp_path / "out"
    path = raw / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_run-1_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(image, affine), path)
    (raw / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    entities = {"sub": "01", "ses": "a", "run": "1"}
    scan = Scan(path, raw, entities, "T1w", age=Age(9131.0, None, "participants.tsv"))
    refused = (Refusal("infant", "25 years is too old"),)
    job = Job(scan, card(), "made for every age", refused, ("thick slices",), "77aa", "cpu", 2.0)
    volume = Volume(labels, Grid(labels.shape, affine))
    counts = [int((labels == index).sum()) for index in ASEG.indices]
    volumes = ASEG.table[["index", "name", "abbreviation"]].assign(
        hard_mm3=[8.0 * n for n in counts], soft_mm3=[8.0 * n + 1 for n in counts],
        voxels=counts, mean_confidence=[0.75 if n else np.nan for n in counts],
    )  # fmt: skip
    confidence = np.full(labels.shape, 191, np.uint8)
    found = Segmentation(
        volume, confidence, labels > 0, volumes, {"fill": 0.125}, ("odd shape",),
        verdict="look", reasons=("odd shape", "no units"),
    )  # fmt: skip
    outputs = Derivatives(out, raw)
    outputs.write_root([job.card], {"aseg": ASEG.table})
    provenance = {"seconds": {"label": 3.5}, "peak_memory_gib": 1.25, "scan_warnings": ["no units"]}
    outputs.write_scan(job, found, provenance)
    lost = Scan(path.with_name("sub-01_ses-a_run-2_T1w.nii.gz"), raw, entities, "T1w")
    lost.path.symlink_to("nowhere")
    log = RunLog(out)
    log.write_plan(Plan((job,), (Skip(lost, "the link leads nowhere", "fetch it"),)))
    log.record(Outcome(scan, "failed", error="died", hint="again"))
    log.record(Outcome(scan, "done"))
    page = report(out)
    text = words(page.text)
    for said in (
        "session a, run 1, T1w please check", "odd shape", "no units", "thick slices", "any 1.0",
        "made for every age", "25 years is too old", "fill 0.125", "25.0 years", "3.5 s (label",
        "1.25 GiB", "sub-01_ses-a_run-2_T1w.nii.gz the link leads nowhere What to do: fetch it",
        "0.75", "The verified model 'any'",
    ):  # fmt: skip
        assert said in text, said
    assert "died" not in text
    assert "is not where the sidecar says" not in text
    assert len(page.all("img")) == 2 * len(PLANES)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    write_scan(tmp_path)
    plain = report(tmp_path)
    hostile = {
        "Warnings": [HOSTILE], "ModelReason": HOSTILE, "Device": HOSTILE, HOSTILE: HOSTILE,
        "Model": dict.fromkeys(("Name", "Version", "Sha256", "Licence"), HOSTILE),
        "ModelsRefused": [{"Model": HOSTILE, "Reason": HOSTILE}], "Seconds": {HOSTILE: 1.0},
        "QualityControl": {HOSTILE: HOSTILE}, "ContentKey": HOSTILE,
    }  # fmt: skip
    write_scan(tmp_path, sidecar=hostile)
    failed = {"sub-01/x": derivatives.FailedScan(HOSTILE, HOSTILE, HOSTILE)}
    page = report(tmp_path, recorded=failed, command=HOSTILE)
    assert len(page.all("script")) == len(plain.all("script"))
    assert len(page.all("img")) == len(plain.all("img"))
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert page.text.count("<img src=x onerror=alert(1)>") >= 10
    data = (tmp_path / "sub-01.html").read_text().split('id="page-data">')[1].split("</script>")[0]
    assert json.loads(data)["scans"][0]["key"] == HOSTILE


def test_a_hostile_protocol_table_stays_text(tmp_path: Path) -> None:
    dseg = write_scan(tmp_path)
    for file in list(dseg.parent.iterdir()):
        file.rename(file.with_name(file.name.replace("seg-aseg", "seg-own")))
    table = f"index\tname\tcolor\n0\tnone\t#000000\n10\t{HOSTILE}\turl(x)\n49\tok\t#010203\n"
    (tmp_path / "seg-own_dseg.tsv").write_text(table)
    page = report(tmp_path)
    assert len(page.all("img")) == 2 * len(PLANES)
    assert HOSTILE in page.text
    assert "no result" not in page.text.lower().replace("without a result", "no result")


def test_failed_scans_are_told_with_a_hint(tmp_path: Path) -> None:
    write_scan(tmp_path)
    broken, gone = (scan_of(tmp_path, f"sub-01_run-{n}_T1w.nii.gz") for n in (2, 3))
    other, fine = scan_of(tmp_path, "sub-02_T1w.nii.gz"), scan_of(tmp_path, "sub-01_T1w.nii.gz")
    log = RunLog(tmp_path)
    log.write_plan(Plan((), (Skip(gone, "the link leads nowhere", "run `datalad get`"),)))
    log.record(Outcome(broken, "failed", error="the file is cut short", hint="copy it again"))
    log.record(Outcome(other, "failed", error="of someone else"))
    log.record(Outcome(fine, "done"))
    text = words(report(tmp_path).text)
    assert "sub-01_run-2_T1w.nii.gz the file is cut short What to do: copy it again" in text
    assert "sub-01_run-3_T1w.nii.gz the link leads nowhere What to do: run `datalad get`" in text
    assert "someone else" not in text
    assert "sub-01_T1w.nii.gz" not in text.replace("bids:raw:sub-01/anat/sub-01_T1w.nii.gz", "")


def test_failures_are_read_from_the_logs(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir(parents=True)
    head = "time\tscan\tstatus\terror\thint\n"
    (logs / "status_20250101T000000Z-a.tsv").write_text(
        head + "2025-01-01T00:00:10+00:00\tsub-01/anat/sub-01_T1w.nii.gz\tfailed\told\tn/a\n"
        "2025-01-01T00:00:11+00:00\tsub-01/anat/sub-01_T2w.nii.gz\tfailed\tcut short\tcopy it\n"
        "2025-01-01T00:00:12+00:00\tsub-011/anat/sub-011_T2w.nii.gz\tfailed\tother\tn/a\n"
    )
    (logs / "status_20250102T000000Z-b.tsv").write_text(
        head + "2025-01-02T00:00:10+00:00\tsub-01/anat/sub-01_T1w.nii.gz\tdone\tn/a\tn/a\n"
    )
    skipped = {"Scan": "sub-01/anat/sub-01_run-2_T1w.nii.gz", "Reason": "gone", "Hint": "get it"}
    (logs / "plan_20250102T000000Z-b.json").write_text(json.dumps({"Skipped": [skipped]}))
    (logs / "status_20250102T000000Z-c.tsv").write_text(
        head + "2025-01-02T00:00:10+00:00\tsub-01\tfailed\tclosed\topen it\n"
    )
    found = derivatives.recorded_failures(tmp_path, "01")
    assert [(f.name, f.error, f.hint) for f in found] == [
        ("sub-01", "closed", "open it"),
        ("sub-01_T2w.nii.gz", "cut short", "copy it"),
        ("sub-01_run-2_T1w.nii.gz", "gone", "get it"),
    ]
    page = report(tmp_path)
    assert "cut short" in page.text
    name = "sub-01_T2w.nii.gz"
    now = {f"sub-01/anat/{name}": derivatives.FailedScan(name, "said now")}
    assert "said now" in (text := report(tmp_path, recorded=now).text)
    assert "cut short" not in text


def test_version_and_command_are_those_that_labelled_the_scan(tmp_path: Path) -> None:
    old = {"ProgramVersion": "0.0.7", "Command": "tlseg /then /out participant"}
    write_scan(tmp_path, sidecar=old)
    page = words(report(tmp_path, command="tlseg /now /out participant --reports-only").text)
    assert "labelled with tlseg 0.0.7, a BIDS App" in page
    assert "Program tlseg 0.0.7" in page
    assert "Command tlseg /then /out participant" in page
    assert "Command that made it: tlseg /now /out participant --reports-only" in page
    write_scan(tmp_path, "sub-01_run-2_space-T1w", {**old, "ProgramVersion": "0.0.8"})
    assert "labelled with tlseg 0.0.7 and 0.0.8, a BIDS App" in words(report(tmp_path).text)
    for key in ("ProgramVersion", "Command"):
        write_scan(tmp_path, "sub-02_space-T1w", {**old, key: None})
    page = words(report(tmp_path, "02").text)
    assert "Command not recorded" in page
    write_scan(tmp_path, "sub-02_space-T1w")
    page = words(report(tmp_path, "02").text)
    assert "labelled with tlseg (version not recorded), a BIDS App" in page
    assert "Program tlseg (version not recorded)" in page


def test_a_report_can_be_made_again_from_disk(tmp_path: Path) -> None:
    write_scan(tmp_path)
    first = write_subject_report(tmp_path, "01", COMMAND).read_text()
    second = write_subject_report(tmp_path, "01", COMMAND).read_text()
    made = re.compile(r"Made \d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert made.sub("", first) == made.sub("", second)


def test_labels_are_shown_without_their_scan(tmp_path: Path) -> None:
    write_scan(tmp_path)
    (tmp_path / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz").unlink()
    page = report(tmp_path)
    assert "is not where the sidecar says" in words(page.text)
    assert len(page.all("img")) == 2 * len(PLANES)


def test_a_scan_of_another_shape_is_left_out(tmp_path: Path) -> None:
    write_scan(tmp_path)
    raw = tmp_path / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), raw)
    assert "has another shape than the labels" in words(report(tmp_path).text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (("_dseg.json", b"{"), "is not valid JSON"),
        (("_desc-volumes_dseg.tsv", b""), "_desc-volumes_dseg.tsv is empty"),
        (("_dseg.nii.gz", b"\x1f\x8bnothing"), "not readable: "),
    ],
)
def test_damaged_derivatives_are_told_and_the_others_shown(
    tmp_path: Path, damage: tuple[str, bytes], said: str
) -> None:
    write_scan(tmp_path, "sub-01_space-T1w")
    dseg = write_scan(tmp_path, "sub-01_space-T2w")
    ending, content = damage
    dseg.with_name(dseg.name.replace("_dseg.nii.gz", ending)).write_bytes(content)
    page = report(tmp_path)
    text = words(page.text)
    assert len(page.all("img")) == 2 * len(PLANES)
    assert said in text
    assert "What to do: " in text


def test_unknown_protocol_is_told(tmp_path: Path) -> None:
    dseg = write_scan(tmp_path)
    dseg.rename(dseg.with_name("sub-01_space-T1w_seg-nowhere_dseg.nii.gz"))
    assert "no label protocol 'nowhere'" in words(report(tmp_path).text)
    (tmp_path / "seg-nowhere_dseg.tsv").write_text("number\n1\n")
    assert "columns 'index' and 'name' are missing" in words(report(tmp_path).text)


def test_subject_label_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        write_subject_report(tmp_path, "../01", COMMAND)
    assert "'../01'" in str(caught.value)
    assert "rename the participant" in str(caught.value)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    write_scan(tmp_path)
    (tmp_path / "sub-01" / "figures").write_text("a file")
    with pytest.raises(CannotCreateError) as caught:
        write_subject_report(tmp_path, "01", COMMAND)
    assert "figures" in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("bids:raw:a b.nii", True), ("bids::own.nii", True), ("raw%20data/a%20b.nii", True),
        ("bids:other:a b.nii", False), ("bids:raw:none.nii", False), ("bids:raw", False),
        ("bids:raw:" + "x" * 5000, False), ("\0", False),
    ],
)  # fmt: skip
def test_uris_are_resolved(tmp_path: Path, uri: str, found: bool) -> None:
    raw = tmp_path / "raw data"
    raw.mkdir()
    (raw / "a b.nii").touch()
    (tmp_path / "own.nii").touch()
    for link in ("raw%20data", (tmp_path / "raw data").as_uri()):
        description = {"DatasetLinks": {"raw": link}}
        (tmp_path / "dataset_description.json").write_text(json.dumps(description))
        links = derivatives.dataset_links(tmp_path)
        assert (derivatives.resolve(uri, tmp_path, links) is not None) == found


ORIENTATIONS = [
    np.array(list(zip(axes, signs, strict=True)))
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def test_pictures_are_the_same_in_all_48_orientations(tmp_path: Path, monkeypatch) -> None:
    colours = colours_of(ASEG)
    arrays = ball_head((12, 16, 14), (4.0, 3.5, 3.0))
    monkeypatch.setattr("tlseg_bids.report.mosaic.WIDTH_PX", 360)
    assert len(ORIENTATIONS) == 48
    expected = None
    for orientation in ORIENTATIONS:
        dseg = write_scan(tmp_path, array=arrays, orientation=orientation)
        raw = tmp_path / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
        display = load_display(dseg, raw, ASEG)
        pictures = [(m.grey, m.overlay, m.positions_mm) for m in mosaics(display, colours)]
        expected = expected or pictures
        for (grey, overlay, places), (grey0, overlay0, places0) in zip(
            pictures, expected, strict=True
        ):
            assert np.array_equal(grey, grey0)
            assert np.array_equal(overlay, overlay0)
            assert np.allclose(places, places0)


def test_left_is_on_the_left_and_slices_keep_their_shape(tmp_path: Path) -> None:
    """Voxels of 2 × 3 × 5 mm: a ball stays round, and the left, brighter one stands on the left."""
    dseg = write_scan(tmp_path, array=ball_head((48, 30, 20), (2.0, 3.0, 5.0)))
    raw = tmp_path / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    display = load_display(dseg, raw, ASEG)
    channel = int(np.flatnonzero(ASEG.indices == INDEX["Brain stem"])[0])
    for mosaic in mosaics(display, colours_of(ASEG)):
        shade = 1 + int(np.flatnonzero((mosaic.colours == colours_of(ASEG)[channel]).all(1))[0])
        stem = np.isin(mosaic.overlay, (shade, shade + len(mosaic.colours)))
        columns = min(6, len(mosaic.positions_mm))
        tile_w = mosaic.grey.shape[1] // columns
        tile_h = mosaic.grey.shape[0] // -(-len(mosaic.positions_mm) // columns)
        tiles = [
            (stem[r : r + tile_h, c : c + tile_w], mosaic.grey[r : r + tile_h, c : c + tile_w])
            for r in range(0, mosaic.grey.shape[0], tile_h)
            for c in range(0, mosaic.grey.shape[1], tile_w)
        ]
        mask, _ = max(tiles, key=lambda tile: tile[0].sum())
        rows, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        span = display.box[mosaic.plane.across]
        px_per_mm = tile_w / (span.stop - span.start) / display.spacing_mm[mosaic.plane.across]
        assert np.ptp(rows) / px_per_mm == pytest.approx(12, abs=5.1)
        assert np.ptp(across) / px_per_mm == pytest.approx(12, abs=3.1)
        if mosaic.plane.name != "sagittal":
            bright = [(grey > 215).nonzero()[1] for _, grey in tiles]
            inner = np.concatenate([b[(b > 30) & (b < tile_w - 30)] for b in bright])
            assert inner.mean() < tile_w / 2 - 5


def test_positions_are_world_millimetres(tmp_path: Path) -> None:
    image, labels, affine = ball_head()
    affine[:3, 3] += [100, -200, 300]
    dseg = write_scan(tmp_path, array=(image, labels, affine))
    for mosaic in mosaics(load_display(dseg, None, ASEG), colours_of(ASEG)):
        middle = (mosaic.positions_mm[0] + mosaic.positions_mm[-1]) / 2
        expected = {"x": 100, "y": -200, "z": 299}[mosaic.plane.letter]
        assert middle == pytest.approx(expected, abs=2.1)


def test_more_colours_than_a_palette_holds(monkeypatch) -> None:
    """A protocol of 300 structures in 300 colours needs full colour, and keeps each."""
    monkeypatch.setattr("tlseg_bids.report.mosaic.WIDTH_PX", 360)
    channels = np.arange(8 * 8 * 8, dtype=np.uint16).reshape(8, 8, 8) % 300
    colours = np.stack(np.unravel_index(np.arange(300) * 50, (256, 256, 256))[::-1], 1)
    box = (slice(0, 8),) * 3
    display = Display(None, channels, np.eye(4), (0.0, 1.0), box, box)
    for mosaic in mosaics(display, colours.astype(np.uint8)):
        with Image.open(io.BytesIO(mosaic.overlay_png())) as picture:
            assert picture.mode == "RGBA"
            seen = np.unique(np.asarray(picture)[..., :3].reshape(-1, 3), axis=0)
        assert len(seen) >= len(mosaic.colours)


def test_nan_negative_slope_and_empty_labels(tmp_path: Path) -> None:
    image, labels, affine = ball_head()
    raw, dseg = tmp_path / "raw.nii", tmp_path / "dseg.nii"
    nib.save(nib.Nifti1Image(np.zeros_like(labels), affine), dseg)
    broken = image.astype(np.float32)
    broken[:2] = np.nan
    nib.save(nib.Nifti1Image(broken, affine), raw)
    display = load_display(dseg, raw, ASEG)
    assert display.core == tuple(slice(0, n) for n in labels.shape)
    assert all(m.grey.max() > 100 for m in mosaics(display, colours_of(ASEG)))
    flipped = nib.Nifti1Image(image, affine)
    flipped.header.set_slope_inter(-1, 1000)
    nib.save(flipped, raw)
    shown = load_display(dseg, raw, ASEG)
    assert shown.grey(shown.image)[image == 0].mean() > shown.grey(shown.image)[image == 300].mean()


def unpacked(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def test_viewer_volumes_lie_where_the_labels_lie(tmp_path: Path, monkeypatch) -> None:
    """Coarsened to a fifth of the voxels, oblique: centroids move by less than half a voxel."""
    image, labels, affine = ball_head((48, 30, 20), (1.0, 1.6, 2.4))
    turn = nib.eulerangles.euler2mat(0.2, 0.1, -0.15)
    affine = nib.affines.from_matvec(turn @ affine[:3, :3], [30, -200, 10])
    dseg = write_scan(tmp_path, array=(image, labels, affine))
    raw = tmp_path / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    display = load_display(dseg, raw, ASEG)
    assert display.oblique_degrees == pytest.approx(13, abs=4)
    monkeypatch.setattr("tlseg_bids.report.viewer.VOXELS_PER_SCAN", labels.size // 5)
    data = viewer_data(display)
    small, grey = unpacked(data.labels), unpacked(data.scan)
    assert data.reduced
    assert small.shape == grey.shape
    assert np.prod(small.shape) <= labels.size // 5
    assert np.allclose(small.affine, grey.affine)
    for name in ("Left thalamus", "Right thalamus", "Brain stem"):
        row = int(np.flatnonzero(ASEG.indices == INDEX[name])[0])
        was = nib.affines.apply_affine(affine, np.argwhere(labels == INDEX[name])).mean(0)
        found = np.argwhere(np.asarray(small.dataobj) == row)
        now = nib.affines.apply_affine(small.affine, found).mean(0)
        assert np.linalg.norm(was - now) < 0.5 * max(data.spacing_mm)
        assert np.linalg.norm(np.array(data.places[row]) - now) < 1.01 * max(data.spacing_mm)
    was = centroid(display.grey(display.image), display.affine)
    assert np.linalg.norm(centroid(np.asarray(grey.dataobj), grey.affine) - was) < 0.1


def centroid(grey: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World position of the centre of brightness; averaging voxels leaves it where it was."""
    weights = grey.astype(float)
    at = np.indices(grey.shape).reshape(3, -1)
    return nib.affines.apply_affine(affine, (at * weights.ravel()).sum(1) / weights.sum())


def test_colormap_has_a_node_per_structure_and_a_clear_background() -> None:
    colormap = label_colormap(ASEG)
    assert {len(colormap[key]) for key in "RGBAI"} == {len(ASEG)}
    assert colormap["A"][0] == 0
    assert min(colormap["A"][1:]) == 255
    strange = LabelProtocol("x", ASEG.table.assign(color="red"))
    assert colours_of(strange).tolist() == [[128, 128, 128]] * len(ASEG)


@pytest.mark.parametrize(
    ("left", "right", "percent"), [(110, 90, 20), (90, 110, -20), (5, 0, 200), (3, 3, 0)]
)
def test_asymmetry(left: float, right: float, percent: float) -> None:
    assert asymmetry_percent(left, right) == pytest.approx(percent)
    assert np.isnan(asymmetry_percent(0, 0))


def test_verdict_names_absent_and_uneven_structures(tmp_path: Path) -> None:
    dseg = write_scan(
        tmp_path,
        sidecar={"Warnings": ["age is not given"], "Flags": ["dim"], "ScanWarnings": ["cropped"]},
    )
    file = dseg.with_name(dseg.name.replace("_dseg.nii.gz", "_desc-volumes_dseg.tsv"))
    table = pd.read_csv(file, sep="\t").set_index("name")
    table.loc["Fourth ventricle", "hard_mm3"] = 0
    table.loc["Left hippocampus", "hard_mm3"] = 2 * table.loc["Right hippocampus", "hard_mm3"]
    table.reset_index()[["index", "name", "hard_mm3"]].to_csv(file, sep="\t", index=False)
    (scan,), failed = derivatives.labelled_scans(tmp_path, "01")
    assert not failed
    found = verdict(scan, volume_rows(scan))
    assert found.level == "look"
    assert found.reasons == (
        "dim",
        "cropped",
        "age is not given",
        "no voxel of Fourth ventricle",
        "Hippocampus: left larger by 67 % of the mean of both sides",
    )
    file.unlink()
    (scan,), _ = derivatives.labelled_scans(tmp_path, "01")
    assert "there is no volumes table beside the labels" in verdict(scan, volume_rows(scan)).reasons


def test_the_verdict_in_the_sidecar_is_the_one_that_counts(tmp_path: Path) -> None:
    told = {"Decision": "exclude", "Reasons": ["The image is noisy."]}
    sidecar = {"Verdict": told, "Warnings": ["age is not given"], "Flags": ["dim"]}
    write_scan(tmp_path, sidecar=sidecar)
    (scan,), _ = derivatives.labelled_scans(tmp_path, "01")
    found = verdict(scan, volume_rows(scan))
    assert (found.level, found.words) == ("exclude", "leave out")
    assert found.reasons == ("The image is noisy.",)


def test_a_warning_that_is_no_finding_is_noted(tmp_path: Path) -> None:
    told = {"Verdict": {"Decision": "use", "Reasons": []}, "Warnings": ["the age is not known"]}
    write_scan(tmp_path, sidecar=told)
    text = words(report(tmp_path).text)
    assert "no finding nothing stands out; noted: the age is not known" in text
    assert "no warning" not in text


def test_numbers_of_the_page_are_written_for_people(tmp_path: Path) -> None:
    """No power of ten for a volume, no minus sign before a nought."""
    scores = {"brain_mm3": 1669989.4, "snr": 407.2, "cut_mm2": 999.7, "share": 0.0123, "odd": 1e999}
    dseg = write_scan(tmp_path, sidecar={"QualityControl": scores})
    file = dseg.with_name("sub-01_space-T1w_seg-aseg_desc-volumes_dseg.tsv")
    table = pd.read_csv(file, sep="\t").set_index("name")
    table.loc[["Left caudate", "Right caudate"], "hard_mm3"] = (5733.0, 5735.0)
    table.reset_index().to_csv(file, sep="\t", index=False)
    text = words(report(tmp_path).text)
    for said in ("brain mm3 1 669 989", "snr 407", "cut mm2 1 000", "share 0.0123", "odd inf"):
        assert said in text, said
    assert "L-CAU 5 733" in text
    assert "\u22120.0" not in text.split()


def test_sessions_stand_side_by_side_with_their_change(tmp_path: Path) -> None:
    for days, session in enumerate("ab"):
        age = {"Age": {"Days": 100 + days}}
        write_scan(tmp_path, f"sub-01_ses-{session}_space-T1w", sidecar=age)
    write_scan(tmp_path, "sub-01_ses-b_space-T2w")
    file = next(tmp_path.rglob("*ses-b_space-T1w*_desc-volumes_dseg.tsv"))
    table = pd.read_csv(file, sep="\t").set_index("name")
    before = table.loc["Left hippocampus", "hard_mm3"]
    table.loc["Left hippocampus", "hard_mm3"] = 1.5 * before
    table.loc["Left hippocampus", ["soft_low_mm3", "soft_high_mm3"]] = (11.0, 4321.0)
    table.reset_index().to_csv(file, sep="\t", index=False, na_rep="n/a")
    scans, _ = derivatives.labelled_scans(tmp_path, "01")
    (found,) = changes([(scan, volume_rows(scan)) for scan in scans])
    assert (found.kind, found.titles) == ("T1w", ("session a, T1w", "session b, T1w"))
    rows = {name: (volumes, percent) for name, volumes, percent in found.rows}
    assert rows["Left hippocampus"] == ((before, 1.5 * before), pytest.approx(40))
    assert rows["Right hippocampus"][1] == 0
    text = words(report(tmp_path).text)
    assert "Change between sessions, T1w" in text
    assert "Change between sessions, T2w" not in text
    assert "change from the first to the last session, by age, in percent" in text
    assert text.count("From, mm³ To, mm³") == 1
    assert "11 4 321" in text


def card(**more) -> ModelCard:
    values = {
        "name": "any", "version": "1.0", "status": "verified", "summary": "Trained on all sorts",
        "domain": Domain(), "protocol": "aseg", "networks": {"locator": {}, "segmenter": {}},
        "strategy": {"name": "sliding"}, "preprocess": {},
        "weights": Weights("cd" * 32, 10, "CC0"), **more,
    }  # fmt: skip
    return ModelCard(**values)


def test_methods_text_cites_in_order() -> None:
    text = methods_text(
        [
            card(
                citations=("https://doi.org/10.1016/j.media.2023.102789", "https://example.org/x"),
                evidence=({"dataset": "D", "n": 15, "metric": "dice", "mean": 0.8, "sd": 0.02},),
            ),
            card(name="site", parent="any", citations=("10.1016/j.media.2023.102789",)),
        ],
        "9.9",
    )
    body, references = text.split("## References")
    cited = [int(n) for group in re.findall(r"\[([\d, ]+)\]", body) for n in group.split(",")]
    listed = [int(n) for n in re.findall(r"^(\d+)\. ", references, re.M)]
    assert listed == list(range(1, max(cited) + 1))
    first = list(dict.fromkeys(cited))
    assert first == sorted(first)
    assert "tlseg 9.9" in body
    assert "On D (n = 15) its dice was 0.8 ± 0.02." in body
    assert "adapted from the model 'any'" in body
    assert references.count("SynthSeg") == 1
    assert "<https://example.org/x>" in references


def test_the_citation_names_the_models_of_every_run(tmp_path: Path) -> None:
    out = Derivatives(tmp_path / "out", make_dataset(tmp_path / "raw"))
    cards = {one.name: one for one in load_cards()}
    mine = card(name="mine", version="3", citations=("https://example.org/mine",))
    weights = Weights("ab" * 32, 1, "MIT")
    older = dataclasses.replace(cards["infant"], version="0.1", weights=weights)
    for used in (cards["adult-t1w"], mine, older, cards["any"]):
        out.write_root([used], {})
        text = words(citation(out.out_dir, [used]))
        assert (used is mine) == ("https://example.org/mine" in text)
    assert f"tlseg {__version__}, a BIDS App" in text
    for kept in (cards["adult-t1w"], cards["any"], older):
        assert all(source.removeprefix("https://doi.org/") in text for source in kept.citations)
    assert f"'adult-t1w' (version {cards['adult-t1w'].version}" in text and "'any' (version" in text
    assert f"'infant' (version 0.1, weights sha256 {'ab' * 8}…, licence MIT) gives" in text
    assert (
        f"The model 'mine' (version 3, weights sha256 {'cd' * 8}…, licence CC0) gave labels in an "
        "earlier run. Its card is not at hand: cite what it names, too."
    ) in text


def test_the_citation_names_every_version_that_labelled(tmp_path: Path, monkeypatch) -> None:
    out = Derivatives(tmp_path / "out", make_dataset(tmp_path / "raw"))
    for version in ("0.8", "0.9"):
        monkeypatch.setattr("tlseg_bids.bids.root.__version__", version)
        out.write_root([card()], {})
    assert "labelled with tlseg 0.9 and 0.8, a BIDS App" in citation(out.out_dir, [card()])


def test_methods_follow_the_card() -> None:
    plain = methods_text([card(networks={"segmenter": {}}, strategy={"name": "other"})], "1")
    assert "structures' centroids" not in plain
    assert "overlapping windows" not in plain
    placed = methods_text([card(networks={"segmenter": {}}, preprocess={"placed_by": "any"})], "1")
    assert "The model 'any' found the brain" in placed
    halves = methods_text([card(strategy={"name": "sliding", "halves": True})], "1")
    assert "was applied to each half of the brain, one of them in the mirror" in halves
    assert "overlapping windows" not in halves
    full = methods_text([card()], "1")
    assert "found the brain" not in full
    assert "structures' centroids" in full
    assert "overlapping windows" in full
