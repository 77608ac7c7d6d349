# `make test`, `make bench` and the others do all the set-up a fresh machine needs (a virtual environment, torch, the
# other packages, the native build) and then their job; what is up to date is not done again.
#
#   make test      the test suite                    make test-all  with what takes long, as CI runs it
#   make bench     the quick benchmarks              make sanitize  the CPU kernels under ASan and UBSan
#   make wheel     a wheel in dist/
#   make lint      ruff, mypy, clang-format          make format    what lint can mend by itself
#   make schemas   rewrites tests/schemas.txt        make build     only the native libraries, after an edit
#
# PYTHON chooses the interpreter of the environment, TORCH the torch that is installed into it. The build's own switches
# (PYCORE_CUDA, PYCORE_DEBUG, PYCORE_SANITIZE, PYCORE_LAUNCHER, MAX_JOBS, CXX) are environment variables.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip
ARGS ?=

.PHONY: test bench lint lint-ruff lint-format lint-mypy lint-clang-format format build wheel sanitize schemas setup
.PHONY: clean test-all test-ops test-others test-transformers4
.DELETE_ON_ERROR:

# Most tests keep one core busy, so the suite runs in two processes whose reports follow each other; threads that wait
# must not spin then. With ARGS it is one process on what they say.
PYTEST := $(VENV)/bin/python -m pytest -q
HALVES := $(MAKE) --no-print-directory -k -j2 --output-sync=target
test test-all test-ops test-others test-transformers4: export OMP_WAIT_POLICY := passive

ifeq ($(ARGS),)
test: build
	@$(HALVES) test-ops test-others MARKS="-m 'not slow'"
	@echo "Left out: tests marked slow, and transformers 4.57; \`make test-all\` runs them too."
else
test: build
	$(PYTEST) tests $(ARGS)
endif

# The long tail too, and the integration with the oldest transformers that is supported, beside the one in the
# environment; of the compilations there the quick ones.
test-all: build $(VENV)/.transformers4
	@$(HALVES) test-ops test-others test-transformers4

MARKS ?=
test-ops:
	$(PYTEST) tests/ops $(MARKS)
test-others:
	$(PYTEST) tests --ignore=tests/ops $(MARKS)
test-transformers4:
	PYTHONPATH=$(VENV)/transformers4 $(PYTEST) tests/integrations -m 'not slow'

bench: build
	$(VENV)/bin/python -m bench.run --quick $(ARGS)

# `make -k lint` goes on after a complaint.
lint: lint-ruff lint-format lint-mypy lint-clang-format
lint-ruff: setup
	$(VENV)/bin/ruff check .
lint-format: setup
	$(VENV)/bin/ruff format --check .
lint-mypy: setup
	$(VENV)/bin/mypy pycore
lint-clang-format: setup
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc tests/native -name '*.h' -o -name '*.c*')

# What lint-ruff, lint-format and lint-clang-format can mend by themselves.
format: setup
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(shell find csrc tests/native -name '*.h' -o -name '*.c*')

# Ninja decides what is out of date.
build: setup
	$(VENV)/bin/python setup.py -q build_ext --inplace

# A wheel is for other machines: with the CUDA kernels wherever they can be compiled.
wheel: export PYCORE_CUDA := $(or $(PYCORE_CUDA),$(if $(shell command -v nvcc),on,auto))
wheel: setup
	$(PIP) wheel -qq --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist

schemas: build
	$(VENV)/bin/python tests/test_schemas.py --update

clean:
	rm -rf build dist *.egg-info pycore/*.so pycore/build_info.json

# ---- set-up ----------------------------------------------------------------------------------------------------------
# torch comes first and by itself, so that nothing else chooses its version; the build then uses that torch
# (--no-build-isolation) and needs its tools in the environment.

setup: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -qq --upgrade pip
	$(PIP) install -qq "$(TORCH)"
	touch $@

$(VENV)/.transformers4: $(VENV)/.installed
	$(PIP) install -qq --upgrade --target $(VENV)/transformers4 "transformers==4.57.*"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install -qq "setuptools>=64" wheel ninja "pybind11>=2.13" "$(TORCH)"
	$(PIP) install -qq --no-build-isolation --editable ".[bench,dev,examples]" "$(TORCH)"
	touch $@

# ---- sanitizers ------------------------------------------------------------------------------------------------------
# Every tests/native/<name>.cpp is a program of its own, linked with all of csrc/cpu and run on each instruction set of this
# machine. A program returns 0 when all is well.

SAN := build/sanitize
SAN_FLAGS := -std=c++17 -O1 -g -march=x86-64 -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all \
             -fno-omit-frame-pointer -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized -Icsrc/include -pthread
SAN_OBJECTS := $(patsubst csrc/cpu/%.cpp,$(SAN)/cpu/%.o,$(wildcard csrc/cpu/*.cpp csrc/cpu/*/*.cpp))
SAN_PROGRAMS := $(patsubst tests/native/%.cpp,$(SAN)/%,$(wildcard tests/native/*.cpp))
CXX ?= g++

sanitize: $(SAN_PROGRAMS)
	@for isa in $$($(SAN)/cpu_isa --list); do for program in $(SAN_PROGRAMS); do \
	  echo "$$(basename $$program) on $$isa"; PYCORE_CPU_ISA=$$isa $$program || exit 1; done; done

$(SAN)/cpu/%.o: csrc/cpu/%.cpp
	@mkdir -p $(dir $@)
	$(CXX) $(SAN_FLAGS) -MMD -MP -c $< -o $@

$(SAN_PROGRAMS): $(SAN)/%: tests/native/%.cpp $(SAN_OBJECTS)
	$(CXX) $(SAN_FLAGS) -MMD -MP -MF $@.d $< $(SAN_OBJECTS) -o $@

-include $(wildcard $(SAN)/cpu/*.d $(SAN)/cpu/*/*.d $(SAN)/*.d)
