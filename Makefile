# `make demo` and `make test` set everything up themselves; all they need is Python 3.11 to 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

# Extra options for every test step, such as PYTEST_ARGS=--durations=20.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -rs $(PYTEST_ARGS)
STEPS := $(VENV)/steps

help:
	@echo "make demo     train, evaluate and chat with a tiny model, on this machine"
	@echo "make test     lint, then the fast, the slow, the parity and the ahead-of-time tests"
	@echo "make lint     ruff check and ruff format --check"
	@echo "make format   let ruff mend what it can"
	@echo "make clean    remove the virtual environment and caches"

$(BIN)/python:
	$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(0 if ok else "Python 3.11, 3.12 or 3.13 is needed; name it: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Stamps: an environment is up to date when it was installed after the last change of its definition.
$(VENV)/.installed-demo: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,parity]'
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-aot: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[aot]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/medmoe demo

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(VENV)/.installed-test $(VENV)/.installed-aot
	@rm -rf $(STEPS); mkdir -p $(STEPS)
	@echo "== lint =="
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== fast tests =="
	@$(PYTEST) -n $(JOBS) --dist loadfile -m "not slow and not parity and not aot" | tee $(STEPS)/1-fast.log
	@echo "== slow tests =="
	@$(PYTEST) -m "slow and not parity and not aot" | tee $(STEPS)/2-slow.log
	@echo "== parity tests =="
	@$(PYTEST) -n $(JOBS) --dist loadfile -m parity | tee $(STEPS)/3-parity.log
	@echo "== ahead-of-time tests: compiling for TPU =="
	@$(PYTEST) -n $(JOBS) -m aot | tee $(STEPS)/4-aot.log
	@echo "== summary =="
	@# A worker of pytest-xdist that breaks takes its test along, and leaves the exit status at 0.
	@! grep --with-filename INTERNALERROR $(STEPS)/*.log
	@echo "tests skipped: $$(cat $(STEPS)/*.log | sed -n 's/^=.* \([0-9]*\) skipped.*/\1/p' | awk '{n += $$1} END {print n + 0}')"
	@for log in $(STEPS)/*.log; do echo "$$(basename $$log .log): $$(tail -n 1 $$log)"; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
