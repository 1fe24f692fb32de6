# make study | make test | make test-slow | make lint | make types. Each sets up its own environment in .venv first.

PYTHON ?= python3
VENV ?= .venv
# Where to take PyTorch from, for example https://download.pytorch.org/whl/cpu (small, no CUDA); empty: pip's default.
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export MPLBACKEND = Agg

.PHONY: study test test-slow lint types clean

study: $(STAMP)
	$(BIN)/ssm-vlm study

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the folders under their installed names only in a regular install
types: $(STAMP)
	rm -rf $(VENV)/typed && $(BIN)/pip install -q --no-deps --no-compile --target $(VENV)/typed .
	cd $(VENV)/typed && MYPYPATH=. ../bin/mypy -p ssm_vlm --config-file $(CURDIR)/pyproject.toml

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[eval,dev,peft]'
	touch $@

clean:
	rm -rf $(VENV) runs
