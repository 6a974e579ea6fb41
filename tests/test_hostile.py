"""A hostile dataset through the whole program: what it opens, what it writes, what it shows."""

from __future__ import annotations

import json
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests import toy
from tests.datasets import make_dataset, table
from tlseg_bids.bids.tables import read_json, read_table
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.cli.run import main
from tlseg_bids.config import Config, without_home
from tlseg_bids.errors import CannotCreateError, ScanError
from tlseg_bids.report.subject import write_subject_report
from tlseg_bids.volume import load_scan

SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>"
FORMULA = "=cmd|' /C calc'!A0"
SECRET = "a secret of somebody else"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGING = (
    "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.rmdir", "os.truncate",
    "os.chmod", "os.chown", "shutil.rmtree", "shutil.move",
)  # fmt: skip
CACHES = ("/dev/null", "/dev/shm", "/tmp/", "/proc/self/")
OWN = ("/matplotlib", "__pycache__")
"""Parts of paths of the caches that libraries keep for themselves."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """The folder that holds the dataset ``bids``, the models, and ``outside``."""
    root = tmp_path_factory.mktemp("hostile")
    outside = root / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    bids = make_dataset(root / "bids", (), {
        "dataset_description.json":
            {"Name": SCRIPT, "BIDSVersion": "1.10.0", "DatasetDOI": SCRIPT,
             "DatasetLinks": {"raw": "file:///", "x": "../outside"}},
        "participants.tsv":
            table("participant_id|age|site", f"sub-01|34|{SCRIPT}", f"sub-02|{FORMULA}|{FORMULA}",
                  f"sub-../outside|1|{FORMULA}"),
        "sub-01/anat/sub-01_T1w.json":
            {"Manufacturer": SCRIPT, "InstitutionName": FORMULA, "EchoTime": SCRIPT,
             "ContrastBolusIngredient": "none"},
    })  # fmt: skip
    for name in ("01", "02", "03", "04"):
        toy.write_scan(bids / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz", int(name))
    anat = bids / "sub-01" / "anat"
    shutil.copy(
        anat / "sub-01_T1w.nii.gz", anat / f"sub-01_acq-{SCRIPT.replace('/', '')}_T1w.nii.gz"
    )
    shutil.copy(anat / "sub-01_T1w.nii.gz", anat / "sub-01_acq-..\\..\\up_T1w.nii.gz")
    (anat / "sub-01_run-1_T1w.nii.gz").symlink_to(outside / "secret.txt")
    (anat / "sub-01_run-2_T1w.nii.gz").symlink_to("/dev/zero")
    (bids / "participants.json").symlink_to("/dev/zero")
    os.mkfifo(bids / "sub-03" / "anat" / "sub-03_T1w.json")
    (bids / "sub-04" / "anat" / "sub-04_T1w.json").symlink_to(outside / "secret.txt")
    (bids / "sub-02" / "sub-02_scans.tsv").symlink_to(outside / "secret.txt")
    toy.write_toy_model(root / "models")
    return root


def run(root: Path, level: str, log: Path) -> int:
    """The program in a child that notes what it opens and changes; its exit code."""
    words = [str(root / "bids"), str(root / "out"), level]
    if level == "participant":
        words += ["--models", str(root / "models"), "--model", "toy", "--skip-bids-validation",
                  "--device", "cpu", "--nprocs", "1"]  # fmt: skip
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        note = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event: str, given: tuple) -> None:
            writes = event == "open" and isinstance(given[2], int) and given[2] & WRITING
            if event == "open" or event in CHANGING or event == "socket.connect":
                kind = "write" if writes or event != "open" else "read"
                os.write(note, f"{kind}\t{event}\t{given[0]}\n".encode(errors="replace"))

        sys.addaudithook(hook)
        code = main(words)
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def said(hostile) -> list[tuple[str, str, str]]:
    """Both levels were run: what was opened and changed."""
    log = hostile / "opened"
    assert run(hostile, "participant", log) == 1
    assert run(hostile, "group", log) == 0
    lines = [line.split("\t", 2) for line in log.read_text().splitlines()]
    return [(kind, event, path) for kind, event, path in lines]


def test_nothing_is_written_outside_of_the_output(hostile, said):
    allowed = (str(hostile / "out"), *CACHES)
    strange = [
        line
        for line in said
        if line[0] == "write"
        and not (line[2].startswith(allowed) or line[2].isdecimal())
        and not any(own in line[2] for own in OWN)
    ]
    assert strange == []
    inside = [line for line in said if line[0] == "write" and str(hostile) in line[2]]
    assert len(inside) > 20
    assert all(line[2].startswith(str(hostile / "out")) for line in inside)
    assert [p.name for p in (hostile / "outside").iterdir()] == ["secret.txt"]
    assert (hostile / "outside" / "secret.txt").read_text() == SECRET


def test_nothing_but_the_inputs_is_read(hostile, said):
    known = [str(hostile / name) for name in ("bids", "out", "models")]
    libraries = ("/usr", "/lib", "/proc", "/sys", "/dev", "/etc", sys.prefix, sys.base_prefix,
                 str(Path(__file__).resolve().parents[1]))  # fmt: skip
    strange = [path for kind, event, path in said if kind == "read" and event == "open"
               and path.startswith("/") and not path.startswith((*known, *libraries))
               and "/." not in path and not path.startswith("/tmp/tmp")]  # fmt: skip
    assert strange == []


def test_nobody_is_called(said):
    assert [line for line in said if line[1] == "socket.connect"] == []


def test_what_is_no_scan_is_told_and_the_good_ones_are_done(hostile, said):  # noqa: ARG001
    out = hostile / "out"
    rows = read_table(next((out / "logs").glob("status_*.tsv"))).rows
    told = {row["scan"]: (row["status"], row["error"]) for row in rows}
    done = sorted(scan for scan, (status, _) in told.items() if status == "done")
    assert done == ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz"]
    assert "cannot be read as NIfTI" in told["sub-01/anat/sub-01_run-1_T1w.nii.gz"][1]
    assert "it is not a file" in told["sub-01/anat/sub-01_run-2_T1w.nii.gz"][1]
    assert "is not a regular file" in told["sub-03/anat/sub-03_T1w.nii.gz"][1]
    assert "is not valid JSON" in told["sub-04/anat/sub-04_T1w.nii.gz"][1]
    assert SECRET not in "".join(p.read_text() for p in (out / "logs").iterdir() if p.is_file())


class Page(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.handlers, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_the_pages_show_hostile_text_as_text(hostile, said):  # noqa: ARG001
    plain = Page((hostile / "out" / "sub-02.html").read_text())
    page = Page((hostile / "out" / "sub-01.html").read_text())
    assert page.tags.count("script") == plain.tags.count("script")
    assert page.handlers == []
    assert "<script>alert('x')<script>" in page.text  # in the name of a file
    group = Page((hostile / "out" / "group.html").read_text())
    assert group.handlers == []
    assert "alert" not in "".join(group.tags)


def test_no_cell_runs_in_a_spreadsheet(hostile, said):  # noqa: ARG001
    for path in [*hostile.glob("out/*.tsv"), *hostile.glob("out/sub-*/**/*.tsv"),
                 *hostile.glob("out/logs/*.tsv")]:  # fmt: skip
        cells = [cell for line in path.read_text().splitlines() for cell in line.split("\t")]
        formulas = [cell for cell in cells if cell[:1] in "=+@" and cell]
        assert formulas == [], path.name


@pytest.mark.parametrize("link", ["logs", "sub-01", "sub-01/figures"])
def test_a_link_out_of_the_output_folder_is_not_followed(hostile, tmp_path, link):
    bids = tmp_path / "bids"
    make_dataset(bids, ())
    toy.write_scan(bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    out, elsewhere = bids / "derivatives" / "tlseg", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(elsewhere)
    code = main([str(bids), str(out), "participant", "--models", str(hostile / "models"), "--model",
                 "toy", "--skip-bids-validation", "--device", "cpu", "--nprocs", "1"])  # fmt: skip
    assert code == 73
    assert list(elsewhere.iterdir()) == []


def test_the_sentence_about_a_link_names_it(tmp_path):
    out = tmp_path / "out"
    (out / "sub-01").mkdir(parents=True)
    (out / "sub-01" / "figures").symlink_to(tmp_path)
    with pytest.raises(CannotCreateError, match=r"a link leads out of the output folder, to .* – "
                       r".*figures – remove the link"):  # fmt: skip
        write_subject_report(out, "01", "tlseg")
    (out / "logs").symlink_to(tmp_path)
    with pytest.raises(CannotCreateError, match="a link leads out of the output folder"):
        Derivatives(out, tmp_path / "bids").write_root((), {})


def test_pipes_and_giants_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.json")
    assert read_json(tmp_path / "x.json") == ({}, "is not a regular file")
    os.mkfifo(tmp_path / "x.tsv")
    assert read_table(tmp_path / "x.tsv").problem == "is not a regular file"
    os.mkfifo(tmp_path / "x.nii")
    with pytest.raises(ScanError, match="this is a folder, a pipe or a device – .* – name a NIfTI"):
        load_scan(tmp_path / "x.nii")
    monkeypatch.setattr("tlseg_bids.bids.tables.MOST_BYTES", 10)
    (tmp_path / "y.json").write_text(json.dumps({"a": "long enough"}))
    assert read_json(tmp_path / "y.json")[1] == "has 20 bytes, and at most 10 are read"


def test_no_log_tells_the_users_name(tmp_path, monkeypatch):
    home = tmp_path / "jane"
    monkeypatch.setenv("HOME", str(home))
    said = f"tlseg {home}/bids '{home}' {home}t"
    assert without_home(said) == f"tlseg ~/bids '~' {home}t"
    config = Config(home / "bids", tmp_path, "participant", model_dirs=(home / "models",))
    assert "jane" not in config.to_toml()
    assert 'models = [\n    "~/models",\n]' in config.to_toml()
