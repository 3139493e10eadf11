"""Training on videos, images and text: what shares a batch and a step."""

import math
from collections import Counter
from itertools import islice

import pytest
from stts_molmo.tools.sampling import StepSampler, deal, micro_batches, plan_epoch

MIXES = {
    "all kinds": ["video"] * 7 + ["image"] * 5 + [None] * 4,
    "few videos": ["video"] * 2 + ["image"] * 9 + [None] * 20,
    "one video": ["video"] + ["image"] * 3,
    "videos alone": ["video"] * 9,
    "videos and text": ["video"] * 5 + [None] * 3,
    "no video": ["image"] * 3 + [None] * 4,
    "text alone": [None] * 5,
}


def test_rows_are_dealt_to_full_batches():
    assert deal([0, 1, 2, 3, 4], 2) == [[0, 3], [1, 4], [2, 0]]
    assert deal([7], 3) == [[7, 7, 7]] and deal([], 2) == []


@pytest.mark.parametrize("per_step", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mix", MIXES)
def test_every_step_has_a_video_and_no_batch_two_kinds(mix, batch_size, per_step):
    media = MIXES[mix]
    plan = plan_epoch(media, batch_size, per_step, epoch=1)
    assert len(plan) % per_step == 0 and {len(batch) for batch in plan} == {batch_size}
    assert {row for batch in plan for row in batch} == set(range(len(media)))
    assert not any({"video", "image"} <= {media[row] for row in batch} for batch in plan)
    if "video" in media:
        shows = [any(media[row] == "video" for row in batch) for batch in plan]
        for step in range(0, len(plan), per_step):
            assert shows[step] and shows[step : step + per_step] == sorted(shows[step : step + per_step])[::-1]
    elif per_step == 2 and batch_size == 1:
        assert max(Counter(row for batch in plan for row in batch).values()) <= 2


def test_enough_videos_come_once_but_for_what_fills_the_last_step():
    media = MIXES["all kinds"]
    plan = plan_epoch(media, 1, 4, epoch=0)
    assert len(plan) == math.ceil(len(media) / 4) * 4 == len(media)
    assert sorted(row for batch in plan for row in batch) == list(range(len(media)))


def test_epochs_differ_and_can_be_repeated():
    media = MIXES["all kinds"]
    first, second = (plan_epoch(media, 2, 2, epoch) for epoch in range(2))
    assert first != second and first == plan_epoch(media, 2, 2, 0)
    assert list(islice(micro_batches(media, 2, 2), len(first) + 1)) == [*first, second[0]]
    sampler = StepSampler(media, 2, 2)
    for epoch, plan in enumerate((first, second)):
        sampler.set_epoch(epoch)
        assert list(sampler) == [row for batch in plan for row in batch] and len(sampler) == len(list(sampler))


def test_steps_of_one_batch_cannot_have_a_video_each():
    with pytest.raises(ValueError, match="7 rows have a video, 5 have images and 4 neither: with one batch"):
        plan_epoch(MIXES["all kinds"], 2, 1, 0)
    # Text goes with videos.
    assert len(plan_epoch(MIXES["videos and text"], 2, 1, 0)) == 4
