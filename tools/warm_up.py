"""A first lesson for a new scorer: the auxiliary target on clips without labels, while all else stays as it is."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ..generation_stts_molmo import VIDEO_INPUTS
from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration
from ..processing_stts_molmo import STTSMolmoProcessor
from .checkpoint import Checkpoint
from .corpus import find_videos
from .files import fetch, locate_tensors, require_new_folder, written_whole
from .publishing import write_card
from .video import read_clip

LEARNING_RATE = 1e-3


def warm_up(
    model: STTSMolmoForConditionalGeneration, batches: Iterable[dict], learning_rate: float = LEARNING_RATE
) -> Iterator[float]:
    """
    Train the scorer alone on the auxiliary loss (section 3.4), one step a batch. Of the model nothing but ViT layers
    `0..l` and the scorer runs, and nothing but the scorer changes; it learns in float32, whatever the model's dtype.

    Args:
        model: whose scorer is trained, once all batches are through.
        batches: of `pixel_values_videos`, `video_token_pooling` and `video_grids`, as the processor returns them.
        learning_rate: of AdamW.

    Yields:
        The loss of each step, before the step.
    """
    core, tower = model.model, model.model.vision_tower
    given, scorer = tower.token_scorer, copy.deepcopy(tower.token_scorer).float().train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    tower.token_scorer = scorer
    try:
        for batch in batches:
            pixels, *others = (batch[name].to(model.device) for name in VIDEO_INPUTS)
            with torch.no_grad():
                features = tower.run_early_layers(pixels).float()
            layout = core.video_layout(pixels, *others)
            loss = tower.score(features, layout, layout.num_kept(0.0, None), "scorer")[2]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()
        with torch.no_grad():
            for old, new in zip(given.parameters(), scorer.parameters(), strict=True):
                old.copy_(new)
    finally:
        tower.token_scorer = given


def warm_up_checkpoint(
    checkpoint: str,
    clips: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    steps: int = 200,
    clips_a_step: int = 4,
    num_frames: int | None = None,
    learning_rate: float = LEARNING_RATE,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Path:
    """
    Write a copy of a checkpoint whose scorer has had its [`warm_up`].

    Args:
        checkpoint: directory or Hub id of an STTS checkpoint.
        clips: a video, or a folder with videos in it and below it.
        destination: directory to write; must not exist, or be empty.
        steps, clips_a_step, learning_rate: how long and how fast it learns.
        num_frames: most frames of a clip; the checkpoint's own when not given.
        device, dtype: what the vision tower runs on and in; see [`Checkpoint`].
        seed: of the clips' order.
        progress: called with (steps done, loss) after each step.

    Returns:
        `destination` as a `Path`.

    Raises:
        FileExistsError: `destination` holds files already.
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is no STTS checkpoint, its scorer is stored quantized, there is no video in `clips`, or one of
            them cannot be read or has one frame.
    """
    destination, clips = require_new_folder(destination), Path(clips)
    videos = [clips] if clips.is_file() else list(find_videos(clips).values())
    loaded = Checkpoint(checkpoint, device, dtype)
    batches = read_batches(loaded.processor, videos, clips_a_step, num_frames, seed)
    for step, loss in enumerate(warm_up(loaded.model, (next(batches) for _ in range(steps)), learning_rate), 1):
        if progress is not None:
            progress(step, loss)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(destination) as folder:
        shutil.copytree(fetch(checkpoint), folder)
        overwrite_scorer(folder, loaded.model.model.vision_tower.token_scorer.state_dict())
        count = f"{len(videos)} clip{'s' * (len(videos) > 1)}"
        write_card(folder, trained_on=f"{count} without labels, {steps} steps of warm-up", model=destination.name)
    return destination


def read_batches(
    processor: STTSMolmoProcessor, videos: Sequence[Path], size: int, num_frames: int | None, seed: int
) -> Iterator[dict]:
    """Batches of `size` videos without end; each video once before any comes again."""
    rng, waiting = np.random.default_rng(seed), []
    while True:
        while len(waiting) < size:
            waiting += [videos[index] for index in rng.permutation(len(videos))]
        chosen, waiting = waiting[:size], waiting[size:]
        clips = [read_clip(processor, str(video), num_frames=num_frames) for video in chosen]
        for video, clip in zip(chosen, clips, strict=True):
            if len(clip.frames) < 2:
                raise ValueError(f"{video} has one frame only, and nothing to compare it with; leave it out.")
        yield processor.video_processor(
            [clip.frames for clip in clips],
            video_metadata=[clip.metadata for clip in clips],
            do_sample_frames=False,
            return_tensors="pt",
        )


def overwrite_scorer(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """
    Put the scorer's weights in the place of those in the files of `folder`, in the dtype that these have. Only their
    bytes are written: a file holds GBs of other weights.
    """
    stored = {name: tensor.file for name, tensor in locate_tensors(folder).items() if "token_scorer." in name}
    for file in set(stored.values()):
        with safe_open(file, framework="pt") as reader:
            old = {name: reader.get_tensor(name) for name in stored if stored[name] == file}
        new = {
            name: weights[name.partition("token_scorer.")[2]].to("cpu", tensor.dtype) for name, tensor in old.items()
        }
        with file.open("r+b") as writer:
            length = int.from_bytes(writer.read(8), "little")
            header = json.loads(writer.read(length))
            for name, tensor in new.items():
                writer.seek(8 + length + header[name]["data_offsets"][0])
                writer.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
