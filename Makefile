# Everything a developer runs. `make` alone lists the targets.
#
# An installation step leaves a stamp whose name is a checksum of what it depends on, so a second
# call installs nothing, and a change of constraints.txt, pyproject.toml, setup.py, csrc/ or TORCH
# repeats exactly the steps that read it.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The interpreter that makes the virtual environment; for `make gpu`, the one that runs.
PYTHON ?= python3
# The torch to install, e.g. TORCH='torch==2.12.0' or TORCH=/path/to/a.whl.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
# More arguments for pytest, e.g. ARGS='tests/moe -x'.
ARGS   ?=
# How many tests run at a time, besides those that want the machine to themselves.
WORKERS ?= 3
# The benchmarks of `make bench`.
BENCHMARKS ?= all

BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
checksum = $(shell { $(1); } 2>/dev/null | cksum | cut -d' ' -f1)

DEPS_KEY  := $(call checksum,cat constraints.txt pyproject.toml; echo '$(TORCH)')
BUILD_KEY := $(call checksum,find csrc -type f | LC_ALL=C sort | xargs cat setup.py pyproject.toml; echo '$(TORCH)')

CORE_STAMP  := $(STAMPS)/core-$(DEPS_KEY)
TEST_STAMP  := $(STAMPS)/test-$(DEPS_KEY)
LINT_STAMP  := $(STAMPS)/lint-$(DEPS_KEY)
BUILD_STAMP := $(STAMPS)/build-$(BUILD_KEY)

# The requirements that pyproject.toml lists: those of the core, or of the extras named.
REQUIREMENTS = $(BIN)/python -c 'import sys, tomllib; \
	p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	e = p["optional-dependencies"]; \
	print("\n".join(sum((e[x] for x in sys.argv[1:]), [] if sys.argv[1:] else p["dependencies"])))'
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
finish  = rm -f $(STAMPS)/$(1)-*; touch $@

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

# --- installation ---------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] < (3, 14) else \
	  f"moesys needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(CORE_STAMP): | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "Installing $(TORCH)"
	@$(INSTALL) '$(TORCH)'
	@echo "Installing what moesys itself needs"
	@$(REQUIREMENTS) > $(STAMPS)/requirements.txt
	@$(INSTALL) -r $(STAMPS)/requirements.txt
	@$(REQUIREMENTS) megatron > $(STAMPS)/requirements.txt
	@$(INSTALL) --no-deps -r $(STAMPS)/requirements.txt
	@$(call finish,core)

$(TEST_STAMP): $(CORE_STAMP)
	@echo "Installing what the tests need"
	@$(REQUIREMENTS) test tracking huggingface deepspeed planning > $(STAMPS)/requirements.txt
	@$(INSTALL) -r $(STAMPS)/requirements.txt
	@$(call finish,test)

$(LINT_STAMP): $(TEST_STAMP)
	@echo "Installing the linters"
	@$(REQUIREMENTS) lint > $(STAMPS)/requirements.txt
	@$(INSTALL) -r $(STAMPS)/requirements.txt
	@$(call finish,lint)

$(BUILD_STAMP): $(CORE_STAMP)
	@echo "Building csrc"
	@$(INSTALL) --no-build-isolation --no-deps --editable .
	@$(call finish,build)

.PHONY: build
build: $(BUILD_STAMP) ## install moesys into $(VENV), its C++ operators built

# --- what it is for -------------------------------------------------------------------------

data/stdlib/manifest.json: | $(BUILD_STAMP)
	$(BIN)/moesys prep --input stdlib --output data/stdlib --vocab-size 2048

.PHONY: quickstart
quickstart: $(BUILD_STAMP) data/stdlib/manifest.json ## train a small MoE model on this machine (2 ranks, no GPU needed)
	PYTHON=$(BIN)/python launch/run.sh --nproc 2 experiment=quickstart
	$(BIN)/moesys report runs/quickstart

