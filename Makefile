# make demo [AUDIO=folder]   sound files → a trained codec → a page to listen to
# make test                  the tests, but those that take minutes each; make test-all: those, too
#                            what lacks a Debian package is skipped, and listed at the end with the command to install it
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= demo
AUDIO ?=
SOUNDS := $(if $(AUDIO),$(shell realpath "$(AUDIO)"))
NAME := $(RECIPE)$(if $(AUDIO),-$(shell basename "$(SOUNDS)"))
TEST := $(VENV)/bin/python -m pytest --note-skips=$(VENV)/skipped

.PHONY: demo test test-all lint install

demo: install
	$(VENV)/bin/spresso run $(RECIPE) name="$(NAME)" $(if $(AUDIO),data.audio="$(SOUNDS)")

# The second half runs whatever becomes of the first.
test: install
	@rm -f $(VENV)/skipped
	@trap 'exit 130' INT; status=0; \
	$(TEST) -m "not slow and not alone" -n auto --dist loadfile --no-loadscope-reorder || status=$$?; \
	$(TEST) -m "not slow and alone" || status=$$?; \
	$(VENV)/bin/python -m tests.system_packages $(VENV)/skipped; \
	exit $$status

test-all: test
	$(VENV)/bin/python -m pytest -m slow

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy models trainer launch

install: $(VENV)/.installed $(if $(shell command -v g++),$(VENV)/.visqol) $(VENV)/.aisfx

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'Python cannot make environments: sudo apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	@touch $@

# Of aisfx only the weights are used, and it asks for numpy 1.23. Without them `evaluate` takes mel-stat.
$(VENV)/.aisfx: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-deps aisfx==0.1.2
	@touch $@

# ViSQOL stands on libsvm, of which there is no wheel for Linux: it has to be compiled.
$(VENV)/.visqol: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --editable '.[visqol]'
	@touch $@
