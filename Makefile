# Two commands do everything from a clean clone: `make demo` and `make test`. Both set up what they need, once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(or $(shell command -v python3.11),$(shell command -v python3.12),python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.set-up
CONSTRAINTS := .ci/constraints.txt
EDGE := build/edge/libscaphoid_ops_c.so
SOURCES := $(shell find kernels/csrc -type f) kernels/build_ops.py kernels/build_ext.py
NATIVE := $(shell find kernels export tests/kernels bench -name '*.cpp' -o -name '*.h' -o -name '*.cu')
GPU := $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

.PHONY: help setup demo test quick sanitize test-gpu bench-gpu budget edge sbom lint format weights clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## virtual environment, packages, op library; SCAPHOID_CUDA=0: without CUDA, "80 90": for these alone

$(STAMP): pyproject.toml $(CONSTRAINTS) $(SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"scaphoid needs Python 3.11 or 3.12, found {v[0]}.{v[1]}; try: make $(MAKECMDGOALS) PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (7 GB; minutes the first time)"
	$(PIP) install --no-compile -c $(CONSTRAINTS) ninja 'cuda-toolkit[cccl,nvcc]'
	mkdir -p build
# The kernels compile while packages arrive: they need none of them. Python compiles what is imported, when it is.
	$(BIN)/python kernels/build_ops.py edge --out $(EDGE) > build/edge.log 2>&1 & \
	$(PIP) install --no-compile -c $(CONSTRAINTS) torch setuptools wheel; \
	$(PIP) install --no-compile -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'; \
	wait
	@$(BIN)/python -m scaphoid.kernels.library
	touch $@

demo: $(STAMP) ## phantoms, model, export, Triton server, prediction, report: the whole way once
	$(BIN)/python -m scaphoid.bench.demo --out demo

test: $(STAMP) ## all tests
	$(BIN)/pytest -n 2

sanitize: $(STAMP) ## the ops' programs under Address-, UndefinedBehavior- and ThreadSanitizer
	$(BIN)/pytest -n 2 -k "asan or tsan" tests/kernels/test_programs.py

quick: $(STAMP) ## the everyday loop: all tests but the slow ones
	$(BIN)/pytest -q -n 2 -m "not slow"

test-gpu: $(STAMP) ## every op test on the GPU; skipped where there is none
	@if $(GPU); then $(BIN)/pytest -m gpu tests/gpu tests/kernels; \
	else echo "test-gpu: skipped, torch sees no CUDA GPU on this machine"; fi

bench-gpu: $(STAMP) ## every op on the GPU beside its baselines; skipped where there is none
	@if $(GPU); then $(BIN)/scaphoid-bench ops --device cuda; \
	else echo "bench-gpu: skipped, torch sees no CUDA GPU on this machine"; fi

budget: $(STAMP) ## write kernels/budget.toml anew: what each kernel uses on each architecture
	$(BIN)/python -m scaphoid.kernels.budget

edge: ## the C interface alone, without torch or Python, for edge devices: build/edge; needs g++ and ninja
	$(or $(wildcard $(BIN)/python),$(PYTHON)) kernels/build_ops.py edge --out $(EDGE)
	cp kernels/csrc/scaphoid_ops.h $(dir $(EDGE))

lint: $(STAMP) ## ruff, clang-format, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/hadolint triton_repo/deploy/Dockerfile

sbom: $(STAMP) ## bill of materials (CycloneDX) and licences of a bundle: make sbom BUNDLE=repository
	$(BIN)/python -m scaphoid.triton_repo.sbom $(or $(BUNDLE),demo/repository) --out build/sbom

format: $(STAMP) ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

weights: $(STAMP) ## train the shipped demo weights and the learning curves again (hours)
	$(BIN)/python -m scaphoid.trainer.demo_weights

clean: ## remove the environment, the demo and the build; runs/ stays
	rm -rf $(VENV) demo build kernels/*.so *.egg-info
