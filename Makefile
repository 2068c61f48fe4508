# make demo      compile a real sentence encoder, run it without PyTorch, compare both
# make test      lint, types and all tests
# make sanitize  the kernel tests that are marked for it, with address and undefined-behaviour sanitizers
#
# All set everything up in .venv first. Name the PyTorch to install with TORCH, for example
# TORCH=torch==2.13.0; by default pip chooses the newest that is supported.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.11,<2.16
WORKERS ?= 2

.PHONY: demo test lint types unit sanitize clean

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

# A file's tests go to one worker, which makes the models that they share once. Folders of short files come last.
unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The sanitizer's library has to be there before Python allocates anything.
sanitize: $(VENV)/.dev
	library=$$(realpath -e "$$(gcc -print-file-name=libasan.so)") && \
	env LD_PRELOAD="$$library" ASAN_OPTIONS=detect_leaks=0 TILEWRIGHT_TEST_SANITIZE=1 \
	$(BIN)/python -m pytest -n $(WORKERS) -p no:cacheprovider -m sanitize tests/codegen

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
