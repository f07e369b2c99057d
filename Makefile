# make demo [AUDIO=folder]   sound files → a trained codec → a page to listen to
# make test                  the tests, but those that take minutes each; make test-all: those, too
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= demo
AUDIO ?=
SOUNDS := $(if $(AUDIO),$(shell realpath "$(AUDIO)"))
NAME := $(RECIPE)$(if $(AUDIO),-$(shell basename "$(SOUNDS)"))

.PHONY: demo test test-all lint install

demo: install
	$(VENV)/bin/spresso run $(RECIPE) name="$(NAME)" $(if $(AUDIO),data.audio="$(SOUNDS)")

test: install
	$(VENV)/bin/python -m pytest -m "not slow and not alone" -n auto --dist loadfile --no-loadscope-reorder
	$(VENV)/bin/python -m pytest -m "not slow and alone"

test-all: test
	$(VENV)/bin/python -m pytest -m slow

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy models trainer launch

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	@touch $@
