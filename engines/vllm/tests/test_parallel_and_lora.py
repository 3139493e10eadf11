"""Two processes that share each layer, and an adapter on the language model: still Transformers' answers."""

import copy
import json

import pytest
import torch
from helpers import LOGPROB_TOLERANCE, QUESTIONS, Ask, Engine
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def adapted(reference, tmp_path_factory):
    """An adapter's folder, as PEFT writes it, and the reference with it merged."""
    folder, merged = tmp_path_factory.mktemp("adapter"), copy.copy(reference)
    merged.model = copy.deepcopy(reference.model)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in merged.model.named_modules():
        if ".language_model.layers." in f".{name}" and name.endswith(TARGETS):
            rows, columns = module.weight.shape
            a = torch.randn(RANK, columns, generator=generator) * 0.1
            b = torch.randn(rows, RANK, generator=generator) * 0.1
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            with torch.no_grad():
                module.weight += b @ a * (ALPHA / RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, merged


@pytest.fixture(scope="module")
def asks(clips):
    return [Ask(clip, QUESTIONS[0], ratio) for clip in clips[:8:3] for ratio in (0.0, 0.5)]


@pytest.fixture(scope="module")
def engine(checkpoint, reference):
    engine = Engine(checkpoint, reference, tensor_parallel_size=2, enable_lora=True, max_lora_rank=8)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()


def assert_same(answers, expected):
    for answer, right in zip(answers, expected, strict=True):
        assert answer.tokens == right.tokens
        assert answer.logprobs == pytest.approx(right.logprobs, abs=LOGPROB_TOLERANCE)


def test_without_and_with_an_adapter(engine, reference, adapted, asks):
    folder, merged = adapted
    plain, changed = [reference(ask) for ask in asks], [merged(ask) for ask in asks]
    assert all(a.logprobs != pytest.approx(b.logprobs, abs=0.1) for a, b in zip(plain, changed, strict=True))
    assert_same(engine(asks), plain)
    assert_same(engine(asks, lora_request=LoRARequest("adapter", 1, str(folder))), changed)
