# make lottery | make test: both set everything up first.
# PYTHON=/path/to/python3.12 picks another interpreter, EXTRA=cuda12 an accelerator.
PYTHON ?= python3
EXTRA ?=
# The newest interpreter that runs: on the PATH, or of pyenv.
CANDIDATES := python3.14 python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9].*/bin/python3)
NEWEST = $(firstword $(shell for p in $(CANDIDATES); do $$p -c '' 2>/dev/null && echo $$p; done))
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
RUN := $(VENV)/.installed-run$(EXTRA)
DEV := $(VENV)/.installed-dev$(EXTRA)
comma := ,

# What the newest jax is most likely to break; about a minute.
QUICK := tests/jaxprs/test_primitives.py tests/graph/tracing/test_structure.py \
  tests/compaction/test_kinds.py tests/experiments/test_seeds.py

# Random programs: make fuzz SEEDS=500:600.
SEEDS ?= 0:500

.PHONY: lottery test test-newest test-newest-quick lint types imports pytest notebooks \
  quick soak fuzz clean
lottery: $(RUN)
	$(BIN)/dagjax lottery $(ARGS)

test: lint types imports pytest notebooks

test-newest:
	@test -n "$(NEWEST)" || { echo "no Python 3.12 or later found; set PYTHON and use make test"; exit 2; }
	$(MAKE) test PYTHON=$(NEWEST)

test-newest-quick:
	$(if $(NEWEST),$(MAKE) types quick PYTHON=$(NEWEST),@echo "no Python 3.12 or later here")

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

imports: $(DEV)
	$(BIN)/lint-imports

pytest: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK)

soak: fuzz
	$(BIN)/python -m pytest -n 2 --dist worksteal -m soak tests

fuzz: $(DEV)
	DAGJAX_FUZZ_SEEDS=$(SEEDS) $(BIN)/python -m pytest -n 2 --dist worksteal tests/fuzz

notebooks: $(DEV)
	$(BIN)/python -m pytest --nbmake notebooks -p no:cacheprovider

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dagjax needs Python 3.11 or later, got $(VERSION); set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all$(if $(EXTRA),$(comma)$(EXTRA))]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev$(if $(EXTRA),$(comma)$(EXTRA))]'
	@touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis
