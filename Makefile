# Two commands do everything from a clean clone: `make demo` and `make test`. Both set up what they need, once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(or $(shell command -v python3.11),$(shell command -v python3.12),python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.set-up
CONSTRAINTS := .ci/constraints.txt
SOURCES := $(shell find kernels/csrc -name "*.cpp" -o -name "*.h" 2>/dev/null)

.PHONY: help setup demo test quick lint format weights clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## virtual environment, packages, op library

$(STAMP): pyproject.toml $(CONSTRAINTS) $(SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"scaphoid needs Python 3.11 or 3.12, found {v[0]}.{v[1]}; try: make $(MAKECMDGOALS) PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (7 GB; minutes the first time)"
	$(PIP) install -c $(CONSTRAINTS) torch setuptools wheel ninja
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(STAMP) ## phantoms, model, export, Triton server, prediction, report: the whole way once
	$(BIN)/python -m scaphoid.bench.demo --out demo

test: $(STAMP) ## all tests
	$(BIN)/pytest

quick: $(STAMP) ## the everyday loop: all tests but the slow ones
	$(BIN)/pytest -q -n 2 -m "not slow"

lint: $(STAMP) ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find kernels/csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(STAMP) ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find kernels/csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

weights: $(STAMP) ## train the shipped demo weights and the learning curves again (hours)
	$(BIN)/python -m scaphoid.trainer.demo_weights

clean: ## remove the environment, the demo and the build; runs/ stays
	rm -rf $(VENV) demo build kernels/*.so *.egg-info
