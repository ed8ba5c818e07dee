# `make demo` and `make test` set everything up on a machine that has Python (3.10 or newer), make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo demo-stamps test test-unit lint bench clean

help:
	@echo "make demo         train a small model on 4 CPU ranks, stop and resume it, ask it, see what it reconstructs"
	@echo "make demo-stamps  the same on 150 real pictures (fetches a Debian package)"
	@echo "make test         the whole test suite        make test-unit  its fast part"
	@echo "make lint         ruff                        make bench      ratios, each measured in one run"

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo/run_demo.py --out runs/demo

demo-stamps: $(INSTALLED)
	$(BIN)/python examples/stamps/run_stamps.py --out runs/stamps

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) runs build *.egg-info
