"""What the documents say of the program is what the program does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tlseg_bids import errors
from tlseg_bids.cli.options import parser
from tlseg_bids.cli.run import BROKEN_PIPE, INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_every_option_is_documented_and_no_other() -> None:
    offered = {name for action in parser()._actions for name in action.option_strings}
    told = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+|-[a-z])\b", USAGE))
    assert told - offered == set(), "documented, but not offered"
    assert offered - told == {"-h", "--help"}, "offered, but not documented"


def test_every_exit_code_is_documented() -> None:
    raised = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.TlsegError)
    }
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", USAGE, re.MULTILINE)}
    assert told == raised | {0, INTERRUPTED, BROKEN_PIPE}


def test_both_images_start_the_same_program() -> None:
    definition = (ROOT / "singularity" / "tlseg.def").read_text(encoding="utf-8")
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)
    script = re.search(r'^%runscript\n\s+exec (.*) "\$@"$', definition, re.MULTILINE)
    assert entry is not None
    assert script is not None
    assert json.loads(entry[1]) == script[1].split()


def test_pytorch_is_pinned_to_one_version() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    inputs = [(ROOT / "container" / f"{name}.in").read_text() for name in ("cpu", "cuda")]
    pins = re.findall(r"(torch==[0-9.]+)", "".join((makefile, *inputs)))
    assert len(pins) == 3
    assert len(set(pins)) == 1


def test_every_page_is_listed() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_every_benchmark_is_listed() -> None:
    told = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    missing = [file.name for file in (ROOT / "benchmarks").glob("*.py") if file.name not in told]
    assert not missing
