"""Command line of stts-molmo: ask a question about a video, convert a checkpoint, look into one."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import DownloadColumn, Progress

from .console import hide_progress_off_terminal, stderr

# torch and transformers are imported where they are used: `--help` answers at once.
BUNDLED_CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "stts-molmo-tiny"

app = typer.Typer(
    help="Ask questions about videos with Molmo2, with the redundant part of the video's tokens pruned (STTS).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the program with exit code 2 and one message on stderr for errors that the user can mend."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


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
        from .answer import answer_question

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
        from ..processing_stts_molmo import STTSMolmoProcessor
        from .answer import find_device, load_model
        from .checkpoint import require_stts
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

        from ..configuration_stts_molmo import STTSConfig
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
        from .checkpoint import describe_checkpoint

        hide_progress_off_terminal()
        lines = describe_checkpoint(checkpoint)
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")
