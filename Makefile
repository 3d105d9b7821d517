# `make demo` and `make test` work in a fresh clone: they make .venv and install what they need into it.
#   PYTHON=python3.12 make test     another interpreter (the pinned versions need 3.11 or newer)
#   make demo QUICK=1               the same path with a budget of seconds, to see that it works
#   make test ARGS='tests/ops -k delta'    hand arguments to pytest; its own: --device cuda, --threads 2, --trials 20
#   INTARSIA_NATIVE=off make test   without the C++ kernels; what else the variable can say: docs/install.md

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
QUICK ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# A stamp is remade when a file that decides what is installed changes, so that nothing is installed twice.
TORCH_STAMP := $(VENV)/.installed-torch
BUILD_STAMP := $(VENV)/.installed-build
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev

CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp)
PACKAGE := pyproject.toml csrc/CMakeLists.txt $(CXX_FILES)
# Compiled with the pinned tools of .venv and not in an environment of its own, which would be another at each build:
# then a change of one C++ file compiles one file.
INSTALL := $(PIP) install -c constraints.txt --no-build-isolation

# One thread a worker: two workers on two cores are faster than four threads that fight for them.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help demo test test-all test-processors mutants native sanitize lint typecheck format bench figure clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(TORCH_STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is older than Python 3.11, which the pinned versions need; choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch into $(VENV) ..."
# Alone and first: a loose requirement on torch (another package's) could otherwise choose another build of it.
	@$(PIP) install -c constraints.txt torch
	@touch $@

$(BUILD_STAMP): $(TORCH_STAMP)
	@$(PIP) install -c constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@

# To look at the demonstration one needs no compiler, to work on the package one does.
$(DEMO_STAMP): $(BUILD_STAMP) $(PACKAGE)
	@echo "Installing intarsia into $(VENV) ..."
	@$(INSTALL) -e .
	@$(BIN)/python -c 'from intarsia.ops import native; native.warn_if_missing()'
	@touch $@

$(DEV_STAMP): $(BUILD_STAMP) $(PACKAGE)
	@echo "Installing intarsia and its development tools into $(VENV) ..."
# AMX's kernels are tested wherever they compile, with its tiles in software.
	@INTARSIA_NATIVE=$${INTARSIA_NATIVE:-required} $(INSTALL) -C cmake.define.INTARSIA_EMULATE_AMX=ON -e '.[dev]'
	@touch $(DEMO_STAMP) $@

demo: $(DEMO_STAMP)  ## compare three architectures, trained from scratch (4 minutes on 2 cores)
	@$(BIN)/intarsia compare examples/demo.toml $(if $(QUICK),--quick --out runs/demo-quick,--out runs/demo)

test: $(DEV_STAMP)  ## the test suite, without what is marked slow
	@$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(DEV_STAMP)  ## the whole test suite
	@$(PYTEST) $(ARGS)

test-processors: $(DEV_STAMP)  ## the numeric tests as on other processors, error budgets with 20 draws (hours; ARGS=--quick: 3 minutes)
	@$(BIN)/python tests/processors.py -n $(JOBS) $(ARGS)

mutants: $(DEV_STAMP)  ## break the code in many ways, in a copy, and see whether the nearest tests notice (ARGS='--only loader')
	@$(BIN)/python tests/mutants -n $(JOBS) $(ARGS)

native: $(DEV_STAMP)  ## compile what changed in csrc/ and install it into .venv (`make test` does it too)

# AddressSanitizer must be the first library in the process, hence LD_PRELOAD. The instrumented kernels stand in an
# environment of their own, which finds everything else in .venv: a path there adds .venv's libraries, but not its
# editable installation of this package.
SANITIZE := build/sanitize
sanitize: $(DEV_STAMP)  ## the operators' tests with AddressSanitizer and UndefinedBehaviorSanitizer in the kernels, and AMX emulated (gcc)
	@test -d $(SANITIZE)/venv || $(BIN)/python -m venv --without-pip $(SANITIZE)/venv
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(SANITIZE)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	@INTARSIA_NATIVE=required $(PIP) --python $(SANITIZE)/venv/bin/python install --no-build-isolation --no-deps \
	  --force-reinstall -C build-dir=$(SANITIZE)/cmake -C cmake.define.INTARSIA_SANITIZE=ON \
	  -C cmake.define.INTARSIA_EMULATE_AMX=ON -C install.strip=false .
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  $(SANITIZE)/venv/bin/python -m pytest -n $(JOBS) -m 'not slow' $(or $(ARGS),tests/ops)

lint: $(DEV_STAMP)  ## ruff: style, imports and likely mistakes; clang-format: the style of the C++
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(DEV_STAMP)  ## let ruff and clang-format mend what they can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES)

typecheck: $(DEV_STAMP)  ## mypy
	@$(BIN)/mypy

bench: $(DEV_STAMP)  ## the benchmarks in short, peers in the same run (benchmarks/README.md has the long forms)
	@$(BIN)/python benchmarks/operators.py --lengths 512,2048 --seconds 1
	@$(BIN)/python benchmarks/cpu --quick
	@$(BIN)/python benchmarks/layers.py --lengths 1,512 --seconds 0.3
	@$(BIN)/python benchmarks/products.py --rows 1,8 --seconds 0.5
	@$(BIN)/python benchmarks/dplr.py --lengths 512,2048 --seconds 1
	@$(BIN)/python benchmarks/stability.py --preset kimi-linear-nano --steps 100
	@$(BIN)/python benchmarks/mixers.py --mixers kda,mamba2 --steps 20
	@$(BIN)/python benchmarks/exams.py --quick

figure: $(DEMO_STAMP)  ## the README's figure and table from the last demo
	@$(BIN)/python docs/figures/demo.py runs/demo

clean:  ## remove the environment, the caches and the built files; keeps runs/ and cache/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
