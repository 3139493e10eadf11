"""An engine that all tests of a process share, and what it is compared with. No network, one thread."""

import json
import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest
from helpers import TINY, Engine, Reference, make_clips, widen_heads


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = widen_heads(TINY, tmp_path_factory.mktemp("checkpoint") / "wide")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prune_ratio": 0.4}))  # stts_config says 0.5
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def reference(checkpoint):
    return Reference(checkpoint)


@pytest.fixture(scope="session")
def engine(checkpoint, reference):
    engine = Engine(checkpoint, reference)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()
