"""What was kept, to look at: frames with dropped blocks dimmed above the scores that decided (Figures 1 and 7)."""

import math
from collections.abc import Sequence
from pathlib import Path

import av
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import BatchFeature

from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration
from ..outputs_stts_molmo import STTSMolmoVideoFeatures
from ..processing_stts_molmo import STTSMolmoProcessor
from .files import written_whole
from .video import Clip, encode_video, explained_out_of_memory, make_video_inputs, read_clip

TILE = 162  # pixels of a drawn frame's side
GAP = 6
LABEL_HEIGHT = 16
DIMMED = 0.25  # brightness of a dropped block
UNSCORED = 0.75  # grey


def visualize(
    model: STTSMolmoForConditionalGeneration,
    processor: STTSMolmoProcessor,
    video,
    methods: Sequence[str] = ("scorer",),
    prune_ratio: float | None = None,
    num_frames: int | None = None,
    columns: int = 8,
    max_vision_tokens: int | None = None,
) -> list[Image.Image]:
    """
    Draw what each method keeps of a video.

    Args:
        video: anything that the processor takes: a path, a URL, bytes.
        methods: `"scorer"`, `"cosine"`, `"random"` or `"tome"` (which has no scores), drawn one above the other.
        prune_ratio: share of tokens to drop; the checkpoint's own when not given.
        num_frames: most frames to sample; the checkpoint's own when not given.
        columns: most frames in a row; each image holds one row of every method.
        max_vision_tokens: the most tokens to keep, in place of a ratio.

    Returns:
        One image for each row of frames.

    Raises:
        ValueError: `video` cannot be decoded, or a method or ratio is out of range.
    """
    clip = read_clip(processor, video, num_frames=num_frames)
    inputs = make_video_inputs(processor, clip, model.device)
    with explained_out_of_memory(clip, model.device):
        pruning = {"prune_ratio": prune_ratio, "max_vision_tokens": max_vision_tokens}
        features = {name: encode_video(model, inputs, method=name, **pruning) for name in methods}
    return draw_clip(processor, clip, inputs, features, columns)


def draw_clip(
    processor: STTSMolmoProcessor,
    clip: Clip,
    inputs: BatchFeature,
    features: dict[str, STTSMolmoVideoFeatures],
    columns: int = 8,
) -> list[Image.Image]:
    """
    Draw what was kept of a clip, one image for each row of frames.

    Args:
        inputs: those of the clip's pixels.
        features: what was made of them, by the names that stand above, in order.
        columns: most frames in a row; each image holds one row of each of `features`.
    """
    grid = tuple(inputs["video_grids"][0, 1:].tolist())
    patches, patch_size = inputs["pixel_values_videos"].cpu(), processor.video_processor.patch_size
    frames = unpatchify(patches, patch_size, processor.video_processor)
    drawn = {name: draw_frames(frames, kept, grid) for name, kept in features.items()}
    columns = math.ceil(len(frames) / math.ceil(len(frames) / columns))  # as few white tiles as the rows allow
    times = [f"{time:.1f} s" for time in clip.metadata.timestamps]
    return [
        compose({name: tiles[i : i + columns] for name, tiles in drawn.items()}, times[i : i + columns], columns)
        for i in range(0, len(frames), columns)
    ]


def unpatchify(patches: torch.Tensor, patch_size: int, video_processor) -> np.ndarray:
    """Normalised patches `(frames, N, patch_size * patch_size * 3)` -> uint8 frames `(frames, side, side, 3)`."""
    side = round(patches.shape[1] ** 0.5)
    frames = patches.float().unflatten(2, (patch_size, patch_size, 3)).unflatten(1, (side, side))
    frames = frames.transpose(2, 3).flatten(3, 4).flatten(1, 2).view(len(patches), side * patch_size, -1, 3)
    frames = frames * torch.tensor(video_processor.image_std) + torch.tensor(video_processor.image_mean)
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def draw_frames(
    frames: np.ndarray, features: STTSMolmoVideoFeatures, grid: tuple[int, int]
) -> list[tuple[Image.Image, Image.Image]]:
    """
    Per frame: the frame with dropped blocks dimmed, and its scores as colours from dark (0) to bright (the highest);
    grey where there is none, as in the first frame, which is kept whole (section 3.1), and for `"tome"`.

    Args:
        frames: uint8 `(frames, side, side, 3)`.
        features: `keep_mask` and `token_scores`, both `(frames, P)`; the scores may be `None`.
        grid: rows and columns of tokens in a frame.
    """
    keep = features.keep_mask.cpu().float().view(-1, *grid).numpy()
    colors = np.full((*keep.shape, 3), UNSCORED)
    if features.token_scores is not None:
        scores = features.token_scores[1:].cpu().unflatten(1, grid).numpy()
        colors[1:] = matplotlib.colormaps["viridis"](scores / max(scores.max(initial=0), 1e-6))[..., :3]
    tiles = []
    for frame, kept, color in zip(frames, keep, colors, strict=True):
        size = (TILE, TILE)
        brightness = Image.fromarray(np.uint8(255 * (DIMMED + (1 - DIMMED) * kept))).resize(size, Image.NEAREST)
        picture = Image.fromarray(frame).resize(size, Image.NEAREST)
        dimmed = np.asarray(picture) * (np.asarray(brightness)[..., None] / 255)
        heat = Image.fromarray(np.uint8(255 * color)).resize((TILE, TILE // 2), Image.NEAREST)
        tiles.append((Image.fromarray(np.uint8(dimmed)), heat))
    return tiles


def compose(
    drawn: dict[str, list[tuple[Image.Image, Image.Image]]], labels: Sequence[str], columns: int
) -> Image.Image:
    """A row of tiles for each method under its name and the frames' times."""
    row_height = LABEL_HEIGHT + TILE + TILE // 2 + 2 * GAP
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, len(drawn) * row_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, tiles) in enumerate(drawn.items()):
        top = GAP + row * row_height
        for column, ((picture, heat), label) in enumerate(zip(tiles, labels, strict=True)):
            left = GAP + column * (TILE + GAP)
            pen.text((left, top), f"{name}, {label}" if column == 0 else label, fill="black")
            sheet.paste(picture, (left, top + LABEL_HEIGHT))
            sheet.paste(heat, (left, top + LABEL_HEIGHT + TILE + GAP // 2))
    return sheet


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """The images below each other."""
    sheet = Image.new("RGB", (images[0].width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def save_png(images: Sequence[Image.Image], path: str | Path) -> None:
    """Write the images below each other."""
    with written_whole(path) as draft:
        stack(images).save(draft)


def save_mp4(images: Sequence[Image.Image], path: str | Path, fps: int = 2) -> None:
    """Write the images as a video, `fps` a second."""
    with written_whole(path) as draft, av.open(str(draft), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = (side - side % 2 for side in images[0].size)  # H.264 wants even sides
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
