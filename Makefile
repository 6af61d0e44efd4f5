# Everything runs in .venv. `make help` lists the targets.

PYTHON ?= python3
# The torch that is installed first. On a GPU machine: make setup TOPIARIST_TORCH=torch
TOPIARIST_TORCH ?= torch==2.13.0
# Test processes; each has one computing thread.
WORKERS ?= 2
# Threads for the demo, which is one process.
THREADS ?= 2

BIN := .venv/bin
STAMP := .venv/.stamp
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup assets demo test test-fast test-isa test-kills sweep lint docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

setup: $(STAMP) ## create .venv and install topiarist with its test and demo extras

# torch goes first and alone, so that no later requirement picks another build of it.
# Its pin is left out of the constraints, for TOPIARIST_TORCH may ask for another version.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt '$(TOPIARIST_TORCH)'
	$(BIN)/python -m pip install -c .venv/constraints.txt -e '.[test,demo]'
	touch $@

assets: $(STAMP) ## fetch the demo model and texts into .assets
	$(ONE_THREAD) $(BIN)/python -m demo.assets

demo: assets ## prune the demo model and report
	OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false $(BIN)/python -m demo.run

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint assets ## lint, then pytest
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS)

test-fast: $(STAMP) ## the tests of a few seconds that need nothing fetched
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not real"

sweep: $(STAMP) ## try every model type of transformers; writes docs/reference/architectures.md
	cd tests && $(ONE_THREAD) HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTHONPATH=.. ../$(BIN)/python -m sweep --commit $$(git rev-parse --short HEAD) --out ../docs/reference/architectures.md

test-kills: $(STAMP) ## kill processes of divided runs twenty times
	KILLS=20 $(ONE_THREAD) $(BIN)/python -m pytest tests/test_prune_processes.py -k killed

# Held to AVX2, to AVX-512 without AMX, free, and emulated (tests/rounding.py).
test-isa: $(STAMP) ## the fast tests under several instruction sets
	$(ONE_THREAD) $(BIN)/python tests/processors.py -n $(WORKERS) -m "not slow and not real"

docs: $(STAMP) ## build the site into build/site, warnings as errors
	$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install -c .venv/constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove what runs leave behind; .venv and .assets stay
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
