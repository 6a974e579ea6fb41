"""The built image answers as the program does (docs/container.md says how to build it)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlseg_bids import __version__

ROOT = Path(__file__).resolve().parents[1]
IMAGE = os.environ.get("TLSEG_TEST_IMAGE", "localhost/tlseg")
PROGRAM = ("/opt/venv/bin/python", "-I", "/opt/tlseg/bids_app_entry.py")
ENVIRONMENT = {**os.environ, "BUILDAH_ISOLATION": "chroot"}


def buildah(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ("buildah", *arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed")
    if buildah("inspect", "--type", "image", IMAGE).returncode:
        pytest.skip(f"there is no image {IMAGE}; docs/container.md says how to build it")
    name = buildah("from", "--pull-never", IMAGE).stdout.strip()
    yield name
    buildah("rm", name)


@pytest.mark.podman
@pytest.mark.slow
def test_the_image_says_its_version_to_a_user_who_owns_nothing_in_it(container: str) -> None:
    answer = buildah("run", "--user", "12345:12345", container, "--", *PROGRAM, "--version")
    assert answer.returncode == 0, answer.stderr
    assert __version__ in answer.stdout


@pytest.mark.podman
@pytest.mark.slow
def test_the_image_holds_what_the_program_imports_when_it_works(container: str) -> None:
    imports = (
        "import torch, niworkflows.utils.bids, nilearn, tlseg_bids.app, sys; print(sys.prefix)"
    )
    answer = buildah(
        "run", "--user", "12345:12345", container, "--", "/opt/venv/bin/python", "-I", "-c", imports
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip().endswith("/opt/venv")


@pytest.mark.podman
def test_the_entry_point_is_the_program(container: str) -> None:
    answer = buildah("inspect", "--format", "{{.OCIv1.Config.Entrypoint}}", container)
    assert answer.stdout.strip() == f"[{' '.join(PROGRAM)}]"


@pytest.mark.podman
def test_the_image_is_nobodys_in_particular_and_says_what_it_is(container: str) -> None:
    answer = buildah(
        "inspect", "--format", "{{.OCIv1.Config.User}} {{.OCIv1.Config.Labels}}", container
    )
    assert answer.stdout.startswith("1000:1000 ")
    assert f"org.opencontainers.image.version:{__version__}" in answer.stdout
    assert "org.opencontainers.image.revision:" in answer.stdout


@pytest.mark.podman
@pytest.mark.slow
def test_the_image_lists_what_is_in_it(container: str) -> None:
    answer = buildah("run", container, "--", "cat", "/opt/tlseg/sbom.cdx.json")
    bill = json.loads(answer.stdout)
    assert bill["bomFormat"] == "CycloneDX"
    assert {"torch", "tlseg-bids", "numpy"} <= {part["name"] for part in bill["components"]}


@pytest.mark.podman
@pytest.mark.slow
def test_what_apptainer_would_run_runs_in_the_image(container: str) -> None:
    """The sections of the definition, in the order in which Apptainer runs them."""
    text = (ROOT / "singularity" / "tlseg.def").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE))
    assert list(sections) == ["labels", "environment", "runscript", "test", "help"]
    environment = sections["environment"]
    for section in ("test", "runscript"):
        script = f"{environment}\nset -- --version\n{sections[section]}"
        answer = buildah("run", "--user", "12345:12345", container, "--", "/bin/sh", "-euc", script)
        assert answer.returncode == 0, answer.stderr
        assert __version__ in answer.stdout
    script = f"{environment}\necho $TLSEG_CONTAINER $MPLCONFIGDIR"
    said = buildah("run", "--user", "12345:12345", container, "--", "/bin/sh", "-euc", script)
    assert said.stdout.split() == [f"singularity:tlseg:{__version__}", "/tmp/matplotlib-12345"]


@pytest.mark.podman
@pytest.mark.slow
@pytest.mark.usefixtures("container")
def test_the_demo_runs_where_nothing_is_allowed(tmp_path: Path) -> None:
    """No network, read-only root and input, a user whom the image does not know."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("tests/container/run.sh needs root and unshare")
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o011)
    demo = tmp_path / "bids"
    subprocess.run((sys.executable, ROOT / "docs" / "demo.py", demo), check=True)
    answer = subprocess.run(
        (ROOT / "tests" / "container" / "run.sh", IMAGE, demo, tmp_path / "out"),
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "sub-MNI152_space-T1w_seg-aseg_dseg.nii.gz" in answer.stdout
    assert (tmp_path / "out" / "sub-MNI152.html").stat().st_uid == 12345
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["GeneratedBy"][0]["Container"]["Tag"] == f"tlseg:{__version__}"
