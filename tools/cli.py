"""Command line of stts-molmo: ask a question about a video, convert a checkpoint, publish and look into one."""

import dataclasses
import importlib.metadata
import json
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import DownloadColumn, Progress

from .console import hide_progress_off_terminal, spinner, stderr

# torch and transformers are imported where they are used: `--help` answers at once.
BUNDLED_CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "stts-molmo-tiny"

app = typer.Typer(
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


@contextmanager
def libraries() -> Iterator[None]:
    """Around the imports of torch and transformers, which take seconds."""
    with spinner("loading libraries"):
        yield
        hide_progress_off_terminal()


def run() -> None:
    """Run the command line; SIGTERM ends it as Ctrl-C does, so that nothing half-written stays."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="stts-molmo")


# What `ask` and `visualize` share.
Video = Annotated[str, typer.Argument(metavar="VIDEO", help="File or URL, of any format that FFmpeg reads.")]
Model = Annotated[
    str,
    typer.Option(
        help="Directory or Hub id of an STTS checkpoint; `convert` makes one from any Molmo2.",
        show_default="a tiny one, for trying things out",
    ),
]
PruneRatio = Annotated[
    float | None,
    typer.Option(help="Share of the video's tokens to drop, in [0, 1); the checkpoint's own when not given."),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="`scorer`, `cosine`, `random`, `tome` or `none`; the checkpoint's own when not given. `cosine` needs "
        "no trained scorer."
    ),
]
MaxVisionTokens = Annotated[
    int | None, typer.Option(min=1, help="The most tokens of the video to keep, in place of a ratio.")
]
NumFrames = Annotated[
    int | None, typer.Option(min=1, help="Most frames to sample; the checkpoint's own when not given.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="`auto` is the checkpoint's own.")
]


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("stts-molmo"))
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ask questions about videos with Molmo2, with the redundant part of the video's tokens pruned (STTS)."""


@app.command()
def ask(
    video: Video,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
    model: Model = str(BUNDLED_CHECKPOINT),
    prune_ratio: PruneRatio = None,
    max_vision_tokens: MaxVisionTokens = None,
    method: Method = None,
    num_frames: NumFrames = None,
    test_time_scaling: Annotated[
        bool,
        typer.Option(
            "--test-time-scaling",
            help="Spend what pruning saves on more frames: n / (1 - ratio), or as many as fill --max-vision-tokens.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Let a scorer choose that was never trained.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """
    Answer a question about a video.

    Prints the answer and one line of figures: frames, vision tokens before and after pruning, seconds.

        stts-molmo ask clip.mp4 "Which way does the ball move?" --model my/checkpoint --prune-ratio 0.3
    """
    with readable_errors():
        with libraries():
            from .answer import answer_question
            from .checkpoint import Checkpoint
        result = answer_question(
            Checkpoint(model, device, dtype),
            video,
            question,
            prune_ratio=prune_ratio,
            max_vision_tokens=max_vision_tokens,
            method=method,
            num_frames=num_frames,
            test_time_scaling=test_time_scaling,
            max_new_tokens=max_new_tokens,
            allow_untrained=allow_untrained,
        )
    if model == str(BUNDLED_CHECKPOINT):
        typer.echo("The bundled toy model knows only its rendered clips; pass --model for real video.", err=True)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
        return
    typer.echo(result.answer)
    typer.echo(result.figures())


@app.command()
def visualize(
    video: Video,
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture (.png) or video (.mp4) to write.")],
    model: Model = str(BUNDLED_CHECKPOINT),
    prune_ratio: PruneRatio = None,
    max_vision_tokens: MaxVisionTokens = None,
    method: Method = None,
    compare: Annotated[str | None, typer.Option(help="Another method, drawn below the first.")] = None,
    num_frames: NumFrames = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Draw what is kept of a video: dropped blocks dimmed, the scores as colours below.

        stts-molmo visualize clip.mp4 -o kept.png --compare cosine
    """
    with readable_errors():
        is_picture = output.suffix.lower() == ".png"
        if not is_picture and output.suffix.lower() != ".mp4":
            raise ValueError(f"--output {output} must end in .png or .mp4.")
        if output.is_dir() or output.resolve() == Path(video).resolve():
            raise ValueError(f"--output {output} is a directory or the video itself; name another file.")
        if not output.parent.is_dir():
            raise FileNotFoundError(f"There is no directory {output.parent} for --output {output}; make it first.")
        with libraries():
            from .checkpoint import TRAIN_OR_COSINE, Checkpoint
            from .visualization import save_mp4, save_png
            from .visualization import visualize as draw

        checkpoint = Checkpoint(model, device, dtype)
        pruning = checkpoint.config.stts_config.pruning(prune_ratio, method, max_vision_tokens)
        methods = [pruning.method, *([compare] if compare else [])]
        if "scorer" in methods and checkpoint.model.has_untrained_scorer():
            typer.echo(f"The token scorer of {model} is not trained: its choice is random. {TRAIN_OR_COSINE}", err=True)
        columns = 8 if is_picture else 1
        images = draw(
            checkpoint.model,
            checkpoint.processor,
            video,
            methods,
            prune_ratio,
            num_frames,
            columns,
            max_vision_tokens=max_vision_tokens,
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
    max_vision_tokens: MaxVisionTokens = None,
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
        with libraries():
            from transformers.utils import logging

            from ..configuration_stts_molmo import STTSConfig
            from .checkpoint import TRAIN_OR_COSINE, has_untrained_scorer
            from .conversion import convert_checkpoint

        logging.set_verbosity_error()  # that the source has no scorer is no news here
        given = {"prune_ratio": prune_ratio, "max_vision_tokens": max_vision_tokens, "prune_layer": prune_layer}
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
        is_untrained = has_untrained_scorer(destination)
    if is_untrained:
        typer.echo(f"Its token scorer is new and not trained. {TRAIN_OR_COSINE}")
    typer.echo(f"Wrote {destination}. Next: stts-molmo inspect {shlex.quote(str(destination))}")


@app.command()
def publish(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory of an STTS checkpoint.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Hub repository, as me/molmo2-4b-stts; made if it is not there.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that you alone see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.", show_default="main")] = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON file of what was measured, as `stts-molmo eval` writes it, for the card.")
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Publish a scorer that was never trained.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, write its card, and upload nothing.")] = False,
) -> None:
    """
    Put a checkpoint on the Hub, in one commit: code, weights, processor, tokenizer and model card.

    It is loaded first as others will load it, with `trust_remote_code` and nothing of ours installed. A card that you
    wrote yourself stays; else one is written from the checkpoint. Log in with `hf auth login` before.

        stts-molmo publish molmo2-4b-stts me/molmo2-4b-stts --private
    """
    with readable_errors():
        with libraries():
            from .publishing import publish_checkpoint

        files, address = publish_checkpoint(
            checkpoint,
            repo_id,
            private=private,
            revision=revision,
            results=results,
            allow_untrained=allow_untrained,
            dry_run=dry_run,
        )
        sizes = {file.name: file.stat().st_size for file in files}
    width = max(map(len, sizes))
    for name, size in sizes.items():
        typer.echo(f"{name:<{width}} {size:>15,} bytes")
    typer.echo(
        f"Published {address}." if address else f"Not published: --dry-run. Its card is {checkpoint / 'README.md'}."
    )


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Directory or Hub id of an STTS or Molmo2 checkpoint.")
    ],
    plan: Annotated[
        str | None, typer.Option(help="What training takes instead: on `8xh100`, `h100` or `24gb`, a 24 GB card.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Of each video, with --plan.")] = 64,
    prune_ratio: Annotated[float | None, typer.Option(help="With --plan; the checkpoint's own when not given.")] = None,
) -> None:
    """
    Say what a checkpoint is and how many tokens it spends on a video, without loading its weights.

        stts-molmo inspect molmo2-4b-stts

        stts-molmo inspect molmo2-4b-stts --plan h100 --frames 128
    """
    with readable_errors():
        with libraries():
            from .checkpoint import describe_checkpoint
            from .planning import plan_checkpoint

        lines = plan_checkpoint(checkpoint, plan, frames, prune_ratio) if plan else describe_checkpoint(checkpoint)
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")
