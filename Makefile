PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# ms-swift caps transformers and peft below what the rest runs with.
SWIFT := .venv-swift
DEEPSPEED := .venv-deepspeed
QUANTIZATION := .venv-quantization
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-swift test-deepspeed test-quantization setup lint bench docs clean

demo: $(VENV)/.runtime
	@$(BIN)/coordexp run experiments/demo.yaml --overwrite

# The second environment is installed beside the first and the linters: one core each.
test:
	@$(MAKE) --no-print-directory -j 2 lint $(SWIFT)/.installed
	@$(BIN)/python -m pytest -n 2
	@$(SWIFT)/bin/python -m pytest -n 2 tests/ms_swift

test-swift: $(SWIFT)/.installed
	@$(SWIFT)/bin/python -m pytest -n 2 tests/ms_swift

# ZeRO-2 and ZeRO-3 on DeepSpeed's CPU accelerator, which compiles its collectives with g++: not part of `make test`.
test-deepspeed: $(VENV)/.dev
	@test -d $(DEEPSPEED) || $(PYTHON) -m venv $(DEEPSPEED)
	@$(DEEPSPEED)/bin/python -m pip install -q -c constraints.txt -e ".[deepspeed]" "pytest>=8.3" "hypothesis>=6.115"
	@$(DEEPSPEED)/bin/python -m pytest tests/zero

# Training of adapters on quantised weights and with 8-bit optimizers, on a CPU: not part of `make test`.
test-quantization: $(VENV)/.dev
	@test -d $(QUANTIZATION) || $(PYTHON) -m venv $(QUANTIZATION)
	@$(QUANTIZATION)/bin/python -m pip install -q -c constraints.txt -e ".[quantization]" "pytest>=8.3" "hypothesis>=6.115"
	@$(QUANTIZATION)/bin/python -m pytest tests/test_quantization.py

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

$(SWIFT)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing coordexp beside ms-swift into $(SWIFT) (about two minutes)"
	@$(PYTHON) -m venv $(SWIFT)
	@$(SWIFT)/bin/python -m pip install -q -c constraints.txt -e ".[swift]" "pytest>=8.3" "pytest-xdist>=3.6" "hypothesis>=6.115" 2>$(SWIFT)/pip.log \
	  || { cat $(SWIFT)/pip.log; exit 1; }
	@touch $@
	@echo "installed $(SWIFT)"

clean:
	rm -rf $(VENV) $(SWIFT) $(DEEPSPEED) .lint-imports.log
