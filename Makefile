# make help lists the targets.  Everything lives in .venv, .cache, assets and runs, and in ~/.cache/tljax
# (prepared data, compiled programs); make clean removes the first two.  A second call of a target that installs is instant: stamps tell what is there.
SHELL := bash
# The first Python that is new enough and can make environments; override with make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ASSETS := PYTHON=$(BIN)/python launch/assets.sh
GO_ON := || echo "going on with what is there"
NAMES ?=
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: help install assets demo demo-fast test test-plan test-slow lint types check clean
help: ## say what the targets do
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

install: .venv/.core ## make .venv with tljax and what the demo needs
	@echo "ready: $(BIN)/tljax"
.venv/.core: pyproject.toml constraints.txt
	@$(if $(PYTHON),true,echo "Python 3.11 or later with its venv module was not found; name one: make PYTHON=/path/to/python" >&2; exit 1)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11" >&2; exit 1; }
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	$(PIP) -e ".[demo]"
	@touch $@

.venv/.test: .venv/.core
	$(PIP) -e ".[test]"
	@touch $@

# torch and its libraries are large and not built for every Python: without them the tests marked torch
# are left out, which pytest's closing lines count.
.venv/.reference: .venv/.test
	@$(PIP) -e ".[reference]" && touch $@ || echo "torch, transformers, timm or peft could not be installed: tests that need them are left out" >&2

.venv/.plan: .venv/.test
	@$(PIP) -e ".[plan]" && touch $@ || echo "libtpu could not be installed: tests that compile for TPUs are left out" >&2

.venv/.dev: .venv/.core
	$(PIP) -e ".[dev]"
	@touch $@

assets: .venv/.core ## fetch weights and data: make assets NAMES="vit fashion" (default: all)
	@$(ASSETS) $(NAMES)

demo: .venv/.core ## the main job on real weights and data: a table and a plot
	@$(ASSETS) vit minilm fashion vader $(GO_ON)
	@launch/local.sh $(BIN)/python -m tljax demo

demo-fast: .venv/.core ## the same in about a minute, with figures that mean little
	@$(ASSETS) vit minilm fashion vader $(GO_ON)
	@launch/local.sh $(BIN)/python -m tljax demo --fast

test: .venv/.test .venv/.reference ## the tests
	@$(ASSETS) vit minilm $(GO_ON)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-plan: .venv/.test .venv/.plan ## the tests that compile for TPUs
	@$(BIN)/python -m pytest -m "libtpu and not slow" || [ $$? = 5 ]  # 5: all were left out

test-slow: .venv/.test .venv/.reference .venv/.plan ## the tests longer than 20 seconds each
	@$(ASSETS) $(GO_ON)
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: .venv/.dev ## ruff: rules and format
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: .venv/.dev ## mypy on the package
	@$(BIN)/python -m mypy

check: test lint types ## test, lint, types

clean: ## remove the environment and the caches; assets and runs stay
	rm -rf .venv .cache .hypothesis build *.egg-info
