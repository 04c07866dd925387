# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
OUT ?= out

.PHONY: help demo test lint format bench train clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "madit needs Python 3.11 or newer, this is %s; set PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)  ## the whole flow on the embedded models, with an HTML report in out/demo (five to ten minutes on 2 cores)
	$(BIN)/madit demo --out $(OUT)/demo

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

lint: $(READY)  ## ruff, pyright and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## time recording and guidance on the small pipelines and print the figures
	$(BIN)/python -m pytest tests/bench -s

train: $(READY)  ## train the embedded models again into runs/ (hours on 2 cores; resumable)
	$(BIN)/python -m madit.zoo.train shapes --out runs/shapes
	$(BIN)/python -m madit.zoo.train classifiers --out runs/classifiers
	$(BIN)/python -m madit.zoo.train detail --out runs/detail --base runs/shapes/snapshots/003000.pt

clean:  ## remove the virtual environment and everything that was made
	rm -rf .venv out dist .pytest_cache .ruff_cache
