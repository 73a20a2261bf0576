PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test setup lint bench docs clean

demo: $(VENV)/.runtime
	@$(BIN)/coordexp run experiments/demo.yaml --overwrite

test: lint
	@$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo >.lint-imports.log || { cat .lint-imports.log; exit 1; }

setup: $(VENV)/.dev

docs: $(VENV)/.dev
	@$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

bench: $(VENV)/.dev
	@$(BIN)/python benchmarks/bench_loss.py

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing coordexp into $(VENV) (about a minute)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e . 2>$(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@touch $@
	@echo "installed"

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing coordexp and its test tools into $(VENV) (about a minute)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]" 2>$(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@touch $(VENV)/.runtime $@
	@echo "installed"

clean:
	rm -rf $(VENV) .lint-imports.log
