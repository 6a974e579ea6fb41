#!/usr/bin/env bash
# Pin and hash what goes into the image: container/requirements-*.txt.
#
#   container/lock.sh [option of `uv pip compile` …]
#
# Run it when pyproject.toml or container/*.in changes; it needs uv (pip install uv). The CPU build of
# PyTorch comes from PyTorch's own index, or, where that cannot be reached, from a folder of wheels:
#   container/lock.sh --find-links /path/to/wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock() { # lock VARIANT SOURCE... -- OPTION...
  local variant=$1
  shift
  CUSTOM_COMPILE_COMMAND=container/lock.sh uv pip compile --quiet --generate-hashes \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-index-url \
    --custom-compile-command container/lock.sh \
    --output-file "container/requirements-$variant.txt" "$@"
}

pytorch=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
[ $# = 0 ] || pytorch=("$@")
lock cpu pyproject.toml --extra dask container/cpu.in "${pytorch[@]}"
lock cuda pyproject.toml --extra dask container/cuda.in
lock alone --no-deps container/alone.in
lock build container/build.in
