.PHONY: demo test lint

CLIP ?= examples/clips/quiet.mp4
QUESTION ?= What color is the still shape?

demo: .venv/.core
	.venv/bin/stts-molmo ask "$(CLIP)" "$(QUESTION)"

test: .venv/.test
	.venv/bin/python -m pytest

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/bin/python:
	python3 -m venv .venv

# --no-compile: most of what torch brings is never imported here.
.venv/.core: .venv/bin/python setup.py pyproject.toml
	.venv/bin/pip install --no-compile --editable .
	touch $@

.venv/.test: .venv/bin/python setup.py pyproject.toml
	.venv/bin/pip install --no-compile --editable ".[test]"
	touch $@ .venv/.core
