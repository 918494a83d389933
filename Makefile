# make demo | test | compat | lint | audit | bench | gpu
# Each target makes its own .venv when there is none and installs what it needs; `make gpu` uses the python at hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
THREADS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(THREADS)
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

# Tests of what plans and sweeps do to models of transformers.
COMPAT := $(addprefix tests/emocircuits/test_,patching.py edits.py generation.py families_text.py families_vision.py capture.py presets.py \
	sweep_engine.py sweep_decoding.py sweep_silent.py sweep_several.py sweep_steering.py)
OLDEST := $(VENV)/transformers-5.17

.PHONY: help install demo test compat lint audit bench gpu clean
help:
	@sed -n 's/^\([a-z]*\): *.*## /  make \1\t/p' $(MAKEFILE_LIST)

# torch first and by itself: with it in place nothing else pulls another build of it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "emokernels needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,lint]'
	@touch $@

# Installing builds csrc too where nvcc is at hand; this builds it again when it has changed.
$(VENV)/.native: $(VENV)/.installed $(wildcard csrc/*.cpp csrc/*/*)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

install: $(VENV)/.installed $(VENV)/.native ## make .venv and install everything, csrc included where nvcc is there

demo: $(VENV)/.installed ## the whole story on the embedded model, and a page to look at
	$(BIN)/emocircuits demo --out demo-out

# One worker a core, one thread a worker: many small tests run faster that way than few threaded ones.
test: $(VENV)/.native ## every test that runs without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist worksteal

# The oldest transformers that is supported, beside everything else as it is installed. torch 2.11 has no CPU build in every
# package index, so its turn comes on a GPU machine (make gpu).
$(OLDEST)/.installed: $(VENV)/.installed
	grep -viE '^(transformers|huggingface_hub|hf-xet|httpx2?|httpcore2?)==' constraints.txt > $(VENV)/oldest.txt
	$(BIN)/python -m pip install --quiet --upgrade -c $(VENV)/oldest.txt --target $(OLDEST) 'transformers==5.17.*'
	@touch $@

compat: $(VENV)/.native $(OLDEST)/.installed ## the patching layer on the oldest transformers that is supported
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist worksteal $(COMPAT)

lint: $(VENV)/.installed ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(VENV)/.installed ## every GPU kernel compiled for three architectures, without a GPU, and its code checked
	$(BIN)/python -m emokernels.audit --arch all

bench: $(VENV)/.installed ## what an intervention costs on this CPU
	$(BIN)/python bench/attention_cpu.py --check
	$(BIN)/emocircuits bench --device cpu --check --batch 32 --only empty veena
	$(BIN)/emocircuits bench --device cpu --check --config llava-0.1b --random-weights --only empty veena
	$(BIN)/emocircuits bench --device cpu --check --config llava-0.3b --random-weights --only empty veena
	$(BIN)/python -m pytest -p no:cacheprovider bench

gpu: ## GPU tests and benchmarks, with the python at hand; installs nothing (GPU_ARGS=--quick, ...)
	$(PYTHON) bench/gpu.py $(GPU_ARGS)

clean: ## remove the environment and what the targets wrote
	rm -rf $(VENV) demo-out build *.egg-info emokernels/_C*.so
