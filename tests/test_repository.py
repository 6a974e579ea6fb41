"""The laws of the repository itself: what is declared, shipped, linked and kept out."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tlseg_bids import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tlseg_bids"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LARGEST_BYTES = 16 * 2**20
TEXT = {".py", ".md", ".toml", ".tsv", ".html", ".js", ".css", ".json", ".def", ".txt", ""}
# Requirements of which a program or a file is used, and no module.
SILENT_REQUIREMENTS = {"bids-validator-deno", "nilearn"}


def files() -> list[Path]:
    """What git tracks or would track; every test is about that and not about build products."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"),
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    return [(p, p.read_text(encoding="utf-8")) for p in files() if p.suffix in TEXT]


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything that a module imports absolutely, at any depth."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", distribution)[0]).lower()


def test_requirements_are_what_the_package_imports() -> None:
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        names |= imported(ast.parse(path.read_text(encoding="utf-8")))
    foreign = names - set(sys.stdlib_module_names) - {"tlseg_bids", "__future__"}
    providers = importlib.metadata.packages_distributions()
    unknown = sorted(name for name in foreign if name not in providers)
    assert not unknown, f"imported, but not installed: {unknown}"
    extras = PROJECT["project"]["optional-dependencies"]
    optional = extras["harmonise"] + extras["dask"]
    declared = {normal(line) for line in (*PROJECT["project"]["dependencies"], *optional)}
    undeclared = {n for n in foreign if declared.isdisjoint(map(normal, providers[n]))}
    assert not undeclared, f"imported, but not in pyproject.toml: {sorted(undeclared)}"
    used = {normal(d) for name in foreign for d in providers[name]}
    idle = declared - used - SILENT_REQUIREMENTS
    assert not idle, f"in pyproject.toml, but imported nowhere: {sorted(idle)}"


@pytest.mark.parametrize(("script", "target"), sorted(PROJECT["project"]["scripts"].items()))
def test_every_script_has_its_main(script: str, target: str) -> None:
    module, function = target.split(":")
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    assert path.is_file(), f"{script}: {path.relative_to(ROOT)} does not exist"
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert function in {n.name for n in body if isinstance(n, ast.FunctionDef)}


def test_no_file_is_large_and_none_is_a_scan() -> None:
    large = {p.name: p.stat().st_size for p in files() if p.stat().st_size > LARGEST_BYTES}
    assert not large, f"above 16 MiB: {large}"
    binary = re.compile(r"\.(nii|mgz|mgh|dcm|nrrd|pt|pth|pkl)(\.gz)?$")
    scans = [path.name for path in files() if binary.search(path.name)]
    assert not scans, f"data or pickles do not belong here: {scans}"


def test_no_path_of_somebodys_machine() -> None:
    pattern = re.compile(r"(?<![\w.$}])/(?:home|Users|root|work)/\w")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path, text in texts()
        for line in text.splitlines()
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_package_loads_nothing_from_the_network_into_a_page() -> None:
    pattern = re.compile(
        r"""<(?:script|img|iframe|source)[^>]+src\s*=\s*["']?(?:https?:)?//"""
        r"""|<link[^>]+href\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?(?:https?:)?//""",
        re.IGNORECASE,
    )
    found = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for path, text in texts()
        if path.is_relative_to(PACKAGE)
        for match in pattern.finditer(text)
    ]
    assert not found, "\n".join(found)


def test_no_file_is_unpickled_by_the_package() -> None:
    """`torch.load` may read the trainer's own checkpoints, with the safe reader named."""
    guilty = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if imported(tree) & {"pickle", "dill", "cloudpickle", "joblib"}:
            guilty.append(f"{path.relative_to(ROOT)}: imports a pickler")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            unsafe = {
                "torch.load": words.get("weights_only") != "True",
                "np.load": words.get("allow_pickle", "False") != "False",
            }
            if unsafe.get(ast.unparse(call.func)):
                guilty.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert not guilty, "a model is data (ADR 0004):\n" + "\n".join(guilty)


def test_every_decision_is_listed_numbered_and_complete() -> None:
    folder = ROOT / "docs" / "adr"
    pages = sorted(p for p in folder.glob("*.md") if p.name != "README.md")
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [int(p.name[:4]) for p in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix(f"# {page.name[:4]}: ")
        assert f"| [{page.name[:4]}]({page.name}) | {title} |" in index, (
            f"{page.name} is not listed"
        )
        for heading in ("**Decided.**", "**Why.**", "**Costs.**"):
            assert heading in text, f"{page.name} lacks {heading}"


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path, text in texts():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\((?!https?://|mailto:|#)([^)\s]+)\)", text):
            if not (path.parent / target.split("#")[0]).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(__version__)}\]", text, re.MULTILINE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip would install, unpacked."""
    pytest.importorskip("hatchling", reason="hatchling is not installed (extra 'test')")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", folder, ROOT),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("tlseg_bids-*.whl")
    assert f"-{__version__}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(installed: Path) -> None:
    expected = {p.relative_to(ROOT) for p in files() if p.is_relative_to(PACKAGE)}
    shipped = {
        p.relative_to(installed)
        for p in installed.rglob("*")
        if p.is_file() and ".dist-info" not in p.parts[len(installed.parts)]
    }
    assert shipped == expected


def test_the_wheel_finds_its_own_data(installed: Path) -> None:
    code = (
        "import tlseg_bids, importlib.resources as r\n"
        "from tlseg_bids.labels.protocol import load_protocol\n"
        "print(tlseg_bids.__file__, len(load_protocol('aseg')))"
    )
    answer = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=False,
        cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(str(installed)), "another copy of the package was imported"


OFFLINE = """
import importlib, pkgutil, socket, sys
attempts = []
def refuse(*arguments, **_):
    attempts.append(arguments[-1])
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
import tlseg_bids
for module in pkgutil.walk_packages(tlseg_bids.__path__, "tlseg_bids."):
    importlib.import_module(module.name)
heralds = sorted({"etelemetry", "nipype", "templateflow"} & sys.modules.keys())
print(attempts, heralds)
"""


def test_importing_the_package_calls_nobody() -> None:
    """nipype reports to a server when it is imported, and TemplateFlow writes into the home."""
    answer = subprocess.run(
        (sys.executable, "-c", OFFLINE), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[] []"


def test_the_program_starts_without_what_it_seldom_needs() -> None:
    """Each of these takes a third of a second to import."""
    seldom = {"scipy.stats", "scipy.optimize", "nilearn", "sklearn", "statsmodels"}
    code = f"import sys, tlseg_bids.app; print(sorted({seldom!r} & sys.modules.keys()))"
    answer = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert answer.stdout.strip() == "[]"


def contract(folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter", reason="import-linter is not installed (extra 'dev')")
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run((program, "--no-cache"), cwd=folder, capture_output=True, text=True)


def test_imports_go_one_way() -> None:
    answer = contract(ROOT)
    assert answer.returncode == 0, answer.stdout


def test_an_import_against_the_way_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tlseg_bids")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "tlseg_bids" / "errors.py").open("a", encoding="utf-8") as stream:
        stream.write("\nimport tlseg_bids.cli\n")
    answer = contract(tmp_path)
    assert answer.returncode != 0
    assert "tlseg_bids.errors -> tlseg_bids.cli" in answer.stdout
