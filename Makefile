# `make demo` and `make test` set everything up on a machine that has Python (3.11 or newer), make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Transformer Engine's Python layer without its kernels (tests/te); all other packages are those of $(VENV)
TE_VENV := .venv-te
TE_INSTALLED := $(TE_VENV)/.installed
# The services of --tracker; they bring packages of their own
TRACKERS_VENV := .venv-trackers
TRACKERS_INSTALLED := $(TRACKERS_VENV)/.installed
# vLLM and lmms-eval, whose versions of packages are others
SERVING_VENV := .venv-serving
SERVING_INSTALLED := $(SERVING_VENV)/.installed
SITE_PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: help demo demo-stamps test test-slow test-te test-trackers test-serving test-unit test-soak fp8-convergence lint bench clean

help:
	@echo "make demo         train a small model on 4 CPU ranks, stop and resume it, ask it questions, reconstruct pictures"
	@echo "make demo-stamps  the same on 150 real pictures (fetches a Debian package)"
	@echo "make test         the whole test suite        make test-unit  its fast part"
	@echo "make test-slow    runs that are killed, restarted or resumed at other layouts; 10 minutes"
	@echo "make test-te      models on Transformer Engine's Python layer, with stand-ins for its kernels"
	@echo "make test-trackers  the services of --tracker, with their packages"
	@echo "make test-serving exports of the demo in vLLM and lmms-eval, in an environment of 4 GB"
	@echo "make test-soak    runs killed anywhere and resumed; files damaged in hundreds of ways"
	@echo "make fp8-convergence  the demo's second stage in fp32, bf16 and FP8 on those stand-ins, drawn into docs/"
	@echo "make lint         ruff, mypy                  make bench      ratios and counts, into benchmarks/RESULTS.md"

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(TE_INSTALLED): $(INSTALLED) constraints-te.txt
	$(PYTHON) -m venv $(TE_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" > $$($(TE_VENV)/bin/python $(SITE_PACKAGES))/base.pth
	$(TE_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-te.txt
	@touch $@

$(TRACKERS_INSTALLED): $(INSTALLED) constraints-trackers.txt
	$(PYTHON) -m venv $(TRACKERS_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" > $$($(TRACKERS_VENV)/bin/python $(SITE_PACKAGES))/base.pth
	$(TRACKERS_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement constraints-trackers.txt
	@touch $@

# torchaudio's wheel does not import beside every build of torch, and nothing here needs it
$(SERVING_INSTALLED): constraints-serving.txt
	$(PYTHON) -m venv $(SERVING_VENV)
	$(SERVING_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement constraints-serving.txt
	$(SERVING_VENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo/run_demo.py --out runs/demo

demo-stamps: $(INSTALLED)
	$(BIN)/python examples/stamps/run_stamps.py --out runs/stamps

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-te: $(TE_INSTALLED)
	$(TE_VENV)/bin/python -m pytest tests/te

test-trackers: $(TRACKERS_INSTALLED)
	$(TRACKERS_VENV)/bin/python -m pytest tests/unit/reporting/test_trackers.py

test-serving: $(INSTALLED) $(SERVING_INSTALLED)
	test -e runs/demo/summary.json || $(BIN)/python examples/demo/run_demo.py --out runs/demo
	$(BIN)/python -m pytest tests/serving

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit

test-soak: $(INSTALLED)
	$(BIN)/python tests/soak/kill_resume.py --trials 20
	$(BIN)/python tests/soak/fuzz_inputs.py --cases 200 --seed 1

fp8-convergence: $(TE_INSTALLED)
	test -e runs/demo/pretrain || $(BIN)/python examples/demo/run_demo.py --out runs/demo --only-pretrain
	$(TE_VENV)/bin/python -m tests.te.convergence --picture docs/fp8_convergence.svg

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(TE_VENV) $(TRACKERS_VENV) $(SERVING_VENV) runs build *.egg-info
