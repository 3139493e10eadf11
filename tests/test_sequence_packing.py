"""Several samples in one row: as few rows as fit, and the loss and the gradients of a batch with a row for each."""

import pytest
import torch
from helpers import CLIP, load_processor, make_inputs, make_tokenized_model
from stts_molmo.configuration_stts_molmo import STTSConfig
from stts_molmo.pruning_stts_molmo import num_kept_tokens
from stts_molmo.tools.training import VideoQACollator, length_after_pruning, pack_samples


def example(question: str, answer: str, video: str | None = CLIP) -> dict:
    content = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video", "path": video})
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


EXAMPLES = [
    example("Which shape?", "ring"),
    example("What color is the lamp?", "it is red", video=None),
    example("Which way does the ball move?", "the ball moves up"),
    example("Where is it?", "top left"),
]


@pytest.fixture(scope="module")
def processor():
    return load_processor()


def collate(processor, max_length=None, stts_config=None, examples=EXAMPLES):
    return VideoQACollator(processor, {"num_frames": 4}, max_length, stts_config)(examples)


def test_rows_hold_whole_samples_and_their_videos(processor):
    config = STTSConfig(prune_ratio=0.5)
    alone = [collate(processor, examples=[one]) for one in EXAMPLES]
    lengths = [length_after_pruning(sample, config) for sample in alone]
    dropped = 36 - num_kept_tokens(4, 9, 0.5)
    assert [sample["input_ids"].shape[1] - n for sample, n in zip(alone, lengths, strict=True)] == [
        dropped if "video_grids" in sample else 0 for sample in alone
    ]
    batch = collate(processor, max(lengths) + min(lengths), config)
    assert "attention_mask" not in batch and len(batch["input_ids"]) < len(EXAMPLES)
    seen = []
    for row, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = [*torch.where(positions == 0)[0].tolist(), int((positions >= 0).sum())]
        seen += [row[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
    expected = [sample["input_ids"][0].tolist() for sample in alone]
    assert sorted(ids for ids in seen if any(ids)) == sorted(expected)
    order = [expected.index(ids) for ids in seen if any(ids)]
    videos = [alone[i] for i in order if "video_grids" in alone[i]]
    assert torch.equal(batch["pixel_values_videos"], torch.cat([video["pixel_values_videos"] for video in videos]))
    pooled = batch["pixel_values_videos"].flatten(0, 1)[batch["video_token_pooling"]]
    own = [video["pixel_values_videos"].flatten(0, 1)[video["video_token_pooling"]] for video in videos]
    assert torch.equal(pooled, torch.cat(own))


def test_pruning_makes_room(processor):
    """What is counted is what the language model runs on."""
    sample = collate(processor, examples=EXAMPLES[:1])
    full = sample["input_ids"].shape[1]
    assert length_after_pruning(sample, None) == length_after_pruning(sample, STTSConfig(method="none")) == full
    two = length_after_pruning(sample, STTSConfig(prune_ratio=0.5)) * 2
    assert len(collate(processor, two, STTSConfig(prune_ratio=0.5), EXAMPLES[:1] * 2)["input_ids"]) == 1
    assert len(collate(processor, two, STTSConfig(prune_ratio=0), EXAMPLES[:1] * 2)["input_ids"]) == 2
    budget = STTSConfig(max_vision_tokens=9)
    assert length_after_pruning(sample, budget) == full - 27


@pytest.mark.parametrize("num_items_in_batch", [None, 40])
@pytest.mark.parametrize("rows", ["one row", "two rows"])
def test_loss_and_gradients_are_those_of_the_unpacked_batch(processor, rows, num_items_in_batch):
    model = make_tokenized_model().train()
    unpacked = collate(processor)
    config = model.config.stts_config
    longest = max(length_after_pruning(collate(processor, examples=[one]), config) for one in EXAMPLES)
    packed = collate(processor, 10**6 if rows == "one row" else 2 * longest, config)
    assert len(packed["input_ids"]) == (1 if rows == "one row" else 2)
    results = []
    for batch in (unpacked, packed):
        model.zero_grad()
        outputs = model(**batch, num_items_in_batch=num_items_in_batch)
        outputs.loss.backward()
        results.append((outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.aux_loss, expected.aux_loss, rtol=1e-6, atol=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_padding_is_pruned_too(processor):
    """A row of text is padded to what a video's row has before it is pruned, and is no longer than that afterwards."""
    model, lengths = make_tokenized_model().train(), []
    config = model.config.stts_config
    longest = length_after_pruning(collate(processor, examples=EXAMPLES[:1]), config)
    batch = collate(processor, longest, config, EXAMPLES[:2])
    assert len(batch["input_ids"]) == 2 and batch["input_ids"].shape[1] > longest
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model(**batch)
    assert lengths == [longest]


def test_a_sample_longer_than_a_row(processor):
    with pytest.raises(ValueError, match=r"after pruning, more than a row of max_length=20; raise it"):
        collate(processor, 20)


def test_images_are_packed_too(processor):
    picture = torch.zeros(36, 36, 3, dtype=torch.uint8).numpy()
    chats = []
    for count in (1, 2):
        content = [{"type": "image", "image": picture}] * count + [{"type": "text", "text": "What is it?"}]
        chats.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "black"}]})
    model = make_tokenized_model().train()
    losses = [model(**collate(processor, max_length, examples=chats)).loss for max_length in (None, 10**6)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_padding_alone_makes_no_sample():
    """Rows of one length have none."""
    samples = [make_inputs([4], seed=seed) for seed in range(2)]
    for sample in samples:
        sample["labels"] = sample["input_ids"].masked_fill(sample["input_ids"] >= 64, -100)
    batch = pack_samples(samples, samples[0]["input_ids"].shape[1])
    assert batch["input_ids"].shape == (2, samples[0]["input_ids"].shape[1])
    assert (batch["position_ids"] == 0).sum() == 2
