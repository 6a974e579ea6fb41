# Everything that a fresh machine with Python 3.11 needs is installed into .venv by the first
# `make demo` or `make test`; a stamp file keeps it from being done twice.

PYTHON ?= python3
# The one place where the build of PyTorch is pinned for development. On a machine with a GPU, or
# to take the small CPU build from PyTorch's own index:
#   make test TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
PYTEST_ARGS ?=
# Tests run side by side, one on a core, as far as memory goes (about 2.5 GB each at most).
WORKERS ?= logical

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint audit coverage format clean

help:
	@echo "make demo    label the MNI152 T1w that ships inside nilearn and say where the report is"
	@echo "make test    run the tests (PYTEST_ARGS='-m \"not slow\"' for a part of them)"
	@echo "make lint    ruff and the import contract"
	@echo "make audit   ask OSV for known weaknesses of the image's pinned requirements"
	@echo "make coverage  the tests with branch coverage, and every raise that none reached"
	@echo "make format  let ruff mend what it can"
	@echo "make clean   remove .venv, demo/ and caches"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tlseg needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)" \
	    "– name another one: make PYTHON=python3.12 test" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed – on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.torch: $(VENV)/.python Makefile
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/.app: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.app

demo: $(VENV)/.app
	$(BIN)/python docs/demo.py demo/bids
	$(BIN)/tlseg demo/bids demo/out participant
	@echo "Report: $(CURDIR)/demo/out/sub-MNI152.html"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 \
	  --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

audit: $(VENV)/.python
	@.ci/audit $(BIN)/python

coverage: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet "coverage>=7.6"
	$(BIN)/python -m coverage run --branch --source tlseg_bids -m pytest $(PYTEST_ARGS)
	$(BIN)/python -m coverage json --quiet -o $(VENV)/coverage.json
	$(BIN)/python benchmarks/raises.py $(VENV)/coverage.json

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .import_linter_cache build dist
