# One short command per habit; `make` alone lists them. Another Python: make PYTHON=/path/to/python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.SUFFIXES:
.DELETE_ON_ERROR:
.PHONY: help install run test test-quick test-clients soak check format bench bench-engine bench-peers docs constraints clean

help: ## this list
	@echo "Headrace: queue-driven, asynchronous inference for open-weight language models"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed ## make .venv with the console script .venv/bin/headrace

run: install ## run examples/questions.jsonl through the whole stack and show what came out
	@mkdir -p out
	$(BIN)/headrace run examples/questions.jsonl -o out/answers.jsonl --force --show 6

test: $(VENV)/.installed-test ## every test, against real Postgres and Redis; ARGS="..." goes to pytest, in one process
	$(BIN)/python -m pytest $(or $(ARGS),-n 2)

test-quick: $(VENV)/.installed-test ## only tests/unit, which need no server
	$(BIN)/python -m pytest tests/unit $(ARGS)

CLIENTS := inspect lm-eval schemathesis
test-clients: $(VENV)/.installed-test $(CLIENTS:%=.clients/%/.installed) ## the gateway with tools of others, each in an environment in .clients
	npm install --silent --no-audit --no-fund --prefix .clients openai@6
	$(BIN)/python -m pytest tests/acceptance/gateway/test_node_client.py tests/acceptance/gateway/test_other_clients.py $(ARGS)

soak: $(VENV)/.installed-test ## the long fault tests, then a mix of faults under load (SOAK_SECONDS=600, SOAK_SEED=)
	$(BIN)/python -m pytest tests/faults -m soak $(ARGS)
	PYTHONPATH=.:tests $(BIN)/python -m kit.soak --seconds $(or $(SOAK_SECONDS),600) $(if $(SOAK_SEED),--seed $(SOAK_SEED))

check: $(VENV)/.installed-check ## lint, format and types; changes nothing
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

format: $(VENV)/.installed-check ## put the source in the one form, and mend what ruff can mend
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

bench: $(VENV)/.installed-test ## measure the stack (ARGS="engine quality": the rest); writes benchmarks/results/NAME.json
	$(BIN)/python -m benchmarks $(ARGS)

bench-engine: $(VENV)/.installed-test ## the engine against others on the same model (an hour; ARGS=--quick: two minutes)
	$(BIN)/python -m benchmarks engine $(ARGS)

bench-peers: $(VENV)/.installed-test ## an environment for each other engine that bench-engine measures
	$(BIN)/python -m benchmarks.engine.peers $(ARGS)

docs: $(VENV)/.installed ## write docs/settings.md anew from the code
	$(BIN)/python docs/generate_settings.py

constraints: $(VENV)/.installed-check ## pin what .venv holds now
	@{ grep '^#' constraints.txt; \
	  $(BIN)/python -m pip freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f; \
	} > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove out/, caches and builds; .venv and the stack's data stay
	rm -rf out build dist .clients .mypy_cache .ruff_cache .pytest_cache .hypothesis constraints.new
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the virtual environment; a stamp says what it holds ----------------------------------------------------------

# The packages we build ourselves are built with pinned versions too.
$(VENV)/.installed: $(VENV)/.pip pyproject.toml
	$(PIP_INSTALL) --build-constraint constraints.txt --editable ".[all]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) --quiet --group test
	@touch $@

# hatchling and editables build us; they are here only so that `make constraints` pins them.
$(VENV)/.installed-check: $(VENV)/.installed-test
	$(PIP_INSTALL) --quiet --group check hatchling editables
	@touch $@

# The pip that Python brings may be too old for dependency groups.
$(VENV)/.pip: constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Headrace needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
	  exit 1; \
	} >&2
	@$(BIN)/python -c 'import pip' 2> /dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	$(PIP_INSTALL) --quiet --upgrade pip
	@touch $@

# A tool of others that is pointed at the gateway: what it needs is not to mix with ours.
.clients/%/.installed: tests/clients/%.txt
	"$(PYTHON)" -m venv --clear .clients/$*
	.clients/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@
