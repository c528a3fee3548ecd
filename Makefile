# make setup   .venv with everything that the other targets need (they call it; instant when nothing changed)
# make demo    trains, exports and reads back a small model: runs/demo/report.html and runs/demo/results.json
# make test    the whole test suite
# make lint    ruff and mypy
# make docs    tables and picture of README and docs/ from benchmarks/results/*.json
# make formats the tests of all formats; what they proved: benchmarks/results/formats.json and docs/formats.md
# make bench-cpu   QAT step over float step, beside other libraries, one thread: benchmarks/results/cpu-*.json (an hour)
# make bench-quality   KL to the float model beside GPTQ and other libraries' QAT: benchmarks/results/quality.json (60
#              minutes on two cores; BENCH_ARGS=--quick: 5 minutes, fewer methods, no file unless --out names one)
# make bench-gpu   kernels and Llama steps on one GPU, with nothing but torch and triton: benchmarks/results/gpu-*.json
# make aot     every kernel compiled for GPUs that need not be there, and judged: benchmarks/results/aot-*.json
# make clean   removes what the targets above made
#
# Variables, given as `make setup NAME=value`:
#   PYTHON       the Python that .venv is made from (3.10 or later)                        python3
#   TORCH        what pip is asked to install as torch, index options included; it is      torch==2.13.0
#                kept by later calls until another one is given
#   EXTRAS       extras of pyproject.toml; add gpu or deepspeed on a machine for them      all,dev
#   CONSTRAINTS  file of tested versions; empty for the newest that pyproject.toml allows  constraints.txt
#   WORKERS      processes that run tests side by side; 0 runs them in pytest's own        2
#   PYTEST_ARGS  passed on to pytest
#   BENCH_ARGS   passed on to a benchmark, like --dry-run
#   GPU_PYTHON   the Python of bench-gpu: one that has torch with CUDA, and triton             python3

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/setup.done

PYTHON ?= python3
TORCH ?= $(or $(shell cat $(VENV)/setup.torch 2>/dev/null),torch==2.13.0)
EXTRAS ?= all,dev
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_PYTHON ?= python3

# What the stamp was made for. A moved checkout, a removed Python or another choice makes .venv stale.
KEY := $(CURDIR) $(TORCH) $(EXTRAS) $(CONSTRAINTS)
ifneq ($(KEY),$(shell cat $(STAMP) 2>/dev/null))
$(STAMP): FORCE
else ifneq (ok,$(shell $(BIN)/python -c 'print("ok")' 2>/dev/null))
$(STAMP): FORCE
endif

.PHONY: help setup demo test lint docs formats bench-cpu bench-quality bench-gpu aot clean FORCE
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# Torch first and alone: later packages then keep the build that was chosen, and what came with it (a CUDA build wants a
# triton of its own), instead of replacing it.
define PINS
import sys
from importlib.metadata import distributions
pins = dict(line.strip().lower().replace("_", "-").split("==") for line in open(sys.argv[1]) if "==" in line)
came = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
pins |= {name: version for name, version in came.items() if name in pins or name == "torch"}
print("\n".join(f"{name}=={version}" for name, version in pins.items()))
endef
export PINS
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make setup PYTHON=python3.x")'
	if ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.prefix != "$(CURDIR)/$(VENV)")' 2>/dev/null; \
		then rm -rf $(VENV); $(PYTHON) -m venv $(VENV); fi
	rm -f $(STAMP)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c "$$PINS" $(or $(CONSTRAINTS),/dev/null) >$(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[$(EXTRAS)]'
	echo '$(TORCH)' >$(VENV)/setup.torch
	echo '$(KEY)' >$(STAMP)

demo: setup
	$(BIN)/python -m qat.tasks.demo

# One thread per worker: more of them than cores only wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) tests

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: setup
	$(BIN)/python docs/readme_results.py
	$(BIN)/python docs/formats_table.py

formats: setup
	mkdir -p runs
	rm -f runs/proofs.jsonl
	QAT_PROOFS=$(CURDIR)/runs/proofs.jsonl OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) tests/export
	$(BIN)/python docs/formats_table.py runs/proofs.jsonl

# The other libraries pin versions of their own (setuptools, for one), so they have a .venv of their own.
BENCH := .venv-bench
$(BENCH)/setup.done: pyproject.toml $(CONSTRAINTS)
	if ! $(BENCH)/bin/python -c 'import pip' 2>/dev/null; then rm -rf $(BENCH); $(PYTHON) -m venv $(BENCH); fi
	$(BENCH)/bin/python -m pip install --quiet $(TORCH)
	$(BENCH)/bin/python -m pip install --quiet --editable '.[bench]'
	touch $@

bench-cpu: $(BENCH)/setup.done
	OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks.cpu $(BENCH_ARGS)

bench-quality: $(BENCH)/setup.done
	OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks.quality $(BENCH_ARGS)

bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(BENCH_ARGS)

aot: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.aot

clean:
	rm -rf $(VENV) $(BENCH) build dist *.egg-info runs .mypy_cache .pytest_cache .ruff_cache .hypothesis lightning_logs wandb
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
