# make demo       from nothing to a fine-tuned, exported tiny model
# make test-fast  the tests that need neither training ranks nor system packages, in 3 minutes
# make test       all tests
# make check      lint, format, types, shell scripts
# make docs       the documentation, strictly
# make bench      the benchmarks, one table
# make audit      known faults of the pinned packages
# make clean      removes what make made
# PYTEST_ARGS: extra arguments for pytest, such as PYTEST_ARGS="-k resume" or PYTEST_ARGS="--durations=50".
# PYTHON: the interpreter of a new venv.  PIP_ARGS: extra arguments for pip, such as the index of CPU or CUDA wheels.
SHELL := /bin/bash
PYTHON ?= python3.11
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: demo test test-fast check docs bench audit clean

demo: $(READY)
	$(BIN)/phi3v demo

test: $(READY)
	$(BIN)/python tests/together.py $(PYTEST_ARGS)

test-fast: $(READY)
	$(BIN)/python tests/together.py --fast $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $$(git ls-files '*.sh') .ci/run

docs: $(READY)
	$(BIN)/python -m launch.cli.reference docs/config.md
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# Packages of its own: pip-audit's must not decide what is tested.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS) pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

clean:
	rm -rf $(VENV) runs/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip' || \
		{ echo 'make: $(PYTHON) cannot make a virtual environment; on Debian: apt install $(PYTHON)-venv' >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@
