# Everything runs in .venv, which the first target makes: only Python 3.11+ and make are needed.
#   make PYTHON=python3.12 setup       another Python
#   make TORCH="torch" setup           another torch, or pip options that lead to one
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMP := .venv/.installed

# Waiting threads sleep: spinning saves 3 % on idle cores and more than doubles the time on busy ones.
export OMP_WAIT_POLICY = passive

.PHONY: help setup lint test test-families test-compat docs demo compare results-table picture commands clean
.DELETE_ON_ERROR:

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1	/p' Makefile | sort | awk -F'\t' '{printf "make %-14s%s\n", $$1, $$2}'

setup: $(STAMP)  ## Make .venv with qinit and what its development needs; again after pyproject.toml changed

# torch goes first and alone, so that nothing else decides which one it is.
$(STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing into .venv; the first time takes some minutes."
	$(PIP) $(TORCH)
	$(PIP) --editable ".[dev]"
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: qinit needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); make PYTHON=python3.12 setup" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments; install its venv module (Debian: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

lint: $(STAMP)  ## Style, formatting, types, and the order of the pipeline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The workers share the cores. Bytecode is kept whatever the environment says: the tests start many child processes.
test: export OMP_NUM_THREADS = 1
test: export PYTHONDONTWRITEBYTECODE =
test: $(STAMP)  ## The tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Nine minutes on two cores; docs/families.md is written from what it keeps.
test-families: export OMP_NUM_THREADS = 1
test-families: $(STAMP)  ## Every family of models, head and format, through the stock loaders
	$(BIN)/python -m tests.families --jobs $(WORKERS) --json model_zoo/results/families.json

# Each trainer and reader has an environment of its own in build/compat, made anew when its pip commands change.
test-compat: export OMP_NUM_THREADS = 1
test-compat: export TORCH := $(TORCH)
test-compat: $(STAMP)  ## The trainers of docs/trainers, each some steps from a run, and the readers of docs/export.md; TRAINERS="trl axolotl" or READERS="llama.cpp" for some of them
	$(if $(READERS),,$(BIN)/python -m tests.compat.trainers $(TRAINERS))
	$(if $(TRAINERS),,$(BIN)/python -m tests.compat.readers $(READERS))

# Strict: a broken link, or a page that is not in the menu, fails. The variable only hushes a notice.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)  ## The site, into build/site
	$(BIN)/mkdocs build --strict

demo: $(STAMP)  ## Quantize the demo model to 2 bits, compare the start with its peers', and train from it and from QLoRA's
	$(BIN)/qinit eqft --bits 2 --rank 16 --calibration-samples 64 --calibration-length 256 --overwrite
	$(BIN)/python benchmarks/demo.py model_zoo/eqft/demo-2bit-16rank

# One thread for each of two cells at a time; finished cells are kept, so that it can be stopped and started again.
compare: $(STAMP)  ## Every method at 2, 3 and 4 bits, fine-tuned with three seeds; about half an hour
	$(BIN)/qinit compare --finetune 64 --learning-rates 0.002,0.004,0.006,0.008 \
	  --full-learning-rates 0.0004,0.0008,0.0016 --length 256 --windows 48 \
	  --calibration-samples 64 --calibration-length 256 --jobs 2

results-table: $(STAMP)  ## The tables of README.md and docs/, from model_zoo/results
	$(BIN)/python benchmarks/results_table.py

picture: $(STAMP)  ## The README's picture, from model_zoo/results
	$(BIN)/python benchmarks/picture.py

commands: $(STAMP)  ## docs/commands.md, from the command line's own help, the files in docs/trainers, the table in docs/starts.md
	$(BIN)/python docs/commands.py
	$(BIN)/python docs/trainer_files.py
	$(BIN)/python docs/start_table.py

clean:  ## Remove .venv and what the tools left
	rm -rf .venv build .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
