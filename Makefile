# The index of verbs. `make serve` and `make test` do everything on a fresh clone.
MODEL ?= all-MiniLM-L6-v2
NAME ?=
DEVICE ?= cpu
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin
# Exact versions that were tested together; other Python versions resolve from pyproject.toml.
LOCK := constraints-$(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
CONSTRAIN := $(if $(wildcard $(LOCK)),--constraint $(LOCK))

.PHONY: help env build serve test lint format perf sts bench-cache bench-engine clean

help:  ## List the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: .venv/.installed  ## Make the virtual environment

.venv/.installed: pyproject.toml $(wildcard constraints-*.txt)
	$(PYTHON) -m venv .venv || { echo "No venv in this Python. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@echo 'Installing into .venv; the first time takes some minutes …'
	$(BIN)/python -m pip install --quiet $(CONSTRAIN) --editable '.[server,docker,client,build,test,lint]'
	@touch $@

build: env  ## Build MODEL (a name or a folder) into model_repository/; NAME=…, DEVICE=cuda
	$(BIN)/python -m tools build $(MODEL) $(if $(NAME),--name $(NAME)) --device $(DEVICE) $(ARGS)

.PHONY: default
default: env
	@$(BIN)/python -m tools build

serve: env  ## Build what is missing and serve; ARGS='--http-port 9000 …'
	@exec $(BIN)/python -m tools serve $(ARGS)

test: env default  ## Lint, then run every test against a real Triton
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest $(ARGS)

lint: env  ## Linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

perf: env default  ## Server against bare engine with perf_analyzer; report in docs/benchmarks/
	$(BIN)/python -m tools perf $(ARGS)

sts: env  ## STS Spearman through a running server; ARGS='--file stsb-dev.tsv'
	$(BIN)/python -m tools sts $(ARGS)

bench-engine: env default  ## The engine in process against sentence-transformers; report in docs/benchmarks/
	$(BIN)/python -m tools bench-engine $(ARGS)

bench-cache: env  ## Cache hits and hash embeddings against the texts/s they must reach
	$(BIN)/python -m tools bench-cache

clean:  ## Remove environment, downloads and built files
	rm -rf .venv .halimede model_repository/*/1 model_repository/*/warmup
