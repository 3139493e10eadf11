"""What is kept of a video at several ratios, and whether the answer to a question changes with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

from PIL import Image

from .answer import MAX_NEW_TOKENS, Answer, WatchedVideo, ask_about
from .checkpoint import Checkpoint
from .video import make_video_inputs, read_clip
from .visualization import draw_clip

RATIOS = tuple({"prune_ratio": ratio} for ratio in (0.3, 0.5, 0.7, 0.9))
LABEL_LENGTH = 20  # characters above a drawn frame, beside its time


@dataclass(frozen=True)
class Comparison:
    """
    The answers to a question about a video, and what each was given of it: the first with all its tokens, the others
    with fewer. `images` has a row for each, one image for each row of frames.
    """

    question: str
    answers: list[Answer]
    images: list[Image.Image]

    @property
    def changed(self) -> list[bool]:
        """Of each answer, whether it is another than that with all tokens."""
        return [answer.answer != self.answers[0].answer for answer in self.answers]

    def __str__(self) -> str:
        return "\n".join(
            f"{answer.method}, prune ratio {answer.prune_ratio:g}, {answer.vision_tokens['after']} of "
            f"{answer.vision_tokens['before']} tokens: {answer.answer}{' (changed)' if changed else ''}"
            for answer, changed in zip(self.answers, self.changed, strict=True)
        )


def see_why(
    checkpoint: Checkpoint,
    video,
    question: str,
    prunings: Sequence[dict] = RATIOS,
    *,
    num_frames: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    columns: int = 8,
    allow_untrained: bool = False,
) -> Comparison:
    """
    Ask a question about a video with all of its tokens, and with what is left by each of `prunings`.

    Args:
        checkpoint, video, question, num_frames, max_new_tokens, allow_untrained: as [`WatchedVideo`] takes them.
        prunings: options of [`WatchedVideo`], any of `prune_ratio`, `max_vision_tokens` and `method`.
        columns: most frames in a row of the drawing.

    Raises:
        OSError, ValueError: see [`WatchedVideo`].

    Example:

    ```python
    >>> seen = see_why(Checkpoint("molmo2-4b-stts"), "clip.mp4", "Which way does it move?")
    >>> print(seen)
    >>> seen.images[0]
    ```
    """
    ask_about(question)
    clip = read_clip(checkpoint.processor, video, num_frames=num_frames)
    answers, features = [], {}
    for number, pruning in enumerate([{"method": "none"}, *prunings]):
        watched = WatchedVideo(checkpoint, clip, **pruning, allow_untrained=allow_untrained)
        answer = watched.answer(question, max_new_tokens=max_new_tokens)
        answers.append(answer)
        # Numbered: two may have the same answer, and names are those of rows.
        label = f"{number}. {answer.prune_ratio:.0%} {answer.method}: {answer.answer}"
        features[shorten(label, LABEL_LENGTH, placeholder="...")] = watched.features
    inputs = make_video_inputs(checkpoint.processor, clip, checkpoint.device)
    return Comparison(question, answers, draw_clip(checkpoint.processor, clip, inputs, features, columns))
