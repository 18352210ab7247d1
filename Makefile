# make demo    draws a picture      (PROMPT="a red apple" CHECKPOINT=path/to/an/sd1x.safetensors)
# make test    runs the tests
# Both set up a virtual environment in .venv first.

PYTHON ?= python3
PROMPT ?= a red apple
CHECKPOINT ?=

demo: .venv/ready
	@.venv/bin/python cli.py "$(PROMPT)" $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") \
		--sampler ddim --steps 25 --cfg-scale 4 --seed 42 --output demo.png --overwrite

test: .venv/ready-dev
	.venv/bin/python -m pytest

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.PHONY: demo test
