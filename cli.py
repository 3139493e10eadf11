"""Command line of stts-molmo: ask a question about a video, convert a checkpoint, look into one."""

import json
import math
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# torch and transformers are imported where they are used: `--help` answers at once.
if TYPE_CHECKING:
    import torch
    from transformers import Molmo2Config

    from .configuration_stts_molmo import STTSMolmoConfig
    from .modeling_stts_molmo import STTSMolmoForConditionalGeneration

BUNDLED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "stts-molmo-tiny"
FRAME_COUNTS = (16, 32, 64, 128, 256)

app = typer.Typer(
    help="Ask questions about videos with Molmo2, with the redundant part of the video's tokens pruned (STTS).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
stderr = Console(stderr=True)


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the program with exit code 2 and one message on stderr for errors that the user can mend."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def stage(description: str, seconds: dict[str, float]) -> Iterator[None]:
    """Show what is going on on stderr, and note the wall-clock time it took in `seconds[description]`."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        progress.add_task(description)
        start = time.perf_counter()
        yield
        seconds[description] = time.perf_counter() - start


def hide_progress_off_terminal() -> None:
    """Keep the libraries' progress bars out of a stderr that nobody watches."""
    from transformers.utils import logging

    if not stderr.is_terminal:
        logging.disable_progress_bar()


@app.command()
def ask(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="File or URL, of any format that FFmpeg reads.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
    model: Annotated[
        str,
        typer.Option(
            help="Directory or Hub id of an STTS checkpoint; `convert` makes one from any Molmo2.",
            show_default="a tiny one, for trying things out",
        ),
    ] = str(BUNDLED_CHECKPOINT),
    prune_ratio: Annotated[
        float | None,
        typer.Option(help="Share of the video's tokens to drop, in [0, 1); the checkpoint's own when not given."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="`scorer`, `cosine`, `random`, `tome` or `none`; the checkpoint's own when not given. `cosine` needs "
            "no trained scorer."
        ),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Most frames to sample; the checkpoint's own when not given.")
    ] = None,
    test_time_scaling: Annotated[
        bool, typer.Option("--test-time-scaling", help="Spend what pruning saves on more frames: n / (1 - ratio).")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="`auto` is the checkpoint's own.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """
    Answer a question about a video.

    Prints the answer and one line of figures: frames, vision tokens before and after pruning, seconds.

        stts-molmo ask clip.mp4 "Which way does the ball move?" --model my/checkpoint --prune-ratio 0.3
    """
    with readable_errors():
        hide_progress_off_terminal()
        result = answer_question(
            video, question, model, prune_ratio, method, num_frames, test_time_scaling, max_new_tokens, device, dtype
        )
    if model == str(BUNDLED_CHECKPOINT):
        typer.echo("The bundled toy model knows only its rendered clips; pass --model for real video.", err=True)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    tokens, seconds = result["vision_tokens"], result["seconds"]
    typer.echo(result["answer"])
    typer.echo(
        f"{result['frames']} frames, vision tokens {tokens['before']} -> {tokens['after']} "
        f"(prune ratio {result['prune_ratio']:g}), seconds: "
        + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    )


@app.command()
def visualize(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="File or URL, of any format that FFmpeg reads.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture (.png) or video (.mp4) to write.")],
    model: Annotated[
        str,
        typer.Option(
            help="Directory or Hub id of an STTS checkpoint.", show_default="a tiny one, for trying things out"
        ),
    ] = str(BUNDLED_CHECKPOINT),
    prune_ratio: Annotated[
        float | None, typer.Option(help="Share of tokens to drop, in [0, 1); the checkpoint's own when not given.")
    ] = None,
    method: Annotated[str, typer.Option(help="`scorer`, `cosine`, `random`, `tome` or `none`.")] = "scorer",
    compare: Annotated[str | None, typer.Option(help="Another method, drawn below the first.")] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Most frames to sample; the checkpoint's own when not given.")
    ] = None,
) -> None:
    """
    Draw what is kept of a video: dropped blocks dimmed, the scores as colours below.

        stts-molmo visualize clip.mp4 -o kept.png --compare cosine
    """
    with readable_errors():
        hide_progress_off_terminal()
        is_picture = output.suffix.lower() == ".png"
        if not is_picture and output.suffix.lower() != ".mp4":
            raise ValueError(f"--output {output} must end in .png or .mp4.")
        if output.is_dir() or output.resolve() == Path(video).resolve():
            raise ValueError(f"--output {output} is a directory or the video itself; name another file.")
        if not output.parent.is_dir():
            raise FileNotFoundError(f"There is no directory {output.parent} for --output {output}; make it first.")
        from .processing_stts_molmo import STTSMolmoProcessor
        from .visualization import save_mp4, save_png
        from .visualization import visualize as draw

        require_stts(model)
        processor = STTSMolmoProcessor.from_pretrained(model)
        methods = (method,) if compare is None else (method, compare)
        images = draw(
            load_model(model, find_device("auto"), "auto"),
            processor,
            video,
            methods,
            prune_ratio,
            num_frames,
            columns=8 if is_picture else 1,
        )
        (save_png if is_picture else save_mp4)(images, output)
    typer.echo(f"Wrote {output}.")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Directory or Hub id of a Molmo2 checkpoint, as allenai/Molmo2-4B.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New directory for the STTS checkpoint.")],
    prune_ratio: Annotated[
        float | None, typer.Option(help="Share of a video's tokens that the new checkpoint drops, in [0, 1).")
    ] = None,
    prune_layer: Annotated[
        int | None, typer.Option(help="ViT layer, counted from 0, after which tokens are scored.")
    ] = None,
    preset: Annotated[
        Literal["default", "paper", "authors"] | None,
        typer.Option(
            help="Details of the method; `authors` is what weights trained by the authors' own code need, and what "
            "they get when this is not given."
        ),
    ] = None,
) -> None:
    """
    Make an STTS checkpoint of a Molmo2 checkpoint.

    The weights are copied, never loaded, so a few GB of memory do for any size. The scorer is new and untrained, unless
    the source holds one that the authors' code trained.

        stts-molmo convert allenai/Molmo2-4B molmo2-4b-stts --prune-ratio 0.3
    """
    with readable_errors():
        from transformers.utils import logging

        from .configuration_stts_molmo import STTSConfig
        from .conversion import convert_checkpoint

        hide_progress_off_terminal()
        logging.set_verbosity_error()  # that the source has no scorer is no news here
        given = {"prune_ratio": prune_ratio, "prune_layer": prune_layer}
        stts_config = {name: value for name, value in given.items() if value is not None}
        if preset is not None:
            make = {"default": STTSConfig, "paper": STTSConfig.paper, "authors": STTSConfig.authors}[preset]
            stts_config = make(**stts_config)
        columns = *Progress.get_default_columns(), DownloadColumn()
        bar = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
        task = bar.add_task("copying weights")

        def show(done: int, total: int) -> None:
            bar.start()  # not before: a download shows bars of its own
            bar.update(task, completed=done, total=total)

        try:
            convert_checkpoint(source, destination, stts_config, progress=show)
        finally:
            bar.stop()
    typer.echo(f"Wrote {destination}. Next: stts-molmo inspect {shlex.quote(str(destination))}")


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Directory or Hub id of an STTS or Molmo2 checkpoint.")
    ],
) -> None:
    """
    Say what a checkpoint is and how many tokens it spends on a video, without loading its weights.

        stts-molmo inspect molmo2-4b-stts
    """
    with readable_errors():
        hide_progress_off_terminal()
        lines = describe_checkpoint(checkpoint)
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")


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
    import torch

    from .configuration_stts_molmo import validate_method, validate_prune_ratio
    from .modeling_stts_molmo import num_kept_tokens
    from .processing_stts_molmo import STTSMolmoProcessor

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


def require_stts(checkpoint: str) -> "STTSMolmoConfig":
    """The configuration of an STTS checkpoint; a `ValueError` that says how to make one of a plain Molmo2."""
    config = read_config(checkpoint)
    if config.model_type == "molmo2":
        raise ValueError(
            f"{checkpoint} is a plain Molmo2 checkpoint without a token scorer; make an STTS checkpoint of it with "
            f"`stts-molmo convert {checkpoint} DST`, then pass `--model DST`."
        )
    return config


def find_device(name: str) -> "torch.device":
    """The device called `name`; `auto` is a GPU if there is one. Raises a `ValueError` where it does not exist."""
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises one or the other, by build
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); use `cpu`, or leave it out.") from error


def load_model(checkpoint: str, device: "torch.device", dtype: str) -> "STTSMolmoForConditionalGeneration":
    """
    Load a checkpoint for inference.

    Raises:
        ValueError: weights are missing or damaged; Transformers would warn and go on with random ones.
    """
    from safetensors import SafetensorError

    from .modeling_stts_molmo import STTSMolmoForConditionalGeneration

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


def read_config(checkpoint: str) -> "Molmo2Config | STTSMolmoConfig":
    """
    The configuration of a Molmo2 or STTS checkpoint, local or on the Hub; no weights are read.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is one of another model, or its `config.json` is invalid.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Molmo2Config

    from .configuration_stts_molmo import STTSMolmoConfig

    if checkpoint.startswith((".", "/", "~")) and not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"There is no directory {checkpoint}; check the path.")
    try:
        values, _ = STTSMolmoConfig.get_config_dict(checkpoint)
    except OSError as error:
        raise FileNotFoundError(
            f"{checkpoint} is no directory here that holds a checkpoint, and cannot be read from the Hub: {error}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"The config.json of {checkpoint} is no JSON object; fetch it again.")
    model_type = values.get("model_type")
    config_class = {"stts_molmo": STTSMolmoConfig, "molmo2": Molmo2Config}.get(model_type)
    if config_class is None:
        raise ValueError(f"{checkpoint} has model_type={model_type!r}; expected 'stts_molmo' or 'molmo2'.")
    try:
        return config_class.from_dict(values)
    except StrictDataclassError as error:
        raise ValueError(f"The config.json of {checkpoint} is invalid: {error}") from error


def read_tensor_shapes(checkpoint: str) -> dict[str, list[int]]:
    """
    Names and shapes of all tensors of a checkpoint, local or on the Hub, from the headers of its weight files.

    Raises:
        ValueError: there are no readable safetensors files.
    """
    from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    read = get_local_safetensors_metadata if Path(checkpoint).is_dir() else get_safetensors_metadata
    try:
        metadata = read(checkpoint)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(f"{checkpoint} has no weights in readable safetensors files: {error}") from error
    return {name: info.shape for file in metadata.files_metadata.values() for name, info in file.tensors.items()}


def describe_checkpoint(checkpoint: str) -> dict[str, str]:
    """
    What `inspect` prints: a heading and its text for each line.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is neither an STTS nor a Molmo2 checkpoint, or its weights are damaged.
    """
    from .configuration_stts_molmo import STTSConfig
    from .modeling_stts_molmo import num_kept_tokens

    config = read_config(checkpoint)
    is_stts = config.model_type == "stts_molmo"
    vision, stts = config.vision_config, config.stts_config if is_stts else STTSConfig(method="none")
    sizes = {name: math.prod(shape) for name, shape in read_tensor_shapes(checkpoint).items()}
    scorer = sum(size for name, size in sizes.items() if "token_scorer." in name)
    dtype = f" ({str(config.dtype).removeprefix('torch.')})" if config.dtype else ""
    lines = {
        "checkpoint": checkpoint,
        "kind": "STTS on Molmo2" if is_stts else f"plain Molmo2; for STTS: stts-molmo convert {checkpoint} DST",
        "parameters": f"{sum(sizes.values()):,}{dtype}",
        "scorer": f"{scorer:,} parameters" if scorer else "none",
    }
    if is_stts:
        lines["method"] = f"{stts.method}, after ViT layer {stts.prune_layer} of {vision.num_hidden_layers}"
        lines["prune ratio"] = f"{stts.prune_ratio:g}"
    tokens_per_frame = math.prod(math.ceil(side // vision.patch_size / stts.pooling_size) for side in vision.image_size)
    ratio = 0 if stts.method == "none" else stts.prune_ratio
    lines["frames"] = format_row(FRAME_COUNTS)
    lines["vision tokens"] = format_row(frames * tokens_per_frame for frames in FRAME_COUNTS)
    lines["after pruning"] = format_row(num_kept_tokens(frames, tokens_per_frame, ratio) for frames in FRAME_COUNTS)
    return lines


def format_row(numbers: Iterable[int]) -> str:
    return "".join(f"{number:>8}" for number in numbers)
