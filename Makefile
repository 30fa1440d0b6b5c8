# Everything runs in .venv, which `make` builds from the package index. torch is pinned in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file of tests shares what it makes first: it stays in one process.
IN_PARALLEL := --numprocesses auto --dist loadfile

.PHONY: demo test test-slow test-oldest lint types check sweep hub clean

demo: $(VENV)/.installed
	$(BIN)/dijiang demo --force

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(IN_PARALLEL)

# Tests that take minutes: thousands of examples of bad input, and sizes that would take all memory.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The code of checkpoints, and conversion, with the oldest transformers that pyproject.toml allows.
test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest $(IN_PARALLEL) tests/modeling tests/architecture tests/convert tests/test_encoders.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/imports.py

types: $(VENV)/.installed
	$(BIN)/mypy

check: test lint types

# Every architecture of transformers, and docs/architectures.md; about 10 minutes.
sweep: $(VENV)/.installed
	$(BIN)/python -m scripts.sweep

# A Hub on the loopback with the demo's model in it, to try the whole journey offline.
hub: $(VENV)/.installed
	$(BIN)/python -m tests.hub --port 8000 --repo demo/stories=dijiang_convert/demo_model

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "dijiang-convert needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,tensorboard]'
	touch $@

$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable . pytest pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist dijiang-demo
