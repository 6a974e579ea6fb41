"""The built image answers as the program does (docs/container.md says how to build it)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tlseg_bids import __version__

IMAGE = "localhost/tlseg"
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
