# make demo: build tiny-chat-2 and answer one question in three modes.  make test: every check.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv

.PHONY: demo test debian-packages clean
MAKEFLAGS += --jobs=3 # pip takes one core, and all that installs waits for downloads

demo: $(VENV)/demo
	VENV=$(VENV) scripts/demo

test: $(VENV)/compiled $(VENV)/triton debian-packages
	VENV=$(VENV) scripts/check

debian-packages:
	scripts/debian-packages

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

$(VENV)/dev: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable ".[dev]"
	touch $@ $(VENV)/demo

# On every core, where pip takes one, and without the folders that weigh most of those of which tests import least. Both
# pass over files in a newer Python's syntax, which torch has.
$(VENV)/compiled: $(VENV)/dev
	$(VENV)/bin/python -m compileall -qq -j 0 -x '/(models|physics|rllib|tests)/' $(VENV)/lib || true
	touch $@

$(VENV)/triton: $(VENV)/dev
	$(VENV)/bin/nemodiff triton install
	touch $@
