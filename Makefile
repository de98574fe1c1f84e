# Two commands matter: `make run` serves the studio, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 7860
export OMP_WAIT_POLICY ?= passive

.PHONY: help run test check lint types pytest test-slow test-pages bench chromium format clean

help:
	@echo "make run      make a virtual environment, install, open the studio (PORT=$(PORT))"
	@echo "make test     install what the tests need, then lint, types and tests"
	@echo "make check    lint, types and tests, nothing installed"
	@echo "make test-slow  also the long tests (fetches the 135M model)"
	@echo "make test-pages  each page of the studio in a browser, in all its states"
	@echo "make bench    speed and memory against PEFT and TRL; writes docs/benchmarks.md (half an hour or so)"
	@echo "make format   let ruff format the code"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp for each list, so that a second run installs nothing.
$(VENV)/.run-stamp: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

$(VENV)/.dev-stamp: requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@ $(VENV)/.run-stamp

run: $(VENV)/.run-stamp
	$(BIN)/python app.py --port $(PORT) $(ARGS)

test: $(VENV)/.dev-stamp chromium check

# The browser tests drive a Chromium that is there already, or Debian's.
chromium:
	@sh scripts/ensure_chromium.sh

check: lint types pytest

lint:
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types:
	$(BIN)/python -m mypy

# Two at a time where nobody looks at a page: a browser and its studio want the machine for themselves.
pytest:
	$(BIN)/python -m pytest -m "not slow and not pages and not browser" -n logical --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest -m "browser and not slow and not pages"

test-slow: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest -m slow

test-pages: $(VENV)/.dev-stamp chromium
	$(BIN)/python -m pytest -m pages

bench: $(VENV)/.dev-stamp
	$(BIN)/python -m bench $(ARGS)

format: $(VENV)/.dev-stamp
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
