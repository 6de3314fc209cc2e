# Two commands: `make demo` and `make test`. Each sets up .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/ridgewalk demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check serve tests
	$(BIN)/ruff format --check serve tests
	$(BIN)/mypy

$(READY): pyproject.toml
	@echo "setting up $(VENV): about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV)
