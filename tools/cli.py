"""Command line of stts-molmo: ask about videos, evaluate, convert a checkpoint, publish and look into one."""

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
from rich.progress import DownloadColumn, Progress, TextColumn

from .console import format_table, hide_progress_off_terminal, spinner, stderr

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


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of what only an extra of this package installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; pip install 'stts-molmo[{name}]' brings it.") from error


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
# What `serve` and `demo` share.
LOCALHOST = "127.0.0.1"
AllowPrivateHosts = Annotated[
    bool, typer.Option("--allow-private-hosts", help="Fetch links to machines that the internet does not reach.")
]
AllowUntrained = Annotated[bool, typer.Option("--allow-untrained", help="Let a scorer choose that was never trained.")]
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")]
MaxMegabytes = Annotated[int, typer.Option(min=1, help="Largest video, in MiB.")]
MaxVideoSeconds = Annotated[float, typer.Option(min=0, help="Longest video, in seconds.")]
MaxFrameSize = Annotated[int, typer.Option(min=1, help="Most pixels that a video may be wide or high.")]
MaxFrames = Annotated[int, typer.Option(min=1, help="Most frames of a video that may be asked for.")]
MaxSeconds = Annotated[float, typer.Option(min=0, help="Most seconds from a question to the end of its answer.")]
MaxRequests = Annotated[int, typer.Option(min=1, help="Most questions at a time, those that wait among them.")]


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
    video: Annotated[
        str, typer.Argument(metavar="VIDEO", help="File or URL, of any format that FFmpeg reads, or a folder of files.")
    ],
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="What you want to know; without one it is a conversation."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help='File of questions, one a line, or of JSON objects, {"question": "..."}.')
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Table for the answers, .jsonl or .parquet. What it has already is not asked again."
        ),
    ] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object an answer and nothing else.")] = False,
) -> None:
    """
    Answer questions about a video, or about each video of a folder.

    Prints the answer and one line of figures: frames, vision tokens before and after pruning, seconds.

        stts-molmo ask clip.mp4 "Which way does the ball move?" --model my/checkpoint --prune-ratio 0.3

    Without a question it takes one a line, each understood with those before it:

        stts-molmo ask clip.mp4 --model my/checkpoint

    Of many videos it makes a table, which it takes up again where it was ended:

        stts-molmo ask clips "Which way does the ball move?" -o answers.parquet --model my/checkpoint
    """
    with readable_errors():
        check_roads(video, question, questions, output, as_json)
        with libraries():
            from transformers import TextStreamer

            from .answer import WatchedVideo, ask_about
            from .checkpoint import Checkpoint
            from .conversation import Conversation, typed_questions
            from .corpus import answer_corpus, find_videos, read_questions

        known = read_questions(questions) if questions else [question] if question is not None else []
        for asked in known:
            ask_about(asked)
        options = {
            "prune_ratio": prune_ratio,
            "max_vision_tokens": max_vision_tokens,
            "method": method,
            "num_frames": num_frames,
            "test_time_scaling": test_time_scaling,
            "allow_untrained": allow_untrained,
        }
        checkpoint = Checkpoint(model, device, dtype)
        if output:
            videos = find_videos(Path(video)) if Path(video).is_dir() else {video: video}
            rows = answer_corpus(checkpoint, videos, known, output, max_new_tokens=max_new_tokens, **options)
            warn_of_toy(model)
            num_failed = sum(row["error"] is not None for row in rows)
            typer.echo(f"Wrote {output}: {len(rows) - num_failed} answers, and {num_failed} errors in their place.")
            return
        watched = WatchedVideo(checkpoint, video, **options)
        warn_of_toy(model)
        streams = not known and not as_json
        streamer = TextStreamer(checkpoint.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = watched.answer if known else Conversation(watched).ask
        for number, asked in enumerate(known or typed_questions()):
            result = answer(asked, max_new_tokens=max_new_tokens, streamer=streamer if streams else None)
            if as_json:
                named = {"question": asked} if question is None else {}
                typer.echo(json.dumps(named | dataclasses.asdict(result), ensure_ascii=False))
            elif not streams:
                typer.echo(f"> {asked}\n{result.answer}" if question is None else result.answer)
            if number == 0 and not as_json:
                typer.echo(result.figures(), err=question is None)


def warn_of_toy(model: str) -> None:
    if model == str(BUNDLED_CHECKPOINT):
        typer.echo("The bundled toy model knows only its rendered clips; pass --model for real video.", err=True)


def check_roads(video: str, question: str | None, questions: Path | None, output: Path | None, as_json: bool) -> None:
    """Raise a `ValueError` where what was passed to `ask` does not go together."""
    if question is not None and questions is not None:
        raise ValueError(f"QUESTION {question!r} and --questions {questions} exclude each other; pass one of them.")
    if Path(video).is_dir() and output is None:
        raise ValueError(f"{video} is a directory; name a table for the answers, as -o answers.jsonl.")
    if output is not None and question is None and questions is None:
        raise ValueError(f"--output {output} takes questions that are known before; pass QUESTION or --questions.")
    if output is not None and as_json:
        raise ValueError(f"--json prints answers and --output {output} does not; pass one of them.")


@app.command()
def visualize(
    video: Video,
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture (.png) or video (.mp4) to write.")],
    model: Model = str(BUNDLED_CHECKPOINT),
    prune_ratio: PruneRatio = None,
    max_vision_tokens: MaxVisionTokens = None,
    method: Method = None,
    compare: Annotated[str | None, typer.Option(help="Another method, drawn below the first.")] = None,
    question: Annotated[
        str | None,
        typer.Option(help="Say how it is answered with all tokens, and with what is drawn: several ratios, or yours."),
    ] = None,
    num_frames: NumFrames = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Draw what is kept of a video: dropped blocks dimmed, the scores as colours below.

        stts-molmo visualize clip.mp4 -o kept.png --compare cosine

        stts-molmo visualize clip.mp4 -o why.png --question "Which way does the ball move?"
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
            from .why import RATIOS, see_why

        checkpoint = Checkpoint(model, device, dtype)
        pruning = checkpoint.find_pruning(prune_ratio, method, max_vision_tokens)
        found = checkpoint.config.stts_config.pruning(**pruning)
        methods = [found.method, *([compare] if compare else [])]
        if "scorer" in methods and checkpoint.model.has_untrained_scorer():
            typer.echo(f"The token scorer of {model} is not trained: its choice is random. {TRAIN_OR_COSINE}", err=True)
        columns = 8 if is_picture else 1
        if question is None:
            loaded = checkpoint.model, checkpoint.processor
            limits = pruning["prune_ratio"], num_frames, columns, pruning["max_vision_tokens"]
            images = draw(*loaded, video, methods, *limits)
        else:
            given = {"prune_ratio": prune_ratio, "max_vision_tokens": max_vision_tokens}
            limits = RATIOS if prune_ratio is max_vision_tokens is None else [given]
            prunings = [{**limit, "method": name} for name in methods for limit in limits]
            options = {"num_frames": num_frames, "columns": columns, "allow_untrained": True}
            seen = see_why(checkpoint, video, question, prunings, **options)
            typer.echo(seen)
            images = seen.images
        (save_png if is_picture else save_mp4)(images, output)
    typer.echo(f"Wrote {output}.")


# What `eval` and `benchmark` share.
Evaluated = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Directory or Hub id of an STTS checkpoint.")]
PruneRatios = Annotated[
    list[float] | None, typer.Option("--prune-ratio", help="Share to drop, in [0, 1); give it several times.")
]
Methods = Annotated[list[str] | None, typer.Option("--method", help="As in `ask`; give it several times.")]
Budgets = Annotated[
    list[int] | None,
    typer.Option("--max-vision-tokens", min=1, help="Most tokens of a video, beside ratios; give it several times."),
]
FrameCounts = Annotated[
    list[int] | None, typer.Option("--num-frames", min=1, help="Most frames to sample; give it several times.")
]


def check_output(output: Path) -> None:
    if not output.parent.is_dir() or output.is_dir():
        raise ValueError(f"--output {output} must be a file in a directory that is there; make it first.")


@app.command("eval")
def evaluate_rows(
    checkpoint: Evaluated,
    rows: Annotated[
        Path,
        typer.Argument(metavar="ROWS", help="JSON Lines, JSON, CSV or Parquet: video, question, answer, options."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")] = Path("evaluation.json"),
    prune_ratio: PruneRatios = None,
    method: Methods = None,
    max_vision_tokens: Budgets = None,
    num_frames: FrameCounts = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Let a scorer choose that was never trained.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Ask the questions of a file at every ratio or budget, with every method and number of frames; count right answers.

    Prints a table and writes it to --output with every answer; a run that was killed goes on where it stopped. On many
    GPUs: `accelerate launch --num_processes 8 -m stts_molmo eval ...`. How answers are read, and what the intervals
    are: docs/evaluation.md.

        stts-molmo eval molmo2-4b-stts questions.jsonl --prune-ratio 0 --prune-ratio 0.5 --method scorer --method random
    """
    with readable_errors():
        check_output(output)
        with libraries():
            from .checkpoint import Checkpoint
            from .evaluation import describe_row, evaluate, join_processes, plan_settings

        loaded = Checkpoint(checkpoint, join_processes(device), dtype)
        settings = plan_settings(loaded, num_frames, prune_ratio, method, max_vision_tokens)
        result = evaluate(
            loaded, rows, settings, output, max_new_tokens=max_new_tokens, allow_untrained=allow_untrained
        )
    if result is None:
        return  # the first process tells
    typer.echo(format_table([describe_row(row) for row in result["rows"]]))
    typer.echo("\nSeconds a question, in the same order:")
    typer.echo(format_table([{name: f"{value:.3f}" for name, value in row.items()} for row in result["seconds"]]))
    if failed := max(row["failed"] for row in result["rows"]):
        typer.echo(f"{failed} of {len(result['answers'])} questions failed; {output} says why.", err=True)
    typer.echo(f"Wrote {output}.")


@app.command()
def benchmark(
    checkpoint: Evaluated,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")] = Path("benchmarks.json"),
    only: Annotated[
        list[str] | None, typer.Option(help="A benchmark, as MLVU; give it several times.", show_default="all 13")
    ] = None,
    prune_ratio: PruneRatios = None,
    method: Methods = None,
    max_vision_tokens: Budgets = None,
    num_frames: FrameCounts = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, to try it out.")] = None,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Let a scorer choose that was never trained.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Score a checkpoint in the paper's 13 benchmarks with lmms-eval, and print the paper's Table 1 with its row.

    Needs `pip install 'stts-molmo[eval]'`. The data sets are downloaded, hundreds of GB together. A run that was killed
    goes on after the last benchmark that it finished.

        stts-molmo benchmark molmo2-4b-stts --prune-ratio 0 --prune-ratio 0.5
    """
    with readable_errors():
        check_output(output)
        with libraries():
            from .checkpoint import Checkpoint
            from .evaluation import join_processes, plan_settings
            from .lmms.benchmarks import describe_row, run_benchmarks

        loaded = Checkpoint(checkpoint, join_processes(device), dtype)
        settings = plan_settings(loaded, num_frames, prune_ratio, method, max_vision_tokens)
        result = run_benchmarks(loaded, settings, output, only or (), limit=limit, allow_untrained=allow_untrained)
    if result is None:
        return  # the first process tells
    typer.echo(format_table([describe_row(row) for row in result["rows"]]))
    typer.echo("Averages are over the columns that every row of this checkpoint has.")
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


@app.command("warm-up")
def warm_up(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Directory or Hub id of an STTS checkpoint, as of `convert`."),
    ],
    clips: Annotated[Path, typer.Argument(metavar="CLIPS", help="A video, or a folder with videos; no labels needed.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="New directory.", show_default="CHECKPOINT's name with -warm")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Each on --clips-a-step clips.")] = 200,
    clips_a_step: Annotated[int, typer.Option(min=1)] = 4,
    num_frames: NumFrames = None,
    learning_rate: Annotated[float, typer.Option(help="Of the scorer, the only part that learns.")] = 1e-3,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Teach a new scorer what similarity knows, on clips without labels; nothing else of the checkpoint changes.

    Only the ViT's first layers run. It is a start for fine-tuning: what matters in a video, the scorer learns there.

        stts-molmo warm-up molmo2-4b-stts my/clips --output molmo2-4b-stts-warm
    """
    output = output or Path(Path(checkpoint).name + "-warm")
    with readable_errors():
        with libraries():
            from .warm_up import warm_up_checkpoint
        columns = *Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4f}")
        with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
            task = bar.add_task("warming up", total=steps, loss=float("nan"))
            losses: list[float] = []

            def show(done: int, loss: float) -> None:
                losses.append(loss)
                bar.update(task, completed=done, loss=loss)

            options = {"num_frames": num_frames, "learning_rate": learning_rate, "device": device, "dtype": dtype}
            warm_up_checkpoint(
                checkpoint, clips, output, steps=steps, clips_a_step=clips_a_step, progress=show, **options
            )
    tenth = max(1, steps // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    typer.echo(f"Auxiliary loss {first:.4f} -> {last:.4f}.")
    typer.echo(f"Wrote {output}. Next: stts-molmo visualize VIDEO -o kept.png --model {shlex.quote(str(output))}")


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


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Directory or Hub id of an STTS checkpoint.")],
    host: Host = LOCALHOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 is any free one.")] = 8000,
    allow_local: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder in which requests may name files; none when not given."
        ),
    ] = None,
    allow_private_hosts: AllowPrivateHosts = False,
    max_mb: MaxMegabytes = 64,
    max_video_seconds: MaxVideoSeconds = 3600,
    max_frame_size: MaxFrameSize = 4096,
    max_frames: MaxFrames = 128,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for, in tokens.")] = 1024,
    max_seconds: MaxSeconds = 300,
    max_requests: MaxRequests = 16,
    allow_untrained: AllowUntrained = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Answer questions over HTTP, by OpenAI's API, one at a time. Needs the extra `serve`.

        stts-molmo serve my/checkpoint --allow-local videos --port 8000
    """
    with readable_errors():
        with libraries():
            from .checkpoint import Checkpoint

            with extra("serve"):
                from .serving import Server, run
            from .streaming import Answerer, Limits
        limits = Limits(
            max_bytes=max_mb * 2**20,
            max_video_seconds=max_video_seconds,
            max_frame_size=max_frame_size,
            max_frames=max_frames,
            max_new_tokens=max_new_tokens,
            max_seconds=max_seconds,
            max_requests=max_requests,
        )
        answerer = Answerer(Checkpoint(checkpoint, device, dtype), limits, allow_private_hosts, allow_untrained)
        name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
        run(Server(answerer, name, allow_local), host, port, lambda url: typer.echo(f"Serving {name} at {url}."))


@app.command()
def demo(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="Directory or Hub id of an STTS checkpoint.",
            show_default="a tiny one, for trying things out",
        ),
    ] = str(BUNDLED_CHECKPOINT),
    host: Host = LOCALHOST,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    max_mb: MaxMegabytes = 64,
    max_video_seconds: MaxVideoSeconds = 600,
    max_frame_size: MaxFrameSize = 4096,
    max_frames: MaxFrames = 128,
    max_seconds: MaxSeconds = 300,
    max_requests: MaxRequests = 16,
    allow_untrained: AllowUntrained = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Open a page to ask about a clip, and to see what was kept of it. Needs the extra `demo`.

        stts-molmo demo my/checkpoint
    """
    with readable_errors():
        with libraries():
            with extra("demo"):
                from .demo import build, bundled_clips, launch
            from .checkpoint import Checkpoint
            from .streaming import Answerer, Limits

        limits = Limits(
            max_bytes=max_mb * 2**20,
            max_video_seconds=max_video_seconds,
            max_frame_size=max_frame_size,
            max_frames=max_frames,
            max_seconds=max_seconds,
            max_requests=max_requests,
        )
        answerer = Answerer(Checkpoint(checkpoint, device, dtype), limits, allow_untrained=allow_untrained)
        launch(build(answerer, bundled_clips()), answerer, host, port)
