.PHONY: demo test test-oldest lint mutants

CLIP ?= examples/clips/quiet.mp4
QUESTION ?= What color is the still shape?

demo: .venv/.core
	.venv/bin/stts-molmo ask "$(CLIP)" "$(QUESTION)"

test: .venv/.test
	.venv/bin/python -m pytest

test-oldest: .venv-oldest/.test
	.venv-oldest/bin/python -m pytest

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# Small mistakes in the code, and which tests notice: docs/mutants.md.
mutants: .venv/.test
	.venv/bin/python -m benchmarks.mutants

.venv/bin/python:
	python3 -m venv .venv

# --no-compile: most of what torch brings is never imported here.
.venv/.core: .venv/bin/python setup.py pyproject.toml
	.venv/bin/pip install --no-compile --editable .
	touch $@

.venv/.test: .venv/bin/python setup.py pyproject.toml
	.venv/bin/pip install --no-compile --editable ".[test]"
	touch $@ .venv/.core

# The lower bound of each requirement in setup.py, "name[extra]>=1,<2" -> name==1.
.venv-oldest/.test: setup.py pyproject.toml
	python3 -m venv .venv-oldest
	sed -nE 's/^.*"([A-Za-z_-]+)(\[.*\])?>=([0-9.]+).*$$/\1==\3/p' setup.py > .venv-oldest/lower-bounds.txt
	.venv-oldest/bin/pip install --no-compile --constraint .venv-oldest/lower-bounds.txt --editable ".[test]"
	touch $@
