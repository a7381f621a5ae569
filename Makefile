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
.PHONY: help setup demo probe study test test-slow test-browser test-kill check docs notebooks encoders clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with the package and its development tools

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than 3.11: name another one, such as make PYTHON=python3.12"; exit 1; }
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

# What is done is kept: stopped or with more encoders, it goes on. Two processes of one thread each.
probe: $(READY) ## read every tiny encoder, layer by layer, with controls; draws runs/probe/report.html
	OMP_NUM_THREADS=1 $(BIN)/commvlm probe micro --out runs/probe

study: $(READY) ## the study at its quick scale, 23 minutes on two cores; writes runs/study/quick/report.html
	$(BIN)/commvlm study figure-2 table-1 controls weights --scale quick

test: $(READY) ## the default tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

test-slow: $(READY) ## the tests of minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -q

# Chromium itself is the system's; CHROMIUM=/path/to/it where it is not on the PATH.
test-browser: $(READY) ## the web demo, driven in headless Chromium
	$(BIN)/python -m pip install --quiet -e ".[browser]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -q -rs tests/test_demo_page.py

test-kill: $(READY) ## kill a run 20 times, in one and in two processes, and compare with one that nothing interrupts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -k kill_twenty_times -s -q tests/test_parallel.py

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

docs: $(READY) ## the docs as a site in site/, links checked
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m pytest -q tests/test_docs_pages.py

notebooks: $(READY) ## run the notebooks as they are and keep what they show (half an hour on one slow core)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	OMP_NUM_THREADS=1 $(BIN)/python docs/notebooks/run.py docs/notebooks/*.ipynb

clean: ## remove .venv, caches and runs
	rm -rf .venv .cache runs site .pytest_cache .ruff_cache
