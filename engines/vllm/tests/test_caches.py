"""Prompts that begin alike share what vLLM has computed, those of another ratio or method do not, and answers stay."""

import pytest
from helpers import BLOCK_SIZE, LOGPROB_TOLERANCE, QUESTIONS, Ask


def generate(engine, asks) -> list:
    return engine.outputs(engine.requests(asks))


def assert_right(output, answer):
    (written,) = output.outputs
    logprobs = [step[token].logprob for step, token in zip(written.logprobs, written.token_ids, strict=True)]
    assert list(written.token_ids) == answer.tokens
    assert logprobs == pytest.approx(answer.logprobs, abs=LOGPROB_TOLERANCE)


@pytest.fixture(scope="module")
def asks(clips):
    """Of a video that ends within a block: what is cached of it ends before it does."""
    return [Ask(clips[8], question, 0.1, num_frames=15) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(asks, reference):
    return [reference(ask) for ask in asks]


def test_one_after_the_other(engine, asks, expected):
    assert engine.llm.reset_prefix_cache()
    outputs = [generate(engine, [ask])[0] for ask in asks]
    video_end = max(index for index, token in enumerate(outputs[0].prompt_token_ids) if token >= 512)
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[0] == 0 and cached[1] == cached[2] and 0 < cached[1] < video_end
    for output, answer in zip(outputs, expected, strict=True):
        assert_right(output, answer)


def test_in_one_step(engine, asks, expected):
    """The second reads blocks that the first one fills in the very same step."""
    assert engine.llm.reset_prefix_cache()
    outputs = generate(engine, asks)
    assert sum(output.num_cached_tokens for output in outputs) >= BLOCK_SIZE
    for output, answer in zip(outputs, expected, strict=True):
        assert_right(output, answer)


@pytest.mark.parametrize(
    "other", [{"prune_ratio": 0.2}, {"method": "cosine"}, {"method": "none", "prune_ratio": None}, {"num_frames": 14}]
)
def test_another_option_shares_nothing(engine, reference, asks, other):
    generate(engine, asks[:1])
    ask = asks[0]._replace(**other)
    (output,) = generate(engine, [ask])
    assert output.num_cached_tokens == 0
    assert_right(output, reference(ask))


def test_text_alone(engine, reference):
    """The language model without a video, and a cached text in front of one."""
    chat = [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}]
    prompt = reference.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = reference.processor(text=prompt, return_tensors="pt")
    expected = reference.model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    (output,) = engine.outputs([{"prompt": prompt}])
    assert list(output.outputs[0].token_ids) == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_video_behind_a_long_text(engine, reference, clips):
    """Blocks of text are cached, and the video is read behind them."""
    text = "Look at the still shape and at the lamp and at the ball, one after the other." * 3
    for clip in (clips[4], clips[5]):
        content = [{"type": "text", "text": text}, {"type": "video", "path": str(clip)}]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTIONS[0]}]}]
        answer = reference(Ask(clip, prune_ratio=0.5), chat=chat)
        prompt = reference.processor.apply_chat_template(chat, add_generation_prompt=True)
        video = {"multi_modal_data": {"video": clip.read_bytes()}, "mm_processor_kwargs": {"prune_ratio": 0.5}}
        (output,) = engine.outputs([{"prompt": prompt, **video}])
        assert_right(output, answer)
    assert output.num_cached_tokens >= BLOCK_SIZE
