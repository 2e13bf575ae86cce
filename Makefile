# Each target makes what it needs: .venv with a Python >= 3.11, the package, its dependencies.
# `make demo` and `make test` are enough on a machine that has Python and nothing else.

VENV := .venv
# Processes of `make test`, each with one thread: most tests compute too little for two.
WORKERS ?= 2
PY := $(VENV)/bin/python
SHELL := /bin/bash
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help demo test test-slow test-lowest audit test-browser chromium lint types docs format train app clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       pictures under CFG and APG into out/"
	@echo "make test       lint and the quick tests"
	@echo "make test-slow  all tests"
	@echo "make test-lowest  the quick tests, or TESTS=..., under the lowest versions that are supported"
	@echo "make audit      known vulnerabilities of the versions in constraints.txt"
	@echo "make test-browser  the app in Chromium"
	@echo "make lint       ruff alone       make format  ruff, repairing"
	@echo "make types      mypy on a plain copy of the package"
	@echo "make docs       the documentation's site, into build/site"
	@echo "make train      the bundled models from nothing, resumable (PRESET=cpu or gpu)"
	@echo "make app        the Gradio app"

demo: $(VENV)/stamp-core
	$(PY) -m trimtab demo --output out

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

test-slow: lint
	$(PY) -m pytest

# An environment of its own, of Python 3.11.
test-lowest: build/lowest/stamp
	build/lowest/bin/python -m pytest -m "not slow" $(TESTS)

build/lowest/stamp: pyproject.toml .ci/lowest.py | $(PY)
	$(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: wants Python 3.11" >&2; exit 1; }
	$(PY) -m venv build/lowest
	$(PY) .ci/lowest.py >build/lowest/constraints.txt
	build/lowest/bin/python -m pip install --quiet --constraint build/lowest/constraints.txt --editable ".[dev]"
	@touch $@

audit: $(VENV)/stamp-dev
	$(PY) -m pip_audit --strict --no-deps --disable-pip --requirement constraints.txt

test-browser: $(VENV)/stamp-dev $(VENV)/stamp-browser chromium
	$(PY) -m pytest tests/browser --durations=5

# Debian's, where it is missing and may be installed; else its path may be given as CHROMIUM=...
chromium:
	@[ -n "$$CHROMIUM" ] || command -v chromium chromium-browser >/dev/null || { \
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing Chromium" \
	    && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium \
	        >/dev/null; } || { \
	    echo "make: the browser tests need Chromium: apt install chromium, or its path as CHROMIUM=..." >&2; exit 1; }

lint: $(VENV)/stamp-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/stamp-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# mypy does not see editable installs whose packages are mapped: give it a plain copy.
types: $(VENV)/stamp-dev
	rm -rf build/typed
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(PY) -m mypy -p trimtab

# Strict: a warning is an error.
docs: $(VENV)/stamp-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -W ignore -m mkdocs build --strict --quiet

train: $(VENV)/stamp-training
	$(PY) -m trimtab.recipes.train $(if $(PRESET),--preset $(PRESET))

app: $(VENV)/stamp-app
	$(PY) app.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# The environment. A stamp a set of extras, so that a second call starts at once.

$(PY):
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	    "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "making $(VENV) with $$python"; "$$python" -m venv $(VENV) && exit 0; \
	done; \
	echo "make: no Python >= 3.11 with venv found (on Debian: apt install python3-venv); give one as PYTHON=..." >&2; \
	exit 1

# torch first: on Linux the index's default build carries gigabytes of CUDA libraries, so without an NVIDIA GPU
# the CPU wheels are asked for, where they can be reached.
$(VENV)/stamp-torch: constraints.txt | $(PY)
	@cpu=https://download.pytorch.org/whl/cpu; more=; \
	if [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1 \
	    && ! $(PY) -c 'import torch' 2>/dev/null \
	    && $(PY) -c "import urllib.request as u; u.urlopen('$$cpu/torch/', timeout=10)" 2>/dev/null; \
	then more="--extra-index-url $$cpu"; fi; \
	echo "installing torch $$more"; \
	$(PY) -m pip install --quiet --constraint constraints.txt $$more torch numpy setuptools
	@touch $@

$(VENV)/stamp-core: $(VENV)/stamp-torch pyproject.toml
	$(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(VENV)/stamp-dev $(VENV)/stamp-app $(VENV)/stamp-training $(VENV)/stamp-browser $(VENV)/stamp-docs: $(VENV)/stamp-%: $(VENV)/stamp-torch pyproject.toml
	$(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$*]"
	@touch $@
