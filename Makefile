# One virtual environment, .venv, is set up and, if it is broken, repaired on the way to whatever is asked for.

PYTHON ?= python3
PROMPT ?= a red apple
CHECKPOINT ?=
export PROMPT_AS_TYPED := $(value PROMPT)
export CHECKPOINT_AS_TYPED := $(value CHECKPOINT)

KNOWN := PYTHON PROMPT CHECKPOINT
UNKNOWN := $(filter-out $(KNOWN),$(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name))))
ifneq ($(strip $(UNKNOWN)),)
$(error unknown: $(strip $(UNKNOWN)); there are $(KNOWN), as in make demo PROMPT="a green apple")
endif

PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
IS_NEW_ENOUGH = import sys; sys.version_info < (3, 11) and sys.exit(f'error: Python 3.11 or later is needed; $(PYTHON) is \
{sys.version.split()[0]}: make PYTHON=python3.11')
TESTERS = $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() + 1, 4))")# one more, as tests of pages wait a lot
IS_WHOLE = import sys, pip; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.base_prefix)

help:
	@echo 'make demo       draws a picture: make demo PROMPT="a green apple" CHECKPOINT=path/to/an/sd1x.safetensors'
	@echo 'make notebook   opens demo.ipynb in Jupyter'
	@echo 'make web        opens a web page to draw with, and an API, at http://127.0.0.1:7860'
	@echo 'make test       runs the tests'
	@echo 'make lint       runs ruff'
	@echo 'All set up a virtual environment in .venv first; PYTHON=python3.11 names the Python to do it with.'

demo: .venv/ready
	@.venv/bin/python cli.py "$$PROMPT_AS_TYPED" $${CHECKPOINT_AS_TYPED:+--checkpoint "$$CHECKPOINT_AS_TYPED"} \
		--sampler ddim --steps 25 --cfg-scale 4 --seed 42 --output demo.png --overwrite

notebook: .venv/ready-notebook
	.venv/bin/python -m notebook demo.ipynb

web: .venv/ready-web
	@.venv/bin/python -m extensions.web

test: .venv/ready-dev
	.venv/bin/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

lint: .venv/ready-dev
	.venv/bin/python -m ruff check .

.venv/ready: requirements.txt
	@$(PYTHON) -c "$(IS_NEW_ENOUGH)"
	@.venv/bin/python -c "$(IS_WHOLE)" 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt extensions/requirements-web.txt .venv/ready
	$(PIP) -r requirements-dev.txt
	@touch $@

.venv/ready-notebook: requirements-notebook.txt .venv/ready
	$(PIP) -r requirements-notebook.txt
	@touch $@

.venv/ready-web: extensions/requirements-web.txt .venv/ready
	$(PIP) -r extensions/requirements-web.txt
	@touch $@

.PHONY: help demo notebook web test lint