.PHONY: test
test: $(TEST_STAMP) $(BUILD_STAMP) ## run every test that this machine can run
	$(call pytest,-n $(WORKERS) --dist loadfile -m 'not alone and $(QUICK)')
	$(call pytest,-m 'alone and $(QUICK)')

QUICK  = not parity and not oracle and not slurm and not chaos and not whole
pytest = $(BIN)/python -m pytest $(1) $(ARGS) || [ $$? = 5 ] # 5: no such test among those of ARGS

# Whose tests report figures of `moesys bench parallel`, besides those marked parity.
FIGURES := build/figures.jsonl
FIGURE_TESTS := tests/checkpoint/test_damage.py tests/checkpoint/test_crash.py tests/plan/test_activations.py \
	tests/parallel/test_paper_layer.py tests/train/test_layouts.py

.PHONY: parity
parity: $(TEST_STAMP) $(BUILD_STAMP) ## compare every layout with one process, blocks with other systems; write the figures
	@rm -f $(FIGURES)
	MOESYS_FIGURES=$(FIGURES) $(BIN)/python -m pytest -m "parity or oracle" $(ARGS)
	MOESYS_FIGURES=$(FIGURES) $(BIN)/python -m pytest $(FIGURE_TESTS)
	MOESYS_FIGURES=$(FIGURES) $(BIN)/moesys bench parallel

.PHONY: whole
whole: $(TEST_STAMP) $(BUILD_STAMP) ## train quickstart to its end and check what it reaches, in minutes (alone on the machine)
	$(BIN)/python -m pytest -m whole $(ARGS)

.PHONY: slurm
slurm: $(TEST_STAMP) $(BUILD_STAMP) ## the long suite on a real Slurm (as root, with slurm-wlm and munge installed)
	$(BIN)/python -m pytest -m slurm $(ARGS)

.PHONY: chaos
chaos: $(TEST_STAMP) $(BUILD_STAMP) data/stdlib/manifest.json ## every kind of fault in a real job, then 30 minutes with one a minute
	$(call pytest,-m chaos)
	$(BIN)/moesys chaos --mean-s 60 --minutes 30 --kinds kill,exception,stop,slow,partition,disk_full,corrupt_checkpoint \
	  experiment=quickstart train.timeout_s=30 checkpoint.every_steps=20 run.dir=runs/chaos

.PHONY: gpu
gpu: ## on a machine with a GPU and torch: build for it, run the GPU tests and benchmarks
	@$(PYTHON) -m benchmarks.gpu --check
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.gpu

.PHONY: bench
bench: $(TEST_STAMP) $(BUILD_STAMP) ## run the benchmarks (BENCHMARKS='layer step') and write docs/benchmarks.md
	$(BIN)/moesys bench $(BENCHMARKS)
	$(BIN)/python -m benchmarks.docs

.PHONY: docs
docs: | $(BIN)/python ## write docs/benchmarks.md and the figures of docs/reliability.md from benchmarks/results
	$(BIN)/python -m benchmarks.docs

# --- checks ---------------------------------------------------------------------------------

CPP   = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
SHELLS = $(shell find launch .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -path .ci/run \))

.PHONY: lint lint-ruff lint-types lint-cpp lint-words lint-shell
lint: lint-ruff lint-cpp lint-words lint-shell lint-types ## every static check

lint-ruff: $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: $(LINT_STAMP)
	$(BIN)/pyright

lint-cpp: $(LINT_STAMP)
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

lint-words: $(LINT_STAMP)
	$(BIN)/codespell

lint-shell: $(LINT_STAMP)
	$(BIN)/shellcheck $(SHELLS)

.PHONY: format
format: $(LINT_STAMP) ## put Python and C++ in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

.PHONY: clean
clean: ## remove what was built; .venv, data and runs stay
	rm -rf build dist *.egg-info .ruff_cache .hypothesis $(STAMPS)/build-*
	find moesys tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	find moesys -name '*.so' -delete
