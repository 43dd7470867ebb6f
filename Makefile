# `make lab` opens the workbench, `make test` tests it. Both set up .venv first and are safe to repeat.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOK ?= notebooks/01_where_embeddings_land.ipynb
PORT ?= 8888
LAB_OPTIONS ?=
# No request leaves this machine: no news, no update check, no extension gallery (also in workbench/cli/lab.py).
LAB_OFFLINE := --LabApp.news_url= --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly

# Two test processes, one thread each: on two cores that is a tenth faster than threads that wait for each other.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1

SECONDS ?= 60
KILLS ?= 200

# OpenMP's threads spin only briefly before they sleep; otherwise two notebooks, or two test processes, on the same cores wait for
# each other in every parallel loop (range_kernels/cpu/launch.py has the figures).
export GOMP_SPINCOUNT ?= 10000

.PHONY: help setup model lab test test-fast test-python test-simulator test-browser test-notebooks test-scale test-gpu test-engines check format bench soak fuzz sweep crash-test update-pins clean

help:
	@echo "make lab        set up, fetch the model once, open JupyterLab on notebook 01"
	@echo "make test       every test: Python, CUDA simulator, browser (if there is a Chromium), notebooks"
	@echo "make test-fast  the tests for the work in between: everything that is not marked slow, in a few minutes"
	@echo "make test-scale the explorer at 100 to 32,768 tokens in a browser, timed; writes data/bench/views.json"
	@echo "make test-gpu   the GPU tests, on this machine's GPU"
	@echo "make test-engines  tests of the engines with environments of their own, after workbench engines install"
	@echo "make check      ruff and mypy"
	@echo "make bench      speed of kernels and engine on this machine"
	@echo "make fuzz       mutated files, answers and settings for every reader, a minute each (SECONDS=60)"
	@echo "make sweep      the reference against every model class of the installed Transformers; writes data/coverage.md"
	@echo "make crash-test kills of every writer at random moments, and full disks (KILLS=200)"
	@echo "make soak       ten thousand requests with cancellations, bad input and a cache that is too small"

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one (for example: apt-get install python3 python3-venv,"; \
		echo "brew install python@3.12), or name yours: make lab PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv"; \
		echo "package (Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned versions into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' || { \
		echo "The installation failed (see above). Without a network nothing can be installed; else remove $(VENV) and try again."; exit 1; }
	@$(BIN)/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements >/dev/null 2>&1
	@# As the wheel does: JupyterLab saves the state of widgets with a notebook.
	@mkdir -p $(VENV)/share/jupyter/lab/settings/overrides.d
	@cp workbench/widgets/static/embedding-workbench.json $(VENV)/share/jupyter/lab/settings/overrides.d/
	@# PyPI's torchvision, which is built for CUDA, fails beside a CPU build of torch unless workbench prepares its import.
	@echo "import workbench" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/workbench_before_torchvision.pth"
	@touch $(READY)

setup: $(READY)

model: $(READY)
	@$(BIN)/workbench fetch smollm2-135m

lab: model
	$(BIN)/jupyter lab $(LAB_OFFLINE) --port=$(PORT) $(LAB_OPTIONS) $(NOTEBOOK)

test: test-python test-simulator test-browser test-notebooks

test-fast: model test-simulator
	$(ONE_THREAD) $(PYTEST) tests --ignore=tests/simulator --ignore=tests/browser -m "not slow and not engines" -n $(WORKERS) --dist worksteal

test-python: model
	$(ONE_THREAD) $(PYTEST) tests --ignore=tests/simulator --ignore=tests/browser -m "not engines" -n $(WORKERS) --dist loadgroup

test-simulator: $(READY)
	$(ONE_THREAD) NUMBA_ENABLE_CUDASIM=1 $(PYTEST) tests/simulator -n $(WORKERS)

test-browser: model
	$(ONE_THREAD) $(PYTEST) tests/browser -n $(WORKERS) --dist loadgroup

test-notebooks: model
	$(ONE_THREAD) $(PYTEST) --nbval notebooks -n $(WORKERS) --dist loadscope

test-scale: model
	WORKBENCH_SCALE=1 $(PYTEST) tests/browser/test_real_sizes.py -s

test-gpu: model
	$(PYTEST) tests -m gpu --ignore=tests/simulator --ignore=tests/browser

test-engines: model
	$(PYTEST) tests -m engines

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: model
	$(BIN)/python -m range_kernels.benchmarks
	$(BIN)/python -m workbench.benchmarks

soak: $(READY)
	$(BIN)/python -m tests.workbench.soak

fuzz: $(READY)
	$(ONE_THREAD) $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

sweep: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep --write

crash-test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m tests.crash --kills $(KILLS)

update-pins: $(READY)
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable | sed 's/+cpu//' | grep -vE '^pip=='; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis test-artifacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
