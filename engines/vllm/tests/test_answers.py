"""Greedy answers of the engine are Transformers', token for token, and so are their probabilities."""

import pytest
from helpers import LOGPROB_TOLERANCE, QUESTIONS, Answer, Ask

RATIOS = (0.0, 0.3, 0.5)


def assert_same(answer: Answer, expected: Answer):
    assert answer.tokens == expected.tokens
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)
    assert answer.num_prompt_tokens == expected.num_prompt_tokens


@pytest.fixture(scope="module")
def asks(clips):
    return [
        Ask(clip, QUESTIONS[index % len(QUESTIONS)], ratio, num_frames=16)
        for index, clip in enumerate(clips)
        for ratio in RATIOS
    ]


@pytest.fixture(scope="module")
def expected(asks, reference):
    return [reference(ask) for ask in asks]


def test_one_by_one(engine, asks, expected):
    for ask, answer in zip(asks, expected, strict=True):
        assert_same(engine([ask])[0], answer)
    assert len({answer.num_prompt_tokens for answer in expected}) > 20  # the prompts are of different lengths


def test_in_one_batch(engine, asks, expected):
    for got, answer in zip(engine(asks), expected, strict=True):
        assert_same(got, answer)


def test_vision_tokens_see_each_other(asks, expected, reference):
    """Else the tests above would pass on causal attention, as vLLM's CPU backend computes it for its own Molmo2."""
    for ask, answer in list(zip(asks, expected, strict=True))[::7]:
        causal = reference(ask, causal=True)
        assert causal.logprobs != pytest.approx(answer.logprobs, abs=10 * LOGPROB_TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},  # generation_config.json
        {"method": "cosine"},
        {"method": "random", "prune_ratio": 0.7},
        {"method": "tome"},
        {"method": "none"},
        {"max_vision_tokens": 31},
        {"prune_ratio": 0.9},
        {"num_frames": 5},
    ],
    ids=str,
)
def test_options_of_a_request(engine, reference, clips, options):
    asks = [Ask(clip, QUESTIONS[1], **options) for clip in (clips[3], clips[9])]
    for answer, ask in zip(engine(asks), asks, strict=True):
        assert_same(answer, reference(ask))


@pytest.mark.parametrize("metadata", [{"fps": 2.0}, {"fps": 2.0, "do_sample_frames": False}], ids=str)
def test_frames_in_place_of_a_file(engine, reference, clips, metadata):
    ask = Ask(clips[3], prune_ratio=0.5)
    (frames,), _ = reference.processor.video_processor.sample_videos([str(ask.clip)])
    (request,) = engine.requests([ask])
    request["multi_modal_data"] = {"video": [(frames.permute(0, 2, 3, 1).numpy(), metadata)]}
    (output,) = engine.outputs([request])
    assert list(output.outputs[0].token_ids) == reference(ask).tokens
    assert len(output.prompt_token_ids) == reference(ask).num_prompt_tokens
