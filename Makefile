# `make demo` and `make test` are all that a fresh machine needs; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ZERO := .venv/.zero

.PHONY: help setup demo test test-all lint format demo-base clean

help:
	@echo "make demo       set up, then train, prove, compare and report a tiny model on this machine"
	@echo "make test       set up, then run the tests (minutes)"
	@echo "make test-all   the tests and the slow ones"
	@echo "make lint       formatting, lint and types"
	@echo "make demo-base  train the demo's base weights again"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Graftwork needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

# DeepSpeed has no wheel, and its build asks the installed torch.
$(ZERO): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation deepspeed
	@touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/graftwork demo

test: $(READY)
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(ZERO)
	$(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-base: $(READY)
	$(BIN)/python examples/demo-base/make_base.py

clean:
	rm -rf .venv graftwork-demo
