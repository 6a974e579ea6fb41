"""Every command of the documents: bash reads it, and the program that it names understands it.

Each block is run by bash where every program is a stand-in that notes its command line. So loops,
variables and quotes are bash's own business, and a program that no test knows is an error.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tlseg_bids.cli import evaluate, launch, options, status, train, zoo
from tlseg_bids.cli.run import make_config
from tlseg_bids.errors import TlsegError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if "```bash" in path.read_text(encoding="utf-8")
)
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMAGES = ("tlseg", "tlseg:cuda", "tlseg.sif")
NOTE = """#!{python} -IS
import json, sys
with open({log!r}, "a") as log:
    print(json.dumps([{name!r}, *sys.argv[1:]]), file=log)
"""


def tlseg(words: list[str]) -> None:
    make_config({**options.parse(words)})


def tlseg_run(words: list[str]) -> None:
    _, rest = launch.parser().parse_known_args(words)
    tlseg(rest)


def tlseg_train(words: list[str]) -> None:
    parsers = {"export": train.export_parser, "pack": train.pack_parser}
    parser = parsers.get(words[0])
    given = parser().parse_args(words[1:]) if parser else train.parser().parse_args(words)
    named = given.card if parser else given.recipe
    assert named.parts[0] != "tlseg_bids" or (ROOT / named).is_file(), f"there is no {named}"


def python(words: list[str]) -> None:
    """A script knows its options; what follows a ``--`` it hands on to the app."""
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    end = words.index("--") if "--" in words else len(words)
    unknown = [word for word in words[1:end] if word.startswith("--") and f'"{word}"' not in text]
    assert not unknown, f"{words[0]} has no {unknown}"
    if rest := words[end + 1 :]:
        tlseg(["bids", "out", "participant", *rest])


def torchrun(words: list[str]) -> None:
    torch_run = pytest.importorskip("torch.distributed.run")
    given = torch_run.get_args_parser().parse_args(words)
    assert (given.module, given.training_script) == (True, "tlseg_bids.cli.train")
    tlseg_train(given.training_script_args)


def in_image(words: list[str]) -> None:
    image = next(n for n, word in enumerate(words) if word in IMAGES)
    tlseg(words[image + 1 :])


def docker(words: list[str]) -> None:
    if words[0] == "run":
        in_image(words)
    elif words[0] == "build":
        given = [words[n + 1].partition("=")[0] for n, w in enumerate(words) if w == "--build-arg"]
        assert set(given) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
        assert words[words.index("-t") + 1] in IMAGES
    else:
        assert words == ["save", "tlseg:latest", "-o", "tlseg.tar"]


def apptainer(words: list[str]) -> None:
    if words[0] == "run":
        in_image(words)
    else:
        assert words == ["build", "tlseg.sif", "singularity/tlseg.def"]
        assert (ROOT / words[2]).is_file()


def sbatch(words: list[str]) -> None:
    """Slurm's own check is in tests/cluster."""
    if "--wrap" in words:
        program, *rest = shlex.split(words[words.index("--wrap") + 1])
        return PROGRAMS[program](rest)
    script = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
    done = subprocess.run(["bash", "-n", ROOT / words[script]], check=False)
    assert done.returncode == 0
    if "train" in words[script]:
        return tlseg_train(words[script + 1 :])
    return tlseg([*words[script + 1 : script + 3], "participant", *words[script + 3 :]])


def dask(words: list[str]) -> None:
    command = pytest.importorskip(f"distributed.cli.dask_{words[0]}").main
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known


def pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = re.match(r"tlseg-bids\[(.*)\]$", words[1])
    assert words[1] == "." or extras
    assert not extras or set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words)


def pytest_(words: list[str]) -> None:
    assert (ROOT / words[0]).exists()


def apt_get(words: list[str]) -> None:
    assert words[:2] == ["install", "-y"]


def git(words: list[str]) -> None:
    verb, action, _, commit = words
    assert (verb, action) == ("worktree", "add")
    assert re.fullmatch(r"[0-9a-f]{7,40}", commit), commit


def script(words: list[str]) -> None:
    assert words, "it is named with its arguments"


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "tlseg": tlseg, "tlseg-run": tlseg_run, "tlseg-train": tlseg_train, "torchrun": torchrun,
    "tlseg-status": lambda words: status.parser().parse_args(words),
    "tlseg-evaluate": lambda words: evaluate.parser().parse_args(words),
    "tlseg-zoo": lambda words: zoo.parser().parse_args(words),
    "python": python, "docker": docker, "apptainer": apptainer, "sbatch": sbatch, "dask": dask,
    "pip": pip, "make": make, "pytest": pytest_, "apt-get": apt_get, "git": git,
    "tests/container/build.sh": script, "tests/container/run.sh": script,
}  # fmt: skip


def commands(block: str, folder: Path) -> list[list[str]]:
    """What bash calls in a block, in a folder where only stand-ins can be found."""
    log = folder / "log"
    for name in PROGRAMS:
        path = folder / ("" if "/" in name else "bin") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTE.format(python=sys.executable, log=str(log), name=name))
        path.chmod(0o755)
    (folder / "bin" / "id").symlink_to(shutil.which("id"))
    done = subprocess.run(
        [shutil.which("bash"), "-euc", block + "\nwait"], cwd=folder, capture_output=True,
        text=True, env={"PATH": str(folder / "bin"), "DATA": "data", "HOME": os.devnull},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def understand(block: str, folder: Path) -> None:
    """Let every program that a block calls look at its command line."""
    called = commands(block, folder)
    assert called, block
    for name, *words in called:
        try:
            PROGRAMS[name](words)
        except SystemExit as stop:
            raise AssertionError(f"{name} refuses {words}") from stop


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for number, block in enumerate(blocks):
        folder = tmp_path / str(number)
        folder.mkdir()
        understand(block, folder)


@pytest.mark.parametrize(
    "block",
    [
        "tlseg BIDS_DIR OUT_DIR participants", "tlseg BIDS_DIR OUT_DIR participant --no-such",
        "nonsense", "tlseg 'BIDS", "python benchmarks/scale.py --no-such", "python gone.py",
        "pip install 'tlseg-bids[gone]'", "make gone", "docker build --build-arg GONE=1 -t tlseg .",
        "tlseg-train tlseg_bids/train/recipes/gone.toml --data $DATA", "dask worker --no-such",
        "sbatch --array=1-4 singularity/tlseg.sbatch BIDS_DIR OUT_DIR --no-such",
        "torchrun -m tlseg_bids.cli.train RECIPE.toml",
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(block, tmp_path):
    with pytest.raises((AssertionError, TlsegError, OSError)):
        understand(block, tmp_path)
