# The developer's verbs; CI uses the same ones. Every target builds .venv by itself when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-lowest lint fuzz lab soak bench bench-quick clean
.DEFAULT_GOAL := test

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rtunnel needs Python >= 3.11; set PYTHON=/path/to/python3.11")'
	@echo "building .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/.ready ## two brokers, a VIP, agents and a gateway on this machine, no root, no Redis
	@$(BIN)/rtunnel demo

test: .venv/.ready ## the fast suite: real sockets, real Redis, real clients; most of it waits, so two at once
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Everything at the lowest version that pyproject.toml allows (`make test` has the newest).
.venv-lowest/.ready: pyproject.toml
	@echo "building .venv-lowest ..."
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	@touch $@

# Not tried in it: tests that take long and that no library's version concerns.
SAME_ANYWHERE := bench cost_per_byte fuzz hostile_kernel policy ports registry_model secrecy
test-lowest: .venv-lowest/.ready ## unit tests with the oldest allowed dependencies; ARGS="tests/unit tests/e2e" for all tests
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal $(or $(ARGS),tests/unit $(SAME_ANYWHERE:%=--ignore tests/unit/test_%.py))

lint: .venv/.ready ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/lint-imports --no-cache

fuzz: .venv/.ready ## coverage-guided, FUZZ_SECONDS (30) a target, then SCHEDULES (100000) on the hostile kernel; findings stay in tests/fuzz/cases
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)
	PYTHONPATH=tests $(BIN)/python -m fuzz.schedules $(SCHEDULES)

lab: .venv/.ready ## isolated VPCs in network namespaces (root)
	$(BIN)/python -m pytest tests/lab -v --timeout 300

soak: .venv/.ready ## a long life in minutes, then everything as before; RTUNNEL_SOAK_SHORT=1 for under one
	$(BIN)/python -m pytest tests/soak -s --timeout 1200

# Before and after in one run: make bench ARGS="--against REV" (with --quick: bench-quick).
bench: .venv/.ready ## side by side with every peer on PATH or in RTUNNEL_BENCH_PEERS; ARGS="--only 'rtunnel-*,frp-tls'"
	PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

bench-quick: .venv/.ready ## a subset of it in under 3 minutes
	PYTHONPATH=tests $(BIN)/python -m bench --quick $(ARGS)

clean:
	rm -rf .venv .venv-lowest build dist .mypy_cache .ruff_cache .pytest_cache
