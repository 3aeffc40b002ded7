# Tidemark. `make` alone lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: help setup demo up down status notebooks test test-all check format bench lock clean

help: ## List what there is (this)
	@echo "Tidemark: make <target>"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort -s -t: -k1,1 | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/' | column -t -s'|'

setup: $(READY) ## Make the environment .venv (every other target does it by itself)

demo: $(READY) ## Real purchases to a served answer, then one live event that changes it (ONCE=1: exit after the check)
	@$(BIN)/tidemark demo $(if $(filter-out 0 no false,$(ONCE)),--once) $(ARGS)

up: $(READY) ## Start broker, streams, serving and Dagster's web UI
	@$(BIN)/tidemark up $(ARGS)

down: $(READY) ## Stop everything that `up` or `demo` started
	@$(BIN)/tidemark down $(ARGS)

status: $(READY) ## Say what runs
	@$(BIN)/tidemark status $(ARGS)

notebooks: $(READY) ## Run the notebooks on the lake, and render a page of each (ARGS="base_and_delta" for one)
	@$(BIN)/tidemark notebooks $(ARGS)

# Two runs beside each other, one a core: what shares one Spark session, and all else.
WITH_SPARK = $(sort $(shell grep -rlE 'spark: SparkSession' tests --include='test_*.py'))
WITHOUT_SPARK = tests $(addprefix --ignore=,$(WITH_SPARK))
CHOSEN := -m "not slow and not browser"

test: $(READY) ## Run the tests (ARGS="-k name" for some of them)
ifeq ($(strip $(ARGS)),)
	@log=$$(mktemp); trap 'rm -f "$$log"; kill $$(jobs -p) 2>/dev/null || true' EXIT; \
	  $(BIN)/pytest $(CHOSEN) $(WITHOUT_SPARK) >"$$log" 2>&1 & \
	  other=$$!; failed=0; \
	  $(BIN)/pytest $(CHOSEN) $(WITH_SPARK) || failed=1; \
	  wait $$other || failed=1; cat "$$log"; exit $$failed
else
	@$(BIN)/pytest $(CHOSEN) $(ARGS)
endif

test-all: $(READY) ## Run all tests, the slow ones too
	@$(BIN)/pytest $(ARGS)

check: $(READY) ## Check style, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code and mend what ruff can
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(READY) ## Run a benchmark: make bench NAME=freshness (or serving, recommendations, sequences, counters, patterns, inbox, build, load, replay, upkeep, trino, quality, defects, dirty_year, repository, ads-build, ads-freshness, sequence-parity, enrichment)
	@test -n "$(NAME)" || { echo "say which: make bench NAME=freshness (or serving, recommendations, sequences, counters, patterns, inbox, build, load, replay, upkeep, trino, quality, defects, dirty_year, repository, ads-build, ads-freshness, sequence-parity, enrichment)" >&2; exit 2; }
	@$(BIN)/tidemark bench $(NAME) $(ARGS)

lock: $(READY) ## Pin anew what pyproject.toml asks for
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --upgrade --quiet \
	  --no-emit-index-url --generate-hashes --no-header --output-file requirements.txt
	{ echo '# uv, which installs everything else (requirements.txt). Written by `make lock`.'; \
	  grep '^uv==' requirements.txt | cut -d' ' -f1 | \
	  $(BIN)/uv pip compile - --universal --python-version 3.11 --quiet \
	    --no-emit-index-url --generate-hashes --no-header --no-annotate; } > requirements-bootstrap.txt.new
	mv requirements-bootstrap.txt.new requirements-bootstrap.txt

clean: ## Remove the environment and caches (data stays in var/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -not -path './var/*' -prune -exec rm -rf {} +

# What the machine lacks is said before anything is fetched. uv is told of the index that pip is set up for, if any.
$(READY): requirements.txt requirements-bootstrap.txt pyproject.toml
	@PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m pipelines.preflight setup
	@echo "making $(VENV): about 1.7 GB, a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bootstrap.txt
	@export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || true)}}"; \
	  test -n "$$UV_DEFAULT_INDEX" || unset UV_DEFAULT_INDEX; \
	  export UV_SYSTEM_CERTS=1 VIRTUAL_ENV=$(CURDIR)/$(VENV); \
	  $(BIN)/uv pip sync --require-hashes --build-constraints requirements.txt requirements.txt 2>&1 | sed '/^ [-+~] /d'; \
	  $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(READY)
