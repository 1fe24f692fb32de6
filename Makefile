# make study | make test | make test-slow | make lint | make types. Each sets up its own environment in .venv first.
# make test-vision: the tests of timm's models, in .venv-vision, since timm needs torchvision and the library does not.
# make test-triton: the GPU kernels, in Triton's interpreter on the CPU (200 MB to fetch, and nothing else needs it).

PYTHON ?= python3
VENV ?= .venv
# Where to take PyTorch from, for example https://download.pytorch.org/whl/cpu (small, no CUDA); empty: pip's default.
TORCH_INDEX ?=
VISION_VENV ?= .venv-vision
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VISION_STAMP := $(VISION_VENV)/.installed
TRITON := $(VENV)/triton
TRITON_STAMP := $(TRITON)/.installed
comma := ,
EXTRAS := eval,dev,peft,trl,serving

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export MPLBACKEND = Agg

.PHONY: study test test-slow test-vision vision-environment test-triton lint types clean

study: $(STAMP)
	$(BIN)/ssm-vlm study

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" -q

test-vision: $(VISION_STAMP)
	@$(VISION_VENV)/bin/python -c 'import torchvision' 2>/dev/null || { \
		echo "torchvision does not load beside this PyTorch; take both from one index, as TORCH_INDEX does."; exit 1; }
	$(VISION_VENV)/bin/python -m pytest -n 2 -m "timm and not gpu" -q

vision-environment: $(VISION_STAMP)

test-triton: $(STAMP) $(TRITON_STAMP)
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/modeling/test_selective_scan_2d_triton.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the folders under their installed names only in a regular install
types: $(STAMP)
	rm -rf build $(VENV)/typed && $(BIN)/pip install -q --no-deps --no-compile --target $(VENV)/typed .
	cd $(VENV)/typed && MYPYPATH=. ../bin/mypy -p ssm_vlm --config-file $(CURDIR)/pyproject.toml

# $(call install,ENVIRONMENT,PACKAGES OF TORCH_INDEX,EXTRAS)
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt $(2)
	$(1)/bin/pip install -q -c constraints.txt -e '.[$(3)]'
	touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),torch,$(EXTRAS))

$(VISION_STAMP): pyproject.toml constraints.txt
	$(call install,$(VISION_VENV),torch torchvision,$(EXTRAS)$(comma)timm)

$(TRITON_STAMP): $(STAMP)
	rm -rf $(TRITON)
	$(BIN)/pip install -q --no-deps --no-compile --target $(TRITON) triton==3.7.1
	touch $@

clean:
	rm -rf $(VENV) $(VISION_VENV) build runs
