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
from helpers import BLOCK_SIZE, MAX_TOKENS, NEW_TOKENS, TINY, Answer, Ask, Reference, make_clips, widen_heads


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


class Engine:
    """vLLM in a process of its own, as it runs by default: there it changes the class of the language model."""

    def __init__(self, checkpoint, reference, **options):
        from vllm import LLM

        self.reference = reference
        self.llm = LLM(
            str(checkpoint),
            dtype="float32",
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_model_len=MAX_TOKENS,
            max_num_batched_tokens=4 * MAX_TOKENS,
            block_size=BLOCK_SIZE,
            **options,
        )

    def requests(self, asks: list[Ask]) -> list[dict]:
        return [
            {
                "prompt": self.reference.prompt(ask),
                "multi_modal_data": {"video": ask.clip.read_bytes()},
                "mm_processor_kwargs": ask.options,
            }
            for ask in asks
        ]

    def outputs(self, requests: list[dict], **kwargs) -> list:
        from vllm import SamplingParams

        lengths = {"max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS}
        return self.llm.generate(
            requests, SamplingParams(temperature=0, logprobs=0, **lengths), use_tqdm=False, **kwargs
        )

    def __call__(self, asks: list[Ask], **kwargs) -> list[Answer]:
        answers = []
        for output in self.outputs(self.requests(asks), **kwargs):
            (written,) = output.outputs
            logprobs = [step[token].logprob for step, token in zip(written.logprobs, written.token_ids, strict=True)]
            answers.append(Answer(list(written.token_ids), logprobs, len(output.prompt_token_ids)))
        return answers


@pytest.fixture(scope="session")
def engine(checkpoint, reference):
    engine = Engine(checkpoint, reference)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()
