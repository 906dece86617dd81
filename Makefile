# make demo    the life of an adapter on a real model: train, inspect, merge, evaluate, unmerge
# make test    set up, check, and run the suite
# make check   format, lint, types
# make wheel   build a wheel, install it into a fresh environment, and show every command's help
# make slow    the tests that `make test` leaves out, since they take long
# make matrix  every architecture of transformers × recipes of adapters, into docs/architectures.md; minutes
# make stress  merge and unmerge the hardest inputs 200 times, and a real model; kill 200 runs; minutes
# make docs    build the pages of docs/ into site/; broken links fail
# make examples  run the examples of the README and docs/, and compare what they print; minutes
# make bench   time merges and inspect, beside cp and PEFT; python -m benchmarks.NAME has the others

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported, which most never are.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Where this is set, each of the hundreds of processes that the tests start would compile torch again: 2 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

# pytest workers; 3 for two cores, since a test waits a fifth of its time
JOBS ?= 3

.PHONY: demo test suite slow wheel stress matrix check docs examples bench setup base clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	@touch $@

base: setup
	@$(BIN)/python demo/base_model.py

demo: base
	@demo/demo.sh

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What is checked takes one core for half a minute, so the base is made and the suite begins beside it.
test: setup
	@$(MAKE) --no-print-directory -j2 check suite

# One thread a worker: more would fight for the cores, which takes the suite twice as long. Each worker begins with half
# of the files, so that what a file prepares is prepared once, and takes from the other when it is done.
suite: base
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

wheel: setup
	$(BIN)/python -m pytest tests/test_packages.py -k wheel

slow: base
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# It goes on where it was interrupted, unless the sources have changed.
matrix: setup
	$(BIN)/python -m tests.matrix --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/matrix

stress: base
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/merging/stress.py
	OMP_NUM_THREADS=1 STRESS_KILLS=100 $(BIN)/python -m pytest -n $(JOBS) tests/merging/test_faults.py -k killed_at_random

$(VENV)/.docs: $(VENV)/.ready
	$(INSTALL) -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

examples: base
	$(BIN)/python docs/examples.py

bench: setup
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.inspection

clean:
	rm -rf $(VENV) .cache site .mypy_cache .ruff_cache .pytest_cache .hypothesis
