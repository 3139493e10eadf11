"""generate(): whatever strategy, the caller sees the full prompt, and gets what each row gives alone."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    BATCH,
    BEAMS,
    CASES,
    GREEDY,
    IMAGE_TOKEN,
    make_inputs,
    make_model,
    make_native,
    new_tokens,
    solo,
    video_tensors,
)
from stts_molmo.generation_stts_molmo import VIDEO_INPUTS
from stts_molmo.prompt_stts_molmo import compact_cached
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation import utils
from transformers.generation.streamers import BaseStreamer


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_pruned_generates_what_native_generates(case, options):
    inputs = CASES[case]()
    ours = make_model().generate(**inputs, **options, prune_ratio=0)
    assert torch.equal(ours, make_native().generate(**inputs, **options))


@pytest.mark.parametrize(
    "options",
    [GREEDY, BEAMS, BEAMS | {"num_return_sequences": 3}],
    ids=["greedy", "beams", "return all beams"],
)
@pytest.mark.parametrize("method", ["scorer", "cosine", "random", "tome"])
def test_a_batch_generates_what_each_row_generates_alone(method, options):
    model, inputs = make_model(method=method), make_inputs(BATCH)
    together = new_tokens(model, inputs, **options)
    returned = options.get("num_return_sequences", 1)
    for row in range(len(BATCH)):
        alone = new_tokens(model, solo(inputs, row, BATCH), **options)
        assert torch.equal(together[row * returned : (row + 1) * returned, : alone.shape[1]], alone)


def test_generation_follows_forward():
    """Greedy tokens are the argmax of the logits of the whole sequence, pruned the same way."""
    model, inputs = make_model(), make_inputs([6])
    tokens = new_tokens(model, inputs, **GREEDY)
    full = torch.cat([inputs["input_ids"], tokens], dim=1)
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
    with torch.no_grad():
        logits = model(
            **inputs | {"input_ids": full, "mm_token_type_ids": types, "attention_mask": torch.ones_like(full)}
        ).logits
    assert torch.equal(logits[:, -7:-1].argmax(-1), tokens)


def test_vision_is_encoded_once():
    model, calls = make_model(), []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    model.generate(**make_inputs([4, 2]), **BEAMS)
    assert calls == [6]


def test_ratio_and_method_of_a_call():
    model, inputs = make_model(), make_inputs([6])
    results = {
        (ratio, method): tuple(new_tokens(model, inputs, **GREEDY, prune_ratio=ratio, method=method)[0].tolist())
        for ratio, method in [
            (None, None),
            (0.5, "scorer"),
            (0.75, "scorer"),
            (0.5, "random"),
            (0.5, "none"),
            (0, None),
        ]
    }
    assert results[None, None] == results[0.5, "scorer"]
    assert results[0.5, "none"] == results[0, None]
    assert len(set(results.values())) >= 3


def test_sampling_is_reproducible():
    model, inputs = make_model(), make_inputs([4, 3])
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(new_tokens(model, inputs, max_new_tokens=8, do_sample=True, num_return_sequences=2))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert runs[0].shape == (4, 8)


def test_dictionary_output():
    model, inputs = make_model(), make_inputs([4, 6])
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"])
    assert len(output.scores) == len(output.logits) == 6
    assert torch.equal(torch.stack(output.logits, 1).argmax(-1), output.sequences[:, length:])
    transition = model.compute_transition_scores(output.sequences, output.scores)
    assert transition.shape == (2, 6)


@pytest.mark.parametrize(
    "lengths",
    [
        {"max_new_tokens": 3},
        {"max_length": 40},
        {"generation_config": GenerationConfig(max_length=41)},
        {"max_new_tokens": 8, "min_new_tokens": 5},
        {"max_length": 44, "min_length": 42},
        {},
    ],
    ids=str,
)
def test_lengths_mean_what_they_mean_natively(lengths):
    inputs = make_inputs([4, 2])
    assert inputs["input_ids"].shape[1] < 40
    ours = make_model().generate(**inputs, **lengths, do_sample=False)
    native = make_native().generate(**inputs, **lengths, do_sample=False)
    assert ours.shape == native.shape


class Ending(LogitsProcessor):
    """Every answer would end at once with token 7."""

    def __call__(self, input_ids, scores):
        return scores + 1000 * torch.nn.functional.one_hot(torch.tensor(7), scores.shape[-1])


@pytest.mark.parametrize("given", ["as an argument", "in a passed config", "in the model's config"])
def test_min_length_counts_the_full_prompt(given):
    model, inputs = make_model(), make_inputs([4, 6])
    wanted = inputs["input_ids"].shape[1] + 3
    options = {"eos_token_id": 7, "pad_token_id": 0, "max_new_tokens": 20, "do_sample": False, "min_length": wanted}
    if given == "in a passed config":
        options = {"generation_config": GenerationConfig(**options)}
    elif given == "in the model's config":
        model.generation_config.min_length = options.pop("min_length")
    sequences = model.generate(**inputs, **options, logits_processor=[Ending()])
    assert sequences.shape[1] == wanted + 1


def test_max_length_of_the_models_own_generation_config():
    model, inputs = make_model(), make_inputs([4])
    model.generation_config.max_length = 37
    assert model.generate(**inputs).shape[1] == 37


def test_eos_stops_and_pads():
    model, inputs = make_model(), make_inputs([4, 6])
    free = new_tokens(model, inputs, **GREEDY)
    stopped = new_tokens(model, inputs, **GREEDY, eos_token_id=int(free[0, 1]), pad_token_id=0)
    assert stopped[0, :2].tolist() == free[0, :2].tolist() and (stopped[0, 2:] == 0).all()


class Recorder(LogitsProcessor, StoppingCriteria):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)


def test_logits_processors_see_full_sequences():
    model, inputs, recorder = make_model(), make_inputs([4, 6]), Recorder()
    sequences = model.generate(**inputs, **GREEDY, logits_processor=[recorder])
    length = inputs["input_ids"].shape[1]
    for step, seen in enumerate(recorder.seen):
        assert torch.equal(seen, sequences[:, : length + step])


def test_stopping_criteria_see_full_sequences():
    model, inputs = make_model(), make_inputs([4, 6])
    length = inputs["input_ids"].shape[1]
    sequences = model.generate(**inputs, **GREEDY, stopping_criteria=[MaxLengthCriteria(length + 2)])
    assert sequences.shape[1] == length + 2


def test_prefix_function_sees_full_sequences():
    model, inputs, seen = make_model(), make_inputs([4, 6]), []

    def allowed(batch_id, sequence):
        seen.append((batch_id, sequence.clone()))
        return [7, 8]

    tokens = new_tokens(model, inputs, **BEAMS, prefix_allowed_tokens_fn=allowed)
    assert ((tokens == 7) | (tokens == 8)).all()
    for batch_id, sequence in seen:
        length = inputs["input_ids"].shape[1]
        assert torch.equal(sequence[:length], inputs["input_ids"][batch_id])


class Collector(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.clone())

    def end(self):
        self.ended = True


def test_streamer_gets_the_full_prompt_then_tokens():
    model, inputs, streamer = make_model(), make_inputs([4]), Collector()
    sequences = model.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.ended and torch.equal(streamer.chunks[0], inputs["input_ids"])
    assert torch.cat([chunk.flatten() for chunk in streamer.chunks]).tolist() == sequences[0].tolist()


def test_static_cache():
    model, inputs = make_model(), make_inputs([4, 6])
    dynamic = new_tokens(model, inputs, **GREEDY)
    static = new_tokens(model, inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


def test_without_a_cache():
    model, inputs = make_model(), make_inputs([4, 6])
    assert torch.equal(new_tokens(model, inputs, **GREEDY), new_tokens(model, inputs, **GREEDY, use_cache=False))


def test_prompt_lookup_decoding():
    model, inputs = make_model(), make_inputs([4])
    assert torch.equal(
        new_tokens(model, inputs, **GREEDY), new_tokens(model, inputs, **GREEDY, prompt_lookup_num_tokens=2)
    )


def test_assisted_decoding():
    model, inputs = make_model(), make_inputs([4])
    assistant = make_model()
    assert torch.equal(
        new_tokens(model, inputs, **GREEDY), new_tokens(model, inputs, **GREEDY, assistant_model=assistant)
    )


def test_chunked_prefill():
    model, inputs = make_model(), make_inputs([4])
    chunked = new_tokens(make_native(), inputs, **GREEDY, prefill_chunk_size=8)
    if not torch.equal(chunked, new_tokens(make_native(), inputs, **GREEDY)):
        pytest.skip("native Molmo2 answers differently in chunks: its vision block spans them")
    assert torch.equal(new_tokens(model, inputs, **GREEDY, prefill_chunk_size=8), new_tokens(model, inputs, **GREEDY))


def extend(sequences, inputs, turn):
    """The next turn's inputs: the conversation so far and a new question, without the pixels."""
    turn = torch.tensor([turn]).expand(len(sequences), -1)
    input_ids = torch.cat([sequences, turn], dim=1)
    grown = input_ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(sequences), grown, dtype=torch.long)], dim=1)
    return {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": (input_ids == IMAGE_TOKEN).long()}


@pytest.mark.parametrize("own_cache", [False, True], ids=["returned cache", "the caller's cache"])
@pytest.mark.parametrize("batch", [[4], [4, 6]], ids=str)
def test_later_turns_continue_with_the_cache(batch, own_cache):
    model, inputs = make_model(), make_inputs(batch)
    cache = DynamicCache(config=model.config.get_text_config()) if own_cache else None
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, past_key_values=cache)
    cache = first.past_key_values
    second_inputs = extend(first.sequences, inputs, [11, 12, 13])
    second = model.generate(**second_inputs, **GREEDY, return_dict_in_generate=True, past_key_values=cache)
    third_inputs = extend(second.sequences, second_inputs, [14, 15])
    third = model.generate(**third_inputs, **GREEDY, past_key_values=second.past_key_values)
    videos = {n: inputs[n] for n in ("pixel_values_videos", "video_token_pooling", "video_grids")}
    for turn_inputs, sequences in ((second_inputs, second.sequences), (third_inputs, third)):
        assert torch.equal(sequences, model.generate(**turn_inputs, **videos, **GREEDY))


