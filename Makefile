# Two commands: `make demo` and `make test`. Each sets up .venv by itself when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# The release that everything here was run with, on CPUs. `make TORCH=torch setup` takes the newest instead.
TORCH ?= torch==2.13.0
# timm's own tests need it; the release that belongs to TORCH.
TORCHVISION ?= torchvision==0.28.0
UV := $(shell command -v uv 2>/dev/null)
READY := .venv/.ready
ENCODERS := .cache/encoders

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check encoders clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with the package and its development tools

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifdef UV
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" VIRTUAL_ENV=.venv uv pip install "$(TORCH)"
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" VIRTUAL_ENV=.venv uv pip install -e ".[dev,caption]"
else
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev,caption]"
endif
	# Apart from the environment: beside a CPU-only torch, torchvision breaks what finds it. Without them, timm's tests are skipped.
	-$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/timm "timm>=1.0.31" "$(TORCHVISION)"
	touch $(READY)

demo: $(READY) ## train COMM and its controls on the micro world; writes runs/demo/report.html
	$(BIN)/commvlm quickstart --out runs/demo

test: $(READY) ## the default tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

test-slow: $(READY) ## the tests of minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -q

check: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Hours on one core; what is done is kept, so it may be stopped at any time and called again. The malloc settings spare page
# faults: glibc else gives every large tensor back to the system.
PARTS ?= lm clip deit mae dinov2
encoders: $(READY) ## pretrain the tiny LM and the four tiny encoders from nothing, and score them
	for part in $(PARTS); do \
	  export OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_MMAP_THRESHOLD_=10000000000; \
	  nice $(BIN)/commvlm microworld pretrain $$part --out $(ENCODERS)/$$part && \
	  nice $(BIN)/commvlm microworld card $(ENCODERS)/$$part/model || exit; \
	done

clean: ## remove .venv, caches and runs
	rm -rf .venv .cache runs .pytest_cache .ruff_cache
