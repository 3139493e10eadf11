"""
A folder of videos to a table of answers, by several workers with Ray Data, on one machine or on many:

    python examples/corpus_ray.py clips "What happens?" -o answers.parquet --model molmo2-4b-stts --workers 8

It is the table of `stts-molmo ask clips "What happens?" -o answers.parquet`, and either takes up what the other began.
Each worker has a GPU to itself if the cluster has any, and reads the videos by the same paths.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import ray
import typer
from stts_molmo.tools.answer import MAX_NEW_TOKENS, require_usable
from stts_molmo.tools.checkpoint import Checkpoint, require_stts
from stts_molmo.tools.cli import (
    BUNDLED_CHECKPOINT,
    MaxVisionTokens,
    Method,
    Model,
    NumFrames,
    PruneRatio,
    readable_errors,
)
from stts_molmo.tools.corpus import Task, answer_video, describe_options, find_videos, grow_table


class Worker:
    """Has a checkpoint to itself, loaded once, and answers one task after the other."""

    def __init__(self, model: str, options: dict):
        self.checkpoint, self.options = Checkpoint(model), options
        require_usable(self.checkpoint, **options)

    def __call__(self, task: dict) -> list[dict]:
        # Rows travel as text: Ray would guess types for columns that are all null.
        rows = answer_video(self.checkpoint, Task(**json.loads(task["task"])), **self.options)
        return [{"row": json.dumps(row)} for row in rows]


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of videos.")],
    question: Annotated[str, typer.Argument(help="What you want to know of each.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Table for the answers, .jsonl or .parquet.")],
    model: Model = str(BUNDLED_CHECKPOINT),
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a model.")] = 2,
    prune_ratio: PruneRatio = None,
    max_vision_tokens: MaxVisionTokens = None,
    method: Method = None,
    num_frames: NumFrames = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = MAX_NEW_TOKENS,
) -> None:
    options = {
        "prune_ratio": prune_ratio,
        "max_vision_tokens": max_vision_tokens,
        "method": method,
        "num_frames": num_frames,
        "max_new_tokens": max_new_tokens,
    }

    def answer(tasks: list[Task]) -> Iterator[dict]:
        if not tasks:
            return
        ray.init(ignore_reinit_error=True)
        gpu = 1 if ray.cluster_resources().get("GPU") else 0
        pool = {"compute": ray.data.ActorPoolStrategy(size=workers), "num_cpus": 0.5, "num_gpus": gpu}
        items = [{"task": json.dumps(task._asdict())} for task in tasks]
        # Small blocks: what a block holds is done again if the run ends before it is complete.
        dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 1000))
        answered = dataset.flat_map(Worker, fn_constructor_args=[model, options], **pool)
        for item in answered.iter_rows():
            yield json.loads(item["row"])

    with readable_errors():
        require_stts(model)
        rows = grow_table(output, find_videos(folder), [question], describe_options(model, **options), answer)
    typer.echo(f"Wrote {output}: {len(rows)} rows.")


if __name__ == "__main__":
    typer.run(main)
