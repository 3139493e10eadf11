"""From a video file and a question to an answer."""

from functools import partial

import torch
from safetensors import SafetensorError

from ..configuration_stts_molmo import validate_method, validate_prune_ratio
from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration
from ..processing_stts_molmo import STTSMolmoProcessor
from ..pruning_stts_molmo import num_kept_tokens
from .checkpoint import require_stts
from .console import stage


def answer_question(
    video: str,
    question: str,
    checkpoint: str,
    prune_ratio: float | None,
    method: str | None,
    num_frames: int | None,
    test_time_scaling: bool,
    max_new_tokens: int,
    device: str,
    dtype: str,
) -> dict:
    """
    Run the whole path from a video file to an answer.

    Returns:
        `{"answer": str, "frames": int, "prune_ratio": float, "vision_tokens": {"before": int, "after": int},
        "seconds": {"decode": float, "preprocess": float, "generate": float}}`.

    Raises:
        OSError: video or checkpoint cannot be found.
        ValueError: video, checkpoint or an option is not usable; the message says what to do.
    """
    config = require_stts(checkpoint)
    if prune_ratio is None:
        prune_ratio = config.stts_config.prune_ratio
    prune_ratio = validate_prune_ratio(prune_ratio)
    method = validate_method(config.stts_config.method if method is None else method)
    device = find_device(device)

    seconds = {}
    processor = STTSMolmoProcessor.from_pretrained(checkpoint)
    with stage("decode", seconds):
        sample = partial(
            processor.video_processor.sample_frames,
            num_frames=num_frames,
            test_time_scaling=test_time_scaling,
            prune_ratio=prune_ratio,
        )
        frames, metadata = processor.video_processor.fetch_videos(video, sample_indices_fn=sample)
    with stage("preprocess", seconds):
        content = [{"type": "video"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(
            text=prompt,
            videos=[frames],
            video_metadata=[metadata],
            do_sample_frames=False,
            device=device,
            return_tensors="pt",
        )
    model = load_model(checkpoint, device, dtype)
    with stage("generate", seconds):
        inputs = inputs.to(model.device, dtype=model.dtype)
        try:
            output = model.generate(**inputs, prune_ratio=prune_ratio, method=method, max_new_tokens=max_new_tokens)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{device} has too little memory for {len(frames)} frames; try fewer with `--num-frames`, a higher "
                "`--prune-ratio`, `--dtype bfloat16` or `--device cpu`."
            ) from error
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    num_frames, rows, columns = inputs["video_grids"][0].tolist()
    kept = num_kept_tokens(num_frames, rows * columns, 0 if method == "none" else prune_ratio)
    return {
        "answer": answer.strip(),
        "frames": num_frames,
        "prune_ratio": prune_ratio,
        "vision_tokens": {"before": num_frames * rows * columns, "after": kept},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one. Raises a `ValueError` where it does not exist."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises one or the other, by build
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); use `cpu`, or leave it out.") from error


def load_model(checkpoint: str, device: torch.device, dtype: str) -> STTSMolmoForConditionalGeneration:
    """
    Load a checkpoint for inference.

    Raises:
        ValueError: weights are missing or damaged; Transformers would warn and go on with random ones.
    """
    try:
        model, report = STTSMolmoForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, device_map=device, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} has damaged weights ({error}); fetch or convert it again.") from error
    bad = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    if bad:
        what = "has no token scorer" if all("token_scorer" in name for name in bad) else "is incomplete"
        raise ValueError(
            f"{checkpoint} {what}: {len(bad)} tensors are missing or of another shape, {min(bad)} among them. "
            "Make it anew with `stts-molmo convert`."
        )
    return model.eval()
