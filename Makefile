# `make demo` and `make test` work in a fresh clone: they make .venv and install what they need into it.
#   PYTHON=python3.12 make test     another interpreter (the pinned versions need 3.11 or newer)
#   make demo QUICK=1               the same path with a budget of seconds, to see that it works
#   make test ARGS='tests/ops -k delta'    hand arguments to pytest

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
QUICK ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# A stamp is remade when a file that decides what is installed changes, so that nothing is installed twice.
TORCH_STAMP := $(VENV)/.installed-torch
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev

# One thread a worker: two workers on two cores are faster than four threads that fight for them.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help demo test test-all lint typecheck format bench figure clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(TORCH_STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is older than Python 3.11, which the pinned versions need; choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch into $(VENV) ..."
# Alone and first: a loose requirement on torch (another package's) could otherwise choose another build of it.
	@$(PIP) install -c constraints.txt torch
	@touch $@

$(DEMO_STAMP): $(TORCH_STAMP) pyproject.toml
	@echo "Installing intarsia into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(TORCH_STAMP) pyproject.toml
	@echo "Installing intarsia and its development tools into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(DEMO_STAMP)  ## compare three architectures, trained from scratch (6 minutes on 2 cores)
	@$(BIN)/intarsia compare examples/demo.toml $(if $(QUICK),--quick --out runs/demo-quick,--out runs/demo)

test: $(DEV_STAMP)  ## the test suite, without what is marked slow
	@$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(DEV_STAMP)  ## the whole test suite
	@$(PYTEST) $(ARGS)

lint: $(DEV_STAMP)  ## ruff: style, imports and likely mistakes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV_STAMP)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: $(DEV_STAMP)  ## mypy
	@$(BIN)/mypy

bench: $(DEV_STAMP)  ## the benchmarks in short, peers in the same run (benchmarks/README.md has the long forms)
	@$(BIN)/python benchmarks/operators.py --lengths 512,2048 --seconds 1
	@$(BIN)/python benchmarks/cpu.py --quick
	@$(BIN)/python benchmarks/stability.py --preset kimi-linear-nano --steps 100

figure: $(DEMO_STAMP)  ## the README's figure and table from the last demo
	@$(BIN)/python docs/figures/demo.py runs/demo

clean:  ## remove the environment, the caches and the built files; keeps runs/ and cache/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
