# Every target sets up .venv by itself: `make demo` on a fresh clone is all it takes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check format setup clean

demo: $(READY)  ## train, evaluate and show a small network on real images (about 2 minutes on 2 cores)
	$(BIN)/dynaslim demo

test: $(READY)  ## the tests
	$(BIN)/pytest

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)  ## make .venv with everything pinned in constraints.txt

$(READY): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" scripts/setup
	@touch $@

clean:  ## remove what the targets made
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
