# Two commands matter to a newcomer: `make demo` and `make test`.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := clipward server client strategies privacy encoders tasks

# Nothing calls home and nothing is written outside the clone (but pip's cache).
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export FLWR_HOME := $(CURDIR)/.clipward/flwr
export MPLCONFIGDIR := $(CURDIR)/.clipward/matplotlib
export HF_HOME := $(CURDIR)/.clipward/huggingface

.PHONY: help setup demo test lint format clean

help: ## This list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP) ## Make .venv from the constraints file (does nothing when it is up to date)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Clipward needs Python 3.11 or newer: make setup PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1" --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . --group dev
	@touch $(STAMP)

demo: setup ## Four synthetic hospitals train one model privately; ends with a table and a report
	$(BIN)/clipward demo

test: setup ## Every test, slow ones too
	$(BIN)/python -m pytest

lint: setup ## ruff, mypy --strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Let ruff put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what was made: environment, demo, runs
	rm -rf $(VENV) demo runs sites .clipward build *.egg-info
