# make demo    compile a real sentence encoder, run it without PyTorch, compare both
# make test    lint, types and all tests
#
# Both set everything up in .venv first. Name the PyTorch to install with TORCH, for example
# TORCH=torch==2.13.0; by default pip chooses the newest that is supported.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.11,<2.16
WORKERS ?= 2

.PHONY: demo test lint types unit clean

demo: $(VENV)/.demo
	$(BIN)/tilewright demo

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tree is the package, so mypy is given a folder in which it has the package's name.
types: $(VENV)/.dev
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/tilewright
	MYPYPATH=$(VENV)/types $(BIN)/mypy --package tilewright

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
