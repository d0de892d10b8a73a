# The index of verbs. `make serve` and `make test` do everything on a fresh clone.
MODEL ?= all-MiniLM-L6-v2
NAME ?=
DEVICE ?= cpu
ARGS ?=
PROFILE ?= cpu
PYTHON ?= python3
BIN := .venv/bin
# Installs a checkout's Debian packages as root; otherwise prints their names.
PROGRAMS := tools/halimede_tools/serve/programs.py
# Exact versions that were tested together; other Python versions resolve from pyproject.toml.
LOCK := constraints-$(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
CONSTRAIN := $(if $(wildcard $(LOCK)),--constraint $(LOCK))

export COMPOSE_PROJECT_NAME := halimede
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
OURS := --filter label=com.docker.compose.project=halimede

.PHONY: help env build serve gateway deploy up down test test-containers lint format perf sts bench bench-cache soak gpu-check tune clean test-faults security

help:  ## List the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

env: .venv/.installed  ## Make the virtual environment

# Triton's Python stub links libpython, so serving needs it besides venv.
.venv/.installed: pyproject.toml $(wildcard constraints-*.txt)
	@$(PYTHON) $(PROGRAMS) serve
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@echo 'Installing into .venv; the first time takes some minutes …'
	@began=$$(date +%s); \
	$(BIN)/python -m pip install --quiet $(CONSTRAIN) --editable '.[server,build,client,docker,gateway]' \
	&& echo "Installed in $$(($$(date +%s) - began)) s."
	@touch $@

# What tests, lints and documents, besides.
.venv/.developing: .venv/.installed tests/system/cluster/cluster_programs.py
	$(BIN)/python -m pip install --quiet $(CONSTRAIN) --editable '.[server,build,client,docker,gateway,bulk-ray,test,lint,docs]'
	$(BIN)/python tests/system/cluster/cluster_programs.py
	@touch $@

build: env  ## Build MODEL (a name or a folder) into model_repository/; NAME=…, DEVICE=cuda
	$(BIN)/halimede build "$(MODEL)" $(if $(NAME),--name $(NAME)) --device $(DEVICE) $(ARGS)

.PHONY: programs develop
develop: .venv/.developing

programs:
	@$(PYTHON) $(PROGRAMS) test

.PHONY: default
default: env
	@$(BIN)/halimede build

serve: env  ## Build what is missing and serve; ARGS='--http-port 9000 …'
	@exec $(BIN)/halimede serve $(ARGS)

gateway: env  ## Answer OpenAI's, Cohere's, TEI's, Ollama's and other clients; ARGS='--port 8080 …'
	@exec $(BIN)/halimede gateway $(ARGS)

deploy: env  ## Load, promote or roll back a candidate of a served model; ARGS='canary NAME --share 0.1'
	@$(BIN)/halimede deploy $(ARGS)

up: default  ## The stack in containers: Triton, gateway, Redis, Prometheus, Grafana; PROFILE=gpu
	$(COMPOSE) --profile $(PROFILE) up --detach --build
	@echo 'Waiting until every service is healthy …'
	@while [ -n "$$(docker ps -q $(OURS) --filter health=starting)" ]; do sleep 1; done
	@! docker ps -a $(OURS) --format '{{.Names}} {{.Status}}' | grep -v -e '(healthy)' -e grafana
	@$(BIN)/halimede health
	@echo 'Gateway http://127.0.0.1:8080   Prometheus http://127.0.0.1:9090   Grafana http://127.0.0.1:3000   Redis 127.0.0.1:6379'

down:  ## Stop the stack and remove its containers, network and volumes
	$(COMPOSE) --profile cpu --profile gpu down --volumes --remove-orphans

test: programs develop default  ## Lint, then run every test against a real Triton, two files at a time
	@$(MAKE) --no-print-directory lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-containers: develop default  ## The stack in containers, really run; needs root
	tests/containers/engine.sh $(BIN)/python -m pytest -m containers $(ARGS)

test-faults: develop default  ## What fails around a server, a minute of overload, an upgrade under load
	$(BIN)/python -m pytest tests/system/test_faults.py tests/system/cluster/test_helm_upgrade.py -m 'faults or not faults' $(ARGS)

security: develop default  ## Who may do what, what the logs hold, secrets, known vulnerabilities
	$(BIN)/python -m pytest tests/system/test_security.py tests/system/test_audit.py $(ARGS)
	@# 3: only the line numbers in the baseline were brought up to date.
	$(BIN)/detect-secrets-hook --no-verify --baseline .secrets.baseline $$(git ls-files) || [ $$? -eq 3 ]
	$(BIN)/python -m pip freeze --all --exclude-editable > .venv/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement .venv/installed.txt

lint: develop  ## Linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# NVIDIA's container has Python 3.10: these packages lie in it.
	$(BIN)/mypy --python-version 3.10 $(addprefix --package ,halimede_engine halimede_launch halimede_ops halimede_repository)

format: develop  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs docs-reference
docs: develop  ## Build the documentation into site/; a broken link or anchor fails
	$(BIN)/zensical build --strict --clean

docs-reference: develop  ## Write the generated pages of docs/reference/
	$(BIN)/python tests/reference_pages.py
	$(BIN)/halimede config reference > docs/reference/configuration.md

perf: env default  ## Server against bare engine with perf_analyzer; report in docs/benchmarks/
	$(BIN)/halimede bench server $(ARGS)

sts: env  ## STS Spearman through a running server; ARGS='--file stsb-dev.tsv'
	$(BIN)/halimede bench sts $(ARGS)

bench: env default  ## Every engine against its peers, in one run; report in docs/benchmarks/
	$(BIN)/halimede bench --model $(MODEL) $(ARGS)

bench-cache: env  ## Cache hits and hash embeddings against their required texts/s
	$(BIN)/halimede bench cache

soak: env default  ## 500,000 mixed requests, each checked: errors, memory, drift; report in docs/
	$(BIN)/halimede soak --model $(MODEL) $(ARGS)

gpu-check: env  ## On a machine with an NVIDIA GPU: vectors and speed there; DEVICE=tensorrt
	$(BIN)/halimede bench gpu --model $(MODEL) --device $(if $(filter cpu,$(DEVICE)),cuda,$(DEVICE)) $(ARGS)

tune: env default  ## Threads, streams, provider and tokens a run for MODEL on this machine
	$(BIN)/halimede tune --model $(MODEL) $(ARGS)

clean:  ## Remove environment, downloads and built files
	rm -rf .venv .halimede model_repository/*/[0-9]* model_repository/*/warmup
