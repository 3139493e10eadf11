"""The plugin's parts without an engine: options, the short prompt, the order of keys, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from stts_molmo.configuration_stts_molmo import Pruning, STTSConfig
from vllm.engine.arg_utils import EngineArgs
from vllm_stts_molmo.attention import visible_keys, vision_order
from vllm_stts_molmo.options import EngineOptions, find_options
from vllm_stts_molmo.processing import pruned_ids

PATCH = 9


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


def options(request=(), engine=(), generation=(), scales=False, **config):
    return find_options(dict(request), dict(engine), dict(generation), STTSConfig(**config), scales)


@pytest.mark.parametrize(
    "sources, expected",
    [
        ({}, Pruning("scorer", 0.5)),
        ({"generation": {"prune_ratio": 0.3}}, Pruning("scorer", 0.3)),
        ({"generation": {"prune_ratio": 0.3}, "engine": {"max_vision_tokens": 99}}, Pruning("scorer", 0.0, 99)),
        ({"engine": {"max_vision_tokens": 99}, "request": {"prune_ratio": 0.7}}, Pruning("scorer", 0.7)),
        ({"engine": {"method": "cosine"}, "request": {"prune_ratio": 0.7}}, Pruning("cosine", 0.7)),
        ({"engine": {"method": "cosine"}, "request": {"method": "tome"}}, Pruning("tome", 0.5)),
        ({"request": {"prune_ratio": 0}}, Pruning("none", 0.0)),
    ],
)
def test_the_most_particular_option_counts(sources, expected):
    assert options(**sources).pruning == expected


@pytest.mark.parametrize(
    "engine, request_, expected",
    [
        ({"num_frames": 8}, {}, {"num_frames": 8}),
        ({"num_frames": 8}, {"num_frames": 4}, {"num_frames": 4}),
        ({"num_frames": 8, "max_fps": 1}, {"fps": 3}, {"fps": 3, "max_fps": 1}),
        ({"fps": 3}, {"num_frames": 8}, {"num_frames": 8}),
        ({"num_frames": 8}, {"num_frames": None}, {"num_frames": 8}),
    ],
)
def test_a_request_chooses_its_frames(engine, request_, expected):
    assert options(request_, engine).sampling == expected


def test_scaling_knows_the_ratio():
    assert options({"test_time_scaling": True}, {"prune_ratio": 0.3}).sampling["prune_ratio"] == 0.3
    assert options(scales=True).sampling == {"prune_ratio": 0.5}
    assert options({"test_time_scaling": False}, scales=True).sampling == {"test_time_scaling": False}


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"prune_ratio": 1.0}, "prune_ratio=1.0 must be"),
        ({"prune_ratio": "half"}, "prune_ratio='half' must be"),
        ({"method": "best"}, "method='best' is unknown"),
        ({"max_vision_tokens": 0}, "max_vision_tokens=0 must be"),
        ({"prune_ratio": 0.5, "max_vision_tokens": 99}, "exclude each other"),
        ({"pruning_ratio": 0.5}, "mm_processor_kwargs has 'pruning_ratio'"),
        ({"num_frames": "many"}, "expected int, got str"),
        ({"test_time_scaling": "yes"}, "expected bool, got str"),
        ({"size": {"height": 10**6, "width": 10**6}}, "mm_processor_kwargs has 'size'"),
    ],
)
def test_wrong_options_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        options(request_)


# ----------------------------------------------------------------------------------------------------------------------
# The short prompt
# ----------------------------------------------------------------------------------------------------------------------


def test_the_last_placeholders_leave_the_prompt():
    video = [5, PATCH, PATCH, 6, PATCH, PATCH, 7]
    assert pruned_ids(video, PATCH, 0) == video
    assert pruned_ids(video, PATCH, 3) == [5, PATCH, 6, 7]


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------

ROWS = {
    "video between texts": "t v v t v v v t v t t",
    "video first": "v v t v t",
    "video last": "t t v v t v",
    "one frame": "t v v v t",
    "one vision token": "t v t",
    "only vision": "v v v",
}


@pytest.mark.parametrize("num_cached", [0, 7])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_a_vision_token_sees_is_a_prefix_of_the_keys_in_their_other_order(row, num_cached):
    is_vision = torch.tensor([kind == "v" for kind in row.split()])
    order, length = vision_order(is_vision), len(is_vision)
    assert order.sort().values.tolist() == list(range(length))
    for query, num_seen in zip(is_vision.nonzero().flatten(), visible_keys(is_vision, num_cached), strict=True):
        seen = set(order[: num_seen - num_cached].tolist())
        assert seen == {key for key in range(length) if key <= query or is_vision[key]}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


def engine_config(**changed):
    """A `VllmConfig` as far as it is read."""
    values = {
        "enable_chunked_prefill": False,
        "video_pruning_rate": None,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_dbo": False,
        "speculative_config": None,
        "lora_config": None,
        **changed,
    }
    part = SimpleNamespace(**values)
    return SimpleNamespace(
        scheduler_config=part,
        model_config=SimpleNamespace(multimodal_config=part),
        parallel_config=part,
        speculative_config=part.speculative_config,
        lora_config=part.lora_config,
    )


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("enable_chunked_prefill", True, "pass --no-enable-chunked-prefill"),
        ("video_pruning_rate", 0.5, "pass --mm-processor-kwargs"),
        ("pipeline_parallel_size", 2, "use --tensor-parallel-size"),
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("enable_dbo", True, "--enable-dbo"),
        ("speculative_config", object(), "speculative decoding"),
        ("lora_config", SimpleNamespace(enable_tower_connector_lora=True), "LoRA on the vision tower"),
    ],
)
def test_engines_that_would_answer_wrongly_are_refused(name, value, message):
    EngineOptions.verify_and_update_config(engine_config())
    with pytest.raises(ValueError, match=message):
        EngineOptions.verify_and_update_config(engine_config(**{name: value}))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "pass --no-enable-chunked-prefill"),
        ({"enable_chunked_prefill": False, "video_pruning_rate": 0.5}, "pass --mm-processor-kwargs"),
        ({"enable_chunked_prefill": False, "pipeline_parallel_size": 2}, "use --tensor-parallel-size"),
    ],
)
def test_vllm_asks_before_it_starts(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs(str(checkpoint), max_model_len=512, max_num_batched_tokens=512, **arguments).create_engine_config()
