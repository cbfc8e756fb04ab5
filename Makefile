# Every target prepares what it needs; a fresh machine needs only Python >= 3.10 and this file.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
OLDEST_TRANSFORMERS ?= 5.17.0
HARNESS ?= .venv-harness
LMMS_EVAL ?= 0.7.3
OLDEST_TESTS ?= tests/mechanism tests/adapters tests/strategies/test_generate.py tests/test_config.py
JOBS ?= 2
PYTEST_ARGS ?=

export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

py := $(VENV)/bin/python

.PHONY: help demo test test-oldest harness lint format bench docs clean

help:
	@echo "make demo | test | test-oldest | harness | lint | format | bench | docs | clean"

# One stamp per set of extras: pip runs again only after pyproject.toml has changed.
$(VENV)/.stamp-%: pyproject.toml
	@test -x $(py) || $(PYTHON) -m venv $(VENV)
	$(py) -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

# The lowest supported transformers, in a venv that looks through to $(VENV) for everything else.
$(OLDEST)/.stamp: pyproject.toml $(VENV)/.stamp-dev
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(py) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

# lmms-eval, whose requirements are many, in a venv that looks through to $(VENV) for torch and transformers.
$(HARNESS)/.stamp: pyproject.toml $(VENV)/.stamp-dev
	@test -x $(HARNESS)/bin/python || $(PYTHON) -m venv $(HARNESS)
	@$(py) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(HARNESS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(HARNESS)/bin/python -m pip install --quiet --disable-pip-version-check lmms-eval==$(LMMS_EVAL)
	$(HARNESS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(VENV)/.stamp-demo
	$(VENV)/bin/vtoken demo

test: $(VENV)/.stamp-dev
	$(py) -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.stamp
	$(OLDEST)/bin/python -c 'import transformers; assert transformers.__version__ == "$(OLDEST_TRANSFORMERS)"'
	$(OLDEST)/bin/python -m pytest -q -n $(JOBS) -m 'not slow and not soak and not browser and not harness' $(OLDEST_TESTS) $(PYTEST_ARGS)

harness: $(HARNESS)/.stamp
	$(HARNESS)/bin/python -m pytest -q -m harness tests/eval $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	$(py) -m ruff check .
	$(py) -m mypy

format: $(VENV)/.stamp-dev
	$(py) -m ruff check --fix .
	$(py) -m ruff format .

bench: $(VENV)/.stamp-dev
	benchmarks/cpu.sh

docs: $(VENV)/.stamp-dev
	$(py) docs/generate_strategy_pages.py
	$(py) docs/generate_readme.py
	$(py) docs/generate_performance.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(OLDEST) $(HARNESS)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
