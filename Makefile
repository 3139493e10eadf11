.PHONY: demo test lint

CLIP ?= $(firstword $(sort $(wildcard examples/clips/*.mp4)))
QUESTION ?= Which colour is the shape?

demo: .venv/.core
	.venv/bin/stts-molmo ask "$(CLIP)" "$(QUESTION)"

test: .venv/.test
	.venv/bin/python -m pytest

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/.core: setup.py pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install --editable .
	touch $@

.venv/.test: setup.py pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install --editable ".[test]"
	touch $@ .venv/.core
