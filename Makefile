# Two commands matter: `make demo` and `make test`. Both make .venv on first use.
SHELL := /bin/bash
# Any Python from 3.10 to 3.12; say `make PYTHON=/path/to/python demo` to choose.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test test-fast test-all lint bench chaos docs clean

demo: .venv/installed
	$(BIN)/dede-ray demo

# Two processes: where one waits for Ray, the other computes. A file's tests stay together, for what they share.
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

# The inner loop: what needs no Ray, no job of its own, and trains nothing.
test-fast: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not ray and not trains"

test-all: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python -m tests.benchmarks.speed tests/benchmarks/speed.yaml

chaos: .venv/installed
	$(BIN)/python -m tests.benchmarks.chaos

docs: .venv/docs_installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.venv/docs_installed: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; install one, or: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache
