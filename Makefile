# CI and pre-commit call these targets and nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
STAMP := .venv/.installed
ARGS ?=

.PHONY: help setup demo test test-all lint format bench docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with the exact versions of constraints.txt

# torch goes in first and pinned: whoever asks for it later finds it there, so that no other build
# of it is fetched. Without build isolation the pinned hatchling makes the editable install.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv (a minute or two the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt hatchling editables
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: setup  ## speculation on the bundled model pair
	@$(BIN)/outrider demo $(ARGS)

test: lint  ## what CI runs: lint, then all tests that are not slow
	@$(BIN)/pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: lint  ## the slow tests too
	@$(BIN)/pytest $(ARGS)

lint: setup  ## format, rules, imports, types; changes nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy

format: setup  ## rewrite the sources in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup  ## speed-up of the demo pair, with intervals: make bench ARGS="--k 2 4"
	@$(BIN)/python -m benchmarks.speedup $(ARGS)

docs: setup  ## regenerate the generated pages of docs/reference
	@$(BIN)/python docs/generate.py

clean:  ## remove .venv, caches and builds
	@rm -rf .venv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	@find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
