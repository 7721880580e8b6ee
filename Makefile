# The first target that needs it makes $(VENV) and installs there; later ones reuse it until pyproject.toml changes.
#
#   make test                                  all tests
#   make test-fast                             without those marked slow
#   make test PYTEST_ARGS="-n 2 -k sd3"        anything pytest takes
#   make test VENV=~/envs/diffusion            in a virtual environment you have; its torch is kept
#   make test TORCH="torch==2.14.0"            another torch; anything `pip install` takes
#   make test PYTHON=python3.12                the interpreter that makes $(VENV)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# As activating it would: DeepSpeed, for one, looks for ninja on the PATH.
RUN := PATH="$$(cd $(BIN) && pwd):$$PATH"
INSTALLED := $(VENV)/.diffusion_opd-installed

.PHONY: install test test-fast demo lint format docs docs-serve clean

install: $(INSTALLED)

# torch goes first and is then held by a constraint: left to itself, pip may replace a CPU build by the newest CUDA one.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip list --format=freeze | grep "^torch==" > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

test: $(INSTALLED)
	$(RUN) python -m pytest $(PYTEST_ARGS)

test-fast: $(INSTALLED)
	$(RUN) python -m pytest -m "not slow" $(PYTEST_ARGS)

# transformers warns at its import that there is no torchvision.
demo: export TRANSFORMERS_VERBOSITY = error

demo: $(INSTALLED)
	$(RUN) python -m examples.toy_world.demo

lint: $(INSTALLED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: $(INSTALLED)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# mkdocs-material prints a notice about its successor at every build; it is not about these pages.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(INSTALLED)
	$(RUN) mkdocs build --strict

docs-serve: $(INSTALLED)
	$(RUN) mkdocs serve

clean:
	rm -rf site build dist .pytest_cache .ruff_cache
