# Everything happens in .venv/, which these targets set up themselves. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt

NATIVE := CMakeLists.txt $(shell find engine bindings -name '*.cc' -o -name '*.h' -o -name '*.cpp' -o -name '*.hpp' 2>/dev/null)
SETUP := pyproject.toml constraints.txt $(NATIVE)
INSTALL := $(BIN)/python -m pip install --quiet --no-build-isolation --editable

.DEFAULT_GOAL := help
.PHONY: help demo test native lint format venv bench soak wheel wheel-aarch64 clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

demo: $(VENV)/.train  ## train on real digits at 1, 2, 3, 4 bits at once, pack, run the artifact in integers
	$(BIN)/bitstrata demo

test: $(VENV)/.test  ## all tests except the long ones and those of `make native`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not soak and not native"

native: $(VENV)/.test  ## tests that build C++ anew: sanitizers, a fuzzer, 64-bit ARM, the C library
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "native and not soak"

lint: $(VENV)/.test  ## style, types, import layers, C++ format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(filter %.cc %.h %.cpp %.hpp,$(NATIVE))

format: $(VENV)/.test  ## format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cc %.h %.cpp %.hpp,$(NATIVE))

venv: $(VENV)/.all  ## install everything (training, tests, benchmarks with their peers), run nothing

bench: $(VENV)/.all  ## every benchmark, short form; run the files in benchmarks/ themselves for the long form
	set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file --quick; done

soak: $(VENV)/.test  ## the long forms of the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

wheel:  ## a manylinux wheel for x86-64 in build/dist, tried in an empty environment
	.ci/wheel $(PYTHON) build/dist

wheel-aarch64:  ## the same for 64-bit ARM, cross-compiled and tried under qemu (Debian packages: see .ci/wheel)
	.ci/wheel $(PYTHON) build/dist aarch64

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build

# One stamp for each set of extras; a larger set does not undo a smaller one.
$(VENV)/.base: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet scikit-build-core nanobind cmake ninja
	touch $@

$(VENV)/.train: $(VENV)/.base $(SETUP)
	$(INSTALL) '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.base $(SETUP)
	$(INSTALL) '.[train,tasks,test]'
	touch $@ $(VENV)/.train

$(VENV)/.all: $(VENV)/.base $(SETUP)
	$(INSTALL) '.[train,tasks,test,bench]'
	touch $@ $(VENV)/.train $(VENV)/.test
