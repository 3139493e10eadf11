"""Which rows of a training on videos, images and text (the paper's Table 4) share a batch, and which a step."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, count, cycle, islice

import torch
from torch.utils.data import Sampler


def deal(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """
    Row after row to as few batches as hold them, each batch one at a time; some twice, so that all are full.

    `[0, 1, 2, 3, 4], 2 -> [0, 3], [1, 4], [2, 0]`
    """
    batches = math.ceil(len(rows) / batch_size)
    full = list(islice(cycle(rows), batches * batch_size))
    return [full[index::batches] for index in range(batches)]


def plan_epoch(media: Sequence[str | None], batch_size: int, per_step: int, epoch: int) -> list[list[int]]:
    """
    Shuffle rows and put them into micro-batches such that

    - none holds both images and videos, which Molmo2 cannot take at once; text goes with videos;
    - the first of each step has a video, so that the token scorer learns in every step. Where videos are too few for
      that, they come several times in an epoch.

    Args:
        media: `"video"`, `"image"` or `None` of each row.
        batch_size: rows of a micro-batch.
        per_step: micro-batches of a step on all processes: their number times the steps that gradients accumulate.
        epoch: which one; each has an order of its own, the same wherever it is made.

    Returns:
        Micro-batches, step after step; within a step those with videos first, so that processes which take them in
        turn work on the same kind at a time. Each row is there at least once.

    Raises:
        ValueError: steps of a single micro-batch cannot have a video each.
    """
    generator = torch.Generator().manual_seed(epoch)

    def shuffled(items: Sequence) -> list:
        return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]

    def has_video(batch: list[int]) -> bool:
        return any(media[row] == "video" for row in batch)

    rows = shuffled(range(len(media)))
    videos, images, texts = ([row for row in rows if media[row] == kind] for kind in ("video", "image", None))
    batches = deal(videos + texts, batch_size) + deal(images, batch_size)
    leaders = [batch for batch in batches if has_video(batch)]
    rest = [batch for batch in batches if not has_video(batch)]
    if not leaders:  # nothing that the scorer could learn from
        leaders, rest = rest, []
    if rest and per_step == 1:
        raise ValueError(
            f"{len(videos)} rows have a video, {len(images)} have images and {len(texts)} neither: with one batch of "
            f"{batch_size} a step, some steps would have no video for the scorer to learn from. Raise "
            "gradient_accumulation_steps, or take more processes."
        )
    steps = max(math.ceil(len(batches) / per_step), math.ceil(len(rest) / max(per_step - 1, 1)))
    followers = chain(shuffled(leaders[steps:] + rest), cycle(batches))
    plan = []
    for leader in islice(cycle(leaders), steps):
        plan += [leader, *sorted(islice(followers, per_step - 1), key=has_video, reverse=True)]
    return plan


def micro_batches(media: Sequence[str | None], batch_size: int, per_step: int) -> Iterator[list[int]]:
    """Those of [`plan_epoch`], epoch after epoch without an end."""
    return chain.from_iterable(plan_epoch(media, batch_size, per_step, epoch) for epoch in count())


class StepSampler(Sampler[int]):
    """The rows of [`plan_epoch`] one by one, for a loader that makes batches of `batch_size` of them."""

    def __init__(self, media: Sequence[str | None], batch_size: int, per_step: int):
        self.arguments = (media, batch_size, per_step)
        self.num_rows = len(plan_epoch(*self.arguments, epoch=0)) * batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(plan_epoch(*self.arguments, self.epoch))
