# The contributor's interface. Every target makes its own environment on first use:
#   make demo | test | lint | types | docs | bench | sweep | effects | format | clean
# PYTHON names the interpreter that makes the environment, VENV its folder,
# ARGS what is passed on to the tool (make test ARGS="-k patching").

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs bench sweep effects format clean

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hookgraph needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# torch first: it decides the build (CPU or GPU) that everything else has to fit.
$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[plot]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[dev,docs]'
	@touch $(RUN) $@

demo: $(RUN)
	$(BIN)/hookgraph demo $(ARGS)

test: $(DEV)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python $(ARGS)

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file .mkdocs.yml $(ARGS)

# Large tensors stay on the heap: mapping and unmapping them at each use would be most of the time.
bench: $(DEV)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 MALLOC_MMAP_THRESHOLD_=1073741824 \
	MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=67108864 $(BIN)/python -m benchmarks $(ARGS)

# Every architecture of transformers, built tiny and bound: writes docs/reference/architectures.md.
sweep: $(DEV)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m hookgraph_tests.sweep --write $(ARGS)

# The algorithms against brute force, on each of these architectures; half an hour, or ARGS="--table causal".
effects: $(DEV)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m hookgraph_tests.sweep --effects $(ARGS)

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything the targets above write, except the environment itself.
clean:
	rm -rf build dist hookgraph-demo .pytest_cache .ruff_cache .hypothesis
	find hookgraph hookgraph_tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