def test_a_cache_with_a_video_refuses_another():
    model, inputs = make_model(), make_inputs([4])
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="already holds a video"):
        model.generate(**inputs, **GREEDY, past_key_values=output.past_key_values)


def test_a_static_cache_of_the_callers():
    model, inputs = make_model(), make_inputs([4, 6])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    expected = new_tokens(model, inputs, **GREEDY)
    for _ in range(2):
        assert torch.equal(new_tokens(model, inputs, **GREEDY, past_key_values=cache, disable_compile=True), expected)
        cache.reset()


def test_two_threads_generate_what_each_gives_alone():
    model = make_model()
    batches = [make_inputs([6], seed=0), make_inputs([4, 3], seed=1)]
    alone = [model.generate(**inputs, **GREEDY) for inputs in batches]
    with ThreadPoolExecutor(2) as pool:
        for index, sequences in enumerate(pool.map(lambda i: model.generate(**batches[i % 2], **GREEDY), range(16))):
            assert torch.equal(sequences, alone[index % 2])


def test_a_positional_prompt_and_explicit_positions():
    model, inputs = make_model(), make_inputs([4, 6])
    expected = model.generate(**inputs, **GREEDY)
    prompt = inputs.pop("input_ids")
    assert torch.equal(model.generate(prompt, **inputs, **GREEDY), expected)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert torch.equal(model.generate(prompt, **inputs, position_ids=positions, **GREEDY), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"prune_ratio": -1}, "prune_ratio=-1"),
        (lambda i: {n: v for n, v in i.items() if n != "input_ids"}, "needs input_ids"),
        (
            lambda i: i | {"input_ids": i["input_ids"].clamp_max(60)},
            "0 <im_patch> placeholders, but the videos have 16",
        ),
    ],
    ids=["ratio", "no ids", "no placeholders"],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**change(make_inputs([4])), **GREEDY)


@pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
def test_the_patches_of_the_video_are_not_kept_while_tokens_are_generated(prune_ratio, monkeypatch):
    model, patches, alive = make_model(), [], []
    encode = model.model.get_video_features

    def encode_and_watch(**kwargs):
        features = encode(**kwargs)
        patches.append(weakref.ref(features.last_hidden_state))
        return features

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            alive.append(patches[0]() is not None)
            return scores

    monkeypatch.setattr(model.model, "get_video_features", encode_and_watch)
    model.generate(**make_inputs([6]), **GREEDY, prune_ratio=prune_ratio, logits_processor=[Watch()])
    assert alive == [False] * GREEDY["max_new_tokens"]


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_video_encoded_before_is_answered_as_the_video(options):
    model, inputs = make_model(), make_inputs([4, 6])
    video = {name: inputs.pop(name) for name in VIDEO_INPUTS}
    expected = model.generate(**inputs, **video, **options)
    features = model.model.get_video_features(**video)
    for _ in range(2):  # and can be asked again
        outputs = model.generate(**inputs, mm_encoder_outputs={"video": features}, **options)
        assert torch.equal(outputs, expected)


@pytest.mark.parametrize("second", [[None, None], [1, 1]], ids=["text", "one frame"])
def test_a_cache_that_was_reset_has_forgotten_its_video(second):
    model = make_model()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    options = {**GREEDY, "disable_compile": True}
    model.generate(**make_inputs([4, 6]), **options, past_key_values=cache)
    cache.reset()
    inputs = make_inputs(second)
    first = model.generate(**inputs, **options, past_key_values=cache)
    conversation = torch.cat([first, torch.tensor([[5, 6], [7, 8]])], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, conversation.shape[1] - inputs["input_ids"].shape[1])], 1)
    again = {"input_ids": conversation, "attention_mask": mask.long()}
    expected = model.generate(**{**inputs, **again, "mm_token_type_ids": None}, **options)
    assert torch.equal(model.generate(**again, **options, past_key_values=cache), expected)


