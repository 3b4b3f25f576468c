# `make help` lists the targets. The first one that needs Python makes .venv and installs into it.
# Another Python than the one that tools/find_python.sh finds: make PYTHON=/path/to/python TARGET

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.PHONY: help install test test-gpu test-slow parity checks demo lr-transfer clean

export PYTHON
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
# How many tests run at a time, those of one file one by one; each process computes with one thread.
WORKERS := 2
THREADS := OMP_NUM_THREADS=1
# Tests for a CPU, on a machine with GPUs too.
ON_CPU := CUDA_VISIBLE_DEVICES=

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(INSTALLED) ## make .venv, with the tested versions of everything

# Again whenever what should be installed changes. The stamp comes last, so a broken install starts over.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt .python-version tools/find_python.sh
	@python=$$(tools/find_python.sh) || exit 1; \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
		|| { echo "making $(VENV) with $$python"; "$$python" -m venv --clear $(VENV); }
	@$(BIN)/python -c 'import sys; v = sys.version_info; v[:2] == (3, 12) or \
		print(f"note: this is Python {v[0]}.{v[1]}; constraints.txt was tested with 3.12")'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	@touch $@

$(VENV)/transformers-5/.installed: $(INSTALLED) tests/hf/transformers-5.txt
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) --requirement tests/hf/transformers-5.txt
	@touch $@

test: install $(VENV)/transformers-5/.installed checks ## all tests that need no GPU, after the checks
	$(ON_CPU) $(THREADS) $(PYTEST) -n $(WORKERS) --dist loadfile -m "not gpu and not slow" --durations 15 \
		--ignore tests/test_readme.py --ignore tests/test_examples.py

test-slow: install ## the tests that take minutes each
	$(ON_CPU) $(THREADS) $(PYTEST) -m "slow and not gpu" --durations 15

# Whole models against the float64 reference run on whatever device there is: here, on the GPU.
test-gpu: install ## the tests that need a GPU, and whole models on it
	$(THREADS) $(PYTEST) -m gpu --durations 15
	$(THREADS) $(PYTEST) -m "not slow" tests/model/test_reference.py tests/model/test_documents.py

parity: install ## every model in every layout against one process, as a table (docs/parity.md): about half an hour
	$(BIN)/python -m tests.parallel.compare

checks: install ## format, lint, types; commands of the README; arguments of the examples
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy archscale_megatron
	$(PYTEST) -q tests/test_readme.py tests/test_examples.py

demo: install ## text to trained model, on this machine
	$(BIN)/python tools/demo.py

lr-transfer: install ## does the best learning rate stay? SP and muP++ at depths 4, 8, 12: about an hour on 2 cores
	@[ -f runs/stdlib/corpus_text_document.idx ] || $(BIN)/python tools/demo.py --data-only --output runs/stdlib
	$(BIN)/python -m archscale_megatron.scaling sweep --config examples/lr_transfer.yaml --output runs/lr-transfer --jobs 2 --last 30
	$(BIN)/python -m archscale_megatron.scaling plot-lr runs/lr-transfer/results.csv -o runs/lr-transfer/lr.png

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
