# Every target makes .venv first when it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo check test lint format bench docs clean

demo: $(READY)
	$(BIN)/smkd demo -o demo

# before each commit: everything but the tests that are marked slow
check: lint
	$(BIN)/pytest -n auto --dist loadfile -m "not slow"

test: lint
	$(BIN)/pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks notebooks
	$(BIN)/ruff format --check src tests benchmarks notebooks
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix src tests benchmarks notebooks
	$(BIN)/ruff format src tests benchmarks notebooks

bench: $(READY)
	for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# the web site of docs/ in site/, without a network; a dead link or heading is an error
docs: $(READY)
	$(BIN)/zensical build --strict --clean
	@echo "$(BIN)/python -m http.server -d site --bind 127.0.0.1 8000"

clean:
	rm -rf .venv demo site .cache .mypy_cache .ruff_cache .pytest_cache

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)