def test_a_missing_mask_is_inferred_from_the_padding():
    model, inputs = make_model(), make_inputs([4, 6])
    settings = {**GREEDY, "pad_token_id": 0, "eos_token_id": 63}
    expected = model.generate(**inputs, **settings)
    del inputs["attention_mask"]
    assert torch.equal(model.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("name", ["max_length", "min_length"])
def test_lengths_in_a_passed_config_warn_of_nothing(name, monkeypatch):
    warnings = []
    monkeypatch.setattr(utils.logger, "warning_once", warnings.append)
    inputs = make_inputs([4])
    limits = {"max_length": inputs["input_ids"].shape[1] + 5, name: inputs["input_ids"].shape[1] + 5}
    config = GenerationConfig(**limits, do_sample=False)
    outputs = make_model().generate(**inputs, generation_config=config)
    assert outputs.shape[1] == limits["max_length"]
    assert {key: getattr(config, key) for key in limits} == limits  # the caller's own is left alone
    assert not warnings


def test_a_later_turn_needs_the_whole_conversation():
    model, inputs = make_model(), make_inputs([4])
    cache = model.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="the whole conversation"):
        model.generate(torch.tensor([[5, 6]]), **GREEDY, past_key_values=cache)


def test_compiled_decoding_does_not_ask_a_used_cache_for_its_length():
    model, mask = make_model(), torch.ones(2, 1, 1, 100, dtype=torch.bool)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    model.generate(**make_inputs([4, 6]), **GREEDY, past_key_values=cache, disable_compile=True)
    compiled = torch.compile(
        lambda x: compact_cached({"attention_mask": x, "position_ids": None}, cache, 1)["attention_mask"],
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(compiled(mask), mask)


def test_inputs_that_no_video_goes_with_are_refused():
    model, inputs = make_model(), make_inputs([4])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="needs input_ids, and takes no inputs_embeds"):
        model.generate(**inputs, inputs_embeds=embeds, **GREEDY)
    inputs["attention_mask"][0, 5:7] = 0
    with pytest.raises(ValueError, match="attention_mask hides 2 <im_patch> placeholders"):
        model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("eos_token_id", [9, [63, 9]], ids=str)
def test_padding_that_also_ends_answers_hides_nothing(eos_token_id):
    model, inputs = make_model(), make_inputs([4])
    settings = {**GREEDY, "pad_token_id": 9, "eos_token_id": eos_token_id}
    assert (inputs["input_ids"] == 9).any()
    expected = model.generate(**inputs, **settings)
    del inputs["attention_mask"]
    assert torch.equal(model.generate(**inputs, **settings), expected)


def test_rows_without_padding_that_lose_different_numbers_of_tokens():
    model, inputs = make_model(), make_inputs([4, 6])
    padding = inputs["attention_mask"] == 0
    inputs["input_ids"][padding], inputs["attention_mask"][padding] = 11, 1
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**inputs, **settings)
    for row in range(2):
        alone = model.generate(**solo(inputs, row, [4, 6]), **settings)
        assert torch.equal(together.sequences[row : row + 1, -6:], alone.sequences[:, -6:])
        for logits, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-5, rtol=1e-4)


def test_a_later_turn_of_several_answers_to_one_prompt():
    model, inputs = make_model(), make_inputs([4, 6])
    first = model.generate(
        **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2, return_dict_in_generate=True
    )
    masks = {"attention_mask": inputs["attention_mask"].repeat_interleave(2, dim=0)}
    turn = extend(first.sequences, masks, [11, 12])
    later = model.generate(**turn, **GREEDY, past_key_values=first.past_key_values)
    videos = video_tensors([4, 4, 6, 6])
    frames = inputs["pixel_values_videos"].split([4, 6])
    videos["pixel_values_videos"] = torch.cat([frames[0], frames[0], frames[1], frames[1]])
    assert torch.equal(later, model.generate(**turn, **videos, **GREEDY))


def test_continuous_batching_is_refused():
    """It takes token ids and no pixels: the model would answer about a video that it has not seen."""
    model, ids = make_model(), make_inputs([4])["input_ids"].tolist()
    for start in (
        lambda: model.generate_batch(ids),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager().__enter__(),
    ):
        with pytest.raises(NotImplementedError, match="without having seen it. Use generate"):
            start()
