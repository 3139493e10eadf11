"""From a video and a question to an answer."""

from dataclasses import dataclass

import torch

from ..generation_stts_molmo import VIDEO_INPUTS
from .checkpoint import TRAIN_OR_COSINE, Checkpoint
from .console import stage, timed
from .finite import RequireFinite, explained_not_finite
from .video import encode_video, explained_out_of_memory, make_inputs, read_clip


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost: tokens of the video `{"before": ..., "after": ...}` pruning, seconds of each step."""

    answer: str
    frames: int
    method: str
    prune_ratio: float
    vision_tokens: dict[str, int]
    seconds: dict[str, float]


@torch.no_grad()
def answer_question(
    checkpoint: Checkpoint,
    video,
    question: str,
    *,
    prune_ratio: float | None = None,
    method: str | None = None,
    num_frames: int | None = None,
    test_time_scaling: bool = False,
    max_new_tokens: int = 128,
    allow_untrained: bool = False,
) -> Answer:
    """
    Answer a question about a video. For many, pass the same `checkpoint`: it is loaded once.

    Args:
        video: anything that the processor takes: a path, a URL, bytes, an array.
        prune_ratio, method, num_frames: the checkpoint's own when not given.
        test_time_scaling: spend what pruning saves on more frames (section 5.3).
        max_new_tokens: longest answer, in tokens.
        allow_untrained: let a scorer choose that was never trained.

    Raises:
        OSError: there is no such video or checkpoint.
        ValueError: video, question, checkpoint or an option is not usable, or the model computes NaN or infinity; the
            message says what to do.
    """
    if not question.strip():
        raise ValueError(f"The question {question!r} is empty; ask something.")
    options = {"prune_ratio": prune_ratio, "method": method}
    pruning = checkpoint.config.stts_config.pruning(**options)
    sampling = {"num_frames": num_frames, "test_time_scaling": test_time_scaling, "prune_ratio": pruning.prune_ratio}
    seconds = {}
    with timed("load", seconds):
        processor = checkpoint.processor
    with stage("decode", seconds):
        clip = read_clip(processor, video, **sampling)
    with stage("preprocess", seconds):
        inputs = make_inputs(processor, clip, question, checkpoint.device)
    with timed("load", seconds):
        model = checkpoint.model
    if not allow_untrained and pruning.method == "scorer" and model.has_untrained_scorer():
        raise ValueError(
            f"The token scorer of {checkpoint.path} is not trained: it would drop tokens at random. {TRAIN_OR_COSINE} "
            "To use it as it is, pass --allow-untrained."
        )
    with explained_out_of_memory(clip, checkpoint.device), explained_not_finite(model, inputs, **options):
        with stage("encode", seconds):
            features = encode_video(model, inputs, **options)
            num_kept = int(features.keep_mask.sum())
        with stage("generate", seconds):
            prompt = {name: inputs[name] for name in inputs if name not in VIDEO_INPUTS}
            output = model.generate(
                **prompt,
                mm_encoder_outputs={"video": features},
                max_new_tokens=max_new_tokens,
                logits_processor=[RequireFinite()],
            )
            answer = processor.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answer(
        answer=answer.strip(),
        frames=len(clip.frames),
        method=pruning.method,
        prune_ratio=pruning.prune_ratio,
        vision_tokens={"before": features.keep_mask.numel(), "after": num_kept},
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )
