# Everything needs Python 3.11 or later and nothing else: each target makes its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test benchmark lint format clean

help:
	@echo "make demo    phantoms, training, scores and pictures, in minutes"
	@echo "make test    all tests"
	@echo "make benchmark  steps, memory, whole volumes and growth on this machine, in tables"
	@echo "make lint    ruff, pyright, bandit, known faults of packages"
	@echo "make format  ruff, in place"

# --no-compile: byte code is made for what is imported, not for all of the packages. So it must be
# kept: where it may not be written, every process compiles thousands of modules for a minute.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip

$(BIN)/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(BIN)/.dev: $(BIN)/.installed
	$(INSTALL) --editable '.[dev]'
	touch $@

# pip unpacks on one core. The other makes the phantoms in the meantime: they need few packages.
demo: | $(BIN)/python
	$(BIN)/python -c "import nilearn, filelock, rich" 2> /dev/null || $(INSTALL) nilearn filelock rich
	$(BIN)/python -m datamodules.phantom data/phantom-2mm --cases 64 --spacing-mm 2 & \
	  $(MAKE) $(BIN)/.installed && wait
	$(BIN)/python train.py

test: $(BIN)/.dev
	$(BIN)/python -m pytest --numprocesses auto $(PYTEST_ARGS)

benchmark: $(BIN)/.installed
	$(BIN)/python -m experiments.benchmarks.hardware $(BENCHMARK_ARGS)

$(BIN)/.lint: $(BIN)/.dev
	$(INSTALL) --editable '.[lint]'
	touch $@

# pip-audit only advises: it asks a server, and a fault of a package is not one of a commit.
lint: $(BIN)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/bandit --quiet --recursive --severity-level medium --configfile pyproject.toml .
	-$(BIN)/pip-audit --progress-spinner off --skip-editable

format: $(BIN)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
