# Two commands for users: `make smoke` and `make test`. Everything installs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PREFECT_HOME ?= $(CURDIR)/runs/prefect

# Tests of one process each.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
# Those that start ranks and servers take all cores, but wait for each other half of the time.
TWO := --numprocesses 2 --dist loadfile

# So many tests of faults are drawn for `make test`.
FAULTS := 16

.PHONY: help install smoke test test-all e2e check format schema clean

help:  ## Show this list.
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(VENV)/.installed  ## Build .venv with everything, exactly pinned.

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[train,smoke,s3,sftp,auth,dev]'
	touch $@

smoke: install  ## Train a tiny InternVL through all four stages on the CPU.
	$(BIN)/internvl run smoke

test: check  ## Run every test that CI runs.
	$(BIN)/pytest tests/unit tests/contract -m 'not slow' $(PARALLEL)
	$(BIN)/pytest tests/integration tests/faults tests/e2e -m 'not slow' --fault-sample=$(FAULTS) $(TWO)

test-all: check  ## Run everything, the long tests included.
	$(BIN)/pytest tests/unit tests/contract $(PARALLEL)
	$(BIN)/pytest tests/integration tests/faults tests/e2e $(TWO)

e2e: install  ## Install Chromium if there is none, and run the whole pipeline, in a browser too.
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  if ! command -v apt-get >/dev/null || test "$$(id -u)" != 0; then \
	    echo "make e2e: there is no Chromium, and to install it takes apt-get and root: install it, then try again." >&2; \
	    exit 1; \
	  fi; \
	  apt-get update && apt-get install --yes --no-install-recommends chromium
	$(BIN)/pytest tests/e2e

check: install  ## Lint, format check, types, import directions.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## Format and fix what ruff can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: install  ## Write the arguments' schema from the dataclasses.
	$(BIN)/python -m internvl_core.arguments

clean:  ## Remove the virtual environment, runs and caches.
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
