# make demo: build tiny-chat-2 and answer one question in three modes.  make test: every check.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv

.PHONY: demo test clean

demo: $(VENV)/demo
	VENV=$(VENV) scripts/demo

test: $(VENV)/dev $(VENV)/triton
	scripts/debian-packages
	VENV=$(VENV) scripts/check

clean:
	rm -rf $(VENV) .cache build *.egg-info

# The newest pip takes half as long as the one that comes with Python 3.11.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "'$(PYTHON)' is not Python 3.11 or newer; give one: make PYTHON=PATH" >&2; exit 1; }
	$(PYTHON) -m venv --upgrade-deps $(VENV)

# A newer pip shows what setuptools says of every editable install: that folders may be taken for packages.
$(VENV)/demo $(VENV)/dev: export PYTHONWARNINGS = ignore:::setuptools.command.editable_wheel

$(VENV)/demo: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

# Compiled on every core, where pip takes one. Both pass over files in a newer Python's syntax, which torch has.
$(VENV)/dev: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable ".[dev]"
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@ $(VENV)/demo

$(VENV)/triton: $(VENV)/dev
	$(VENV)/bin/nemodiff triton install
	touch $@
