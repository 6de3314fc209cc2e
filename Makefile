# Two commands: `make demo` and `make test`. Each sets up .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A service is a dozen processes that import the same modules. Where this is set (containers often do) each of them
# compiles every module anew, which takes as long as all the rest of the start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo watch test lint dashboards clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/ridgewalk demo

# The demo's models under a small load, with a Prometheus beside them, until Ctrl-C.
watch: $(READY)
	$(BIN)/ridgewalk watch

test: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check serve tests monitoring
	$(BIN)/ruff format --check serve tests monitoring
	$(BIN)/mypy

# Grafana's JSON from its code, and the Prometheus operator's manifest from the rules.
dashboards: $(READY)
	$(BIN)/python -m monitoring.grafana.generate
	$(BIN)/python -m monitoring.prometheus_rule

# --no-compile: most of what is installed is never imported. uv installs the rest in a fifth of pip's time; where it does
# not reach an index (it does not read pip's settings) pip does it.
$(READY): pyproject.toml
	@echo "setting up $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check uv || true
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[test]' || \
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV)
