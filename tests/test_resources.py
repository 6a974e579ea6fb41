"""Memory that the process keeps, and memory that is free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tlseg_bids import resources

FAULTS = """
import resource, sys, threading
import numpy as np
from tlseg_bids.resources import reuse_freed_memory
if sys.argv[1] == "kept":
    assert reuse_freed_memory()
def work():
    for _ in range(20):
        bytearray(40_000_000)
thread = threading.Thread(target=work)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_freed_memory_is_used_again_by_every_thread():
    faults = {}
    for name in ("kept", "given back"):
        command = [sys.executable, "-c", FAULTS, name]
        done = subprocess.run(command, env=CLEAN, capture_output=True, text=True, check=True)
        faults[name] = int(done.stdout)
    assert faults["kept"] < faults["given back"] / 5, faults


def test_the_environment_has_the_last_word_on_memory(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert not resources.reuse_freed_memory()


def test_a_system_without_the_file_has_unknown_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "MEMORY", tmp_path / "none")
    assert resources.available_memory_gib() is None
    (tmp_path / "none").write_text("MemAvailable: 2097152 kB\n")
    assert resources.available_memory_gib() == 2.0
