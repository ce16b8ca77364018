# Two commands do all the set-up on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
DEVCLUSTER := $(PYTHON) -m devcluster

.PHONY: help setup up down status demo test test-fast check e2e bench lock generate images clean

help: ## what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The environment is remade when the locked requirements change; uv's cache makes that quick.
$(VENV)/.ready: requirements/dev.txt requirements/bootstrap.txt pyproject.toml
	@./tools/setup $(PYTHON) $(VENV)
	@touch $@

# What these need is compiled while Python's packages are downloaded.
up demo test e2e: export PREFETCH := 1

setup: $(VENV)/.ready ## the Python environment, and the Debian packages that tests and examples use

up: setup ## a cluster, the platform, the images
	@$(DEVCLUSTER) up

down: ## removes every trace of the cluster
	@$(DEVCLUSTER) down

status: ## what runs
	@$(DEVCLUSTER) status

images: ## builds the images and loads them into the cluster
	@$(DEVCLUSTER) images

demo: setup ## the main job: a fine-tuned model promoted by live word error rate, and a bad one rolled back
	@$(RUN)/python examples/telephone-prompts/demo.py

test: setup check ## everything that CI runs
	@./tools/test

test-fast: setup ## pure decisions, contract, chart and rendering: seconds
	@$(RUN)/pytest -q -m "not apiserver and not node and not slow"

check: setup ## linters, types, import rules, generated files
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/mypy
	@$(RUN)/lint-imports
	@$(RUN)/python -m attune.crdgen --check

e2e: setup ## end to end on the one-node cluster
	@$(RUN)/pytest -v -m node tests/e2e

bench: setup ## make bench NAME=finetune-speed | augmentation | forgetting | false-rollback | interval-coverage | operator-rest | weight-change
	@test -n "$(NAME)" || { echo "say which: make bench NAME=finetune-speed (see bench/)"; exit 2; }
	@$(RUN)/python -m bench.$(subst -,_,$(NAME))

generate: setup ## CRDs, the chart's copy and the API reference, from operator/attune/api
	@$(RUN)/python -m attune.crdgen

lock: setup ## compiles the locked requirements anew
	@./tools/lock

clean: ## the environment and local caches of linters
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
