# Every target does its own set-up and is safe to run twice.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MEGATRON_FIPO_VENV ?= .venv
export MEGATRON_FIPO_VENV
BIN := $(MEGATRON_FIPO_VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup quickstart smollm2 docs lint test test-exhaustive

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: ## Create the environment (again only where something changed)
	@bash tools/setup_environment.sh

quickstart: setup ## Train a tiny model on this machine's CPU
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/tiny_cpu/run.sh

smollm2: setup ## Train SmolLM2-135M for three steps on this machine's CPU
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/smollm2_arithmetic/run.sh

docs: setup ## Write the generated pages anew: configuration and metrics
	@$(BIN)/python tools/generate_configuration_docs.py
	@$(BIN)/python tools/generate_metric_docs.py

lint: setup ## Style, types and import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: lint ## Lint, then the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not exhaustive"

test-exhaustive: lint ## Lint, then the test suite with its longest part
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"
