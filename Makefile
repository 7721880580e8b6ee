# The first target that needs it makes $(VENV) and installs there; later ones reuse it until pyproject.toml changes.
#
#   make test                                  all tests
#   make test-unit, make test-distributed      those without, and with, several processes: two halves of `make test`
#   make test-fast                             without those marked slow
#   make test-nightly                          those that are one more of a kind, and in none of the above
#   make test PYTEST_ARGS="-n 2 -k sd3"        anything pytest takes
#   make test VENV=~/envs/diffusion            in a virtual environment you have; its torch is kept
#   make test TORCH="torch==2.14.0"            another torch; anything `pip install` takes
#   make test PYTHON=python3.12                the interpreter that makes $(VENV)
#   make test LOWEST=1                         with the lowest versions that pyproject.toml names, in .venv-lowest

PYTHON ?= python3
LOWEST ?=
VENV ?= $(if $(LOWEST),.venv-lowest,.venv)
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# As activating it would: DeepSpeed, for one, looks for ninja on the PATH.
RUN := PATH="$$(cd $(BIN) && pwd):$$PATH"
INSTALLED := $(VENV)/.diffusion_opd-installed

.PHONY: install test test-unit test-distributed test-fast test-nightly demo lint format docs docs-serve clean

install: $(INSTALLED)

INSTALL := $(BIN)/python -m pip install -e ".[dev]"
ifneq ($(LOWEST),)
# uv, since pip knows the newest only; it keeps what is there, so the environment is made anew each time.
INSTALL := $(BIN)/python -m pip install uv && $(BIN)/uv pip install --python $(BIN)/python \
	--resolution lowest-direct -e ".[deepspeed,docs,examples,rewards,test]"
endif

# torch goes first and is then held by a constraint: left to itself, pip may replace a CPU build by the newest CUDA one.
$(INSTALLED): pyproject.toml
	test -z "$(LOWEST)" -a -x $(BIN)/python || $(PYTHON) -m venv $(if $(LOWEST),--clear) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip list --format=freeze | grep "^torch==" > $(VENV)/constraints.txt
	$(INSTALL) -c $(VENV)/constraints.txt
	touch $@

test: $(INSTALLED)
	$(RUN) python -m pytest -m "not nightly" $(PYTEST_ARGS)

DISTRIBUTED := tests/test_distributed.py tests/test_durable.py

test-unit: $(INSTALLED)
	$(RUN) python -m pytest -m "not nightly" $(DISTRIBUTED:%=--ignore=%) $(PYTEST_ARGS)

test-distributed: $(INSTALLED)
	$(RUN) python -m pytest -m "not nightly" $(DISTRIBUTED) $(PYTEST_ARGS)

test-fast: $(INSTALLED)
	$(RUN) python -m pytest -m "not slow and not nightly" $(PYTEST_ARGS)

test-nightly: $(INSTALLED)
	$(RUN) python -m pytest -m nightly $(PYTEST_ARGS)

# transformers warns at its import that there is no torchvision.
demo: export TRANSFORMERS_VERBOSITY = error

demo: $(INSTALLED)
	$(RUN) python -m examples.toy_world.demo

lint: $(INSTALLED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

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
	rm -rf site build dist .pytest_cache .ruff_cache .mypy_cache
