# Set-up, tests and the quick start. `make help` lists what there is to do.
#
# Variables: PYTHON=python3.13 (used once, to create an environment), VENV=path of the environment,
# PIP_FLAGS=more options for pip (e.g. an index with CPU builds of torch), ARGS=for pytest and benchmarks.

PYTHON ?= python3
VENV ?= .venv
SECOND ?= .venv-second
OLD := .venv-transformers4
TRACKERS := .venv-trackers
CLIENTS := .venv-clients
PIP_FLAGS ?=
ARGS ?=
DATA ?=
PEER ?= .venv-trl/bin/python
PY := $(VENV)/bin/python
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# The quick start, step by step.
QUICKSTART := tutorials/cookbooks/training_reward_model/quickstart
QUICKSTART_PREPARE := $(PY) -m tutorials.cookbooks.training_reward_model.quickstart.prepare quickstart
QUICKSTART_TRAIN := $(VENV)/bin/rm-gallery train --config $(QUICKSTART)/quickstart.yaml
QUICKSTART_SHOW := $(PY) -m tutorials.cookbooks.training_reward_model.quickstart.show quickstart

# One stamp per set of installed extras; it is renewed when a dependency or a tested version changes.
PLOT_STAMP := $(VENV)/.installed-plot
DEV_STAMP := $(VENV)/.installed-dev

# PYTHON is for this file: run_bt.sh, which tests start, reads a variable of the same name.
unexport PYTHON

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test test-all second-python transformers4 trackers clients test-gpu gpu-check check bench format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

quickstart: $(PLOT_STAMP)  ## train a small reward model on this machine and show what it learned
	$(QUICKSTART_PREPARE)
	$(QUICKSTART_TRAIN)
	$(QUICKSTART_SHOW)

# make check runs tests/structure.
test: $(DEV_STAMP)  ## run the tests (some of them: make test ARGS="tests/data -k packing")
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(or $(ARGS),--ignore=tests/structure)

test-all: $(DEV_STAMP) transformers4 trackers clients  ## run the long tests, which make test leaves to CI, and the others on a second Python if there is one
	$(PY) -m pytest -n 2 --dist worksteal -m slow $(ARGS)
	@if [ -f $(TRACKERS)/.installed ]; then set -x; $(TRACKERS)/bin/python -m pytest tests/training/test_other_trackers.py; fi
	@if [ -f $(CLIENTS)/.installed ]; then set -x; \
	  $(CLIENTS)/bin/python -m pytest tests/serving/test_clients.py tests/integrations/test_trl.py; fi
	@if [ -x $(SECOND)/bin/python ]; then set -x; $(SECOND)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS); \
	  else echo "No second Python version was tested: run make second-python PYTHON=python3.13 first."; fi

second-python:  ## install another Python version's environment for make test-all (PYTHON=python3.13)
	$(PYTHON) -m venv $(SECOND)
	$(SECOND)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) -e '.[dev]'

# Its own transformers and what that pins; torch and the rest come from the other environment.
transformers4: $(DEV_STAMP)  ## install transformers 4.57 beside, to read checkpoints as older servers do
	@[ -f $(OLD)/.installed ] || { \
	  $(PY) -m venv $(OLD) && \
	  $(OLD)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(PIP_FLAGS) transformers==4.57.6 \
	    tokenizers==0.22.2 huggingface_hub==0.36.2 requests regex charset_normalizer urllib3 certifi idna && \
	  $(PY) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	    > $$(echo $(OLD)/lib/python*/site-packages)/zz_other.pth && touch $(OLD)/.installed; } || \
	  echo "transformers 4.57 could not be installed: checkpoints are not read with it."

# mlflow and trackio need many packages, and an older Pillow; torch and the rest come from the other environment.
trackers: $(DEV_STAMP)  ## install mlflow and trackio beside, for the tests that read back what they stored
	@[ -f $(TRACKERS)/.installed ] || { \
	  $(PY) -m venv $(TRACKERS) && grep -vi '^pillow==' constraints.txt > $(TRACKERS)/constraints.txt && \
	  $(TRACKERS)/bin/python -m pip install -qq --disable-pip-version-check -c $(TRACKERS)/constraints.txt $(PIP_FLAGS) \
	    mlflow-skinny alembic sqlalchemy trackio && \
	  $(PY) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	    > $$(echo $(TRACKERS)/lib/python*/site-packages)/zz_other.pth && touch $(TRACKERS)/.installed; } || \
	  echo "mlflow and trackio could not be installed: their tests are skipped."

# What is installed in the other environment is not installed again. Ray (600 MB) is not among them.
clients: $(DEV_STAMP)  ## install TRL, the client of Cohere and a fuzzer beside, for the tests of the server and of rewards in TRL
	@[ -f $(CLIENTS)/.installed ] || { \
	  $(PY) -m venv $(CLIENTS) && \
	  $(PY) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	    > $$(echo $(CLIENTS)/lib/python*/site-packages)/zz_other.pth && \
	  $(CLIENTS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) \
	    cohere schemathesis trl && touch $(CLIENTS)/.installed; } || \
	  echo "cohere, schemathesis and TRL could not be installed: their tests are skipped."

test-gpu: $(DEV_STAMP)  ## run the tests that need a GPU and print each name
	$(PY) -m pytest -n 4 --dist worksteal -m gpu -vv $(ARGS)

gpu-check:  ## find out what works on this GPU, how exactly and how fast (GPU_PYTHON=python with torch; ARGS="--minutes 9")
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

check: $(DEV_STAMP)  ## format, lint, types, structure; changes nothing
	$(PY) -m ruff format --check --output-format concise .
	$(PY) -m ruff check --output-format concise .
	$(PY) -m mypy
	$(PY) -m pytest tests/structure

bench: $(DEV_STAMP) $(PEER)  ## training speed against TRL, side by side (DATA=folder of parquet files; PEER=python with TRL)
	$(PY) -m benchmarks.throughput --peer-python $(PEER) $(if $(DATA),--data $(DATA)) $(ARGS)

format: $(DEV_STAMP)  ## format the code and fix what ruff can fix
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

clean:  ## remove caches and build output; runs, checkpoints and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find rm_gallery tutorials tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# TRL pins other versions of libraries, so it gets a separate environment.
.venv-trl/bin/python:
	$(PYTHON) -m venv .venv-trl
	$@ -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) torch transformers trl datasets pyarrow pandas

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Please install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python3.13"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "RM-Gallery needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Please name a newer one: make PYTHON=python3.13"; exit 1; }
	@echo "Creating the environment in $(VENV)."
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -f "$(PY)"; \
	  echo "Python could not create an environment. On Debian or Ubuntu: apt install python3-venv"; exit 1; }

$(PLOT_STAMP): pyproject.toml constraints.txt | $(PY)
	@echo "Installing RM-Gallery into $(VENV); the first time takes some minutes, most of it for PyTorch."
	@$(PIP_INSTALL) -e '.[plot]'
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(PY)
	@echo "Installing RM-Gallery and its development tools into $(VENV)."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(PLOT_STAMP) $@
