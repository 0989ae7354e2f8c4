# Every target sets up .venv by itself: `make demo` on a fresh clone is all it takes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
FROM := $(if $(DATA),--data $(DATA))

.PHONY: demo test trial check format docs setup clean results results-gpu results-quick

demo: $(READY)  ## train, evaluate and show a small network on real images (about 2 minutes on 2 cores)
	$(BIN)/dynaslim demo

test: $(READY)  ## the tests, side by side
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

trial: $(READY)  ## the package, built and tried as a user and an attacker would (3 minutes on 2 cores)
	scripts/trial.sh

# heads are fitted on arrays of megabytes: kept by the process rather than given back and faulted in
# again each time, that takes 3 minutes a seed instead of more than 14
JUDGED := headline labels ensemble sgs longer longer_labels quick
# learning rates first: what a call trains is settled as it begins
SEARCHES := rates_quick rates_cifar10
results: export MALLOC_MMAP_THRESHOLD_ = 2147483648
results: export MALLOC_TRIM_THRESHOLD_ = 8589934592
results: $(READY)  ## all numbers of docs/results.md anew; DATA=FOLDER has the images, else the hub (5 hours on 2 cores)
	$(BIN)/python -m results.run $(SEARCHES) --jobs 2 $(FROM)
	$(BIN)/python -m results.run $(JUDGED) distillation --jobs 2 $(FROM)
	$(BIN)/python -m results.run $(JUDGED) --judge $(FROM)
	$(BIN)/python -m results.run $(JUDGED) --judge --test $(FROM)
	$(BIN)/python -m results.measure_ms $(FROM)
	$(BIN)/python -m results.run gates --jobs 2 $(FROM)
	$(BIN)/python -m results.run gates --judge $(FROM)
	$(BIN)/python -m results.run gates --judge --test $(FROM)
	$(BIN)/python -m results.table

results-gpu: $(READY)  ## Imagenette too, on a machine with a GPU (its part takes minutes there)
	$(BIN)/python -m results.run imagenette --seeds 0 $(FROM)
	$(BIN)/python -m results.run imagenette --seeds 0 --judge $(FROM)
	$(BIN)/python -m results.run imagenette --seeds 0 --judge --test $(FROM)
	$(BIN)/python -m results.measure_ms --only imagenette --seeds 0 $(FROM)
	$(BIN)/python -m results.table

results-quick: $(READY)  ## repeat one ablation and compare (about 10 minutes on 2 cores)
	$(BIN)/python -m results.quick

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation as a site, into site/; look at it by .venv/bin/mkdocs serve
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: $(READY)  ## make .venv with everything pinned in constraints.txt

$(READY): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" scripts/setup
	@touch $@

clean:  ## remove what the targets made
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache *.egg-info
