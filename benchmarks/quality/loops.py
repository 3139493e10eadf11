"""What a step of the study's rows costs in their own loop, and through the Trainer and collator of a fine-tuning.

    python -m benchmarks.quality.loops benchmarks/quality/baseline --output benchmarks/results/quality_loops.json

The loop draws its clips and keeps them for the next row; the collator reads and tokenizes files, which are written
before. Both train the same model on as many clips and questions, in the same parameter groups.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from stts_molmo.configuration_stts_molmo import STTSConfig
from stts_molmo.tools.files import written_whole
from stts_molmo.tools.training import VideoQACollator, parameter_groups
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from ..common import provenance, torch_threads
from .batches import conversation
from .scenes import FIRST_SEED
from .study import NUM_FRAMES, prepare, training_batch
from .worlds import MIXTURE, film_file, film_questions, make_film

WARMUP = 3  # steps that are not timed


class StepTimes(TrainerCallback):
    """CPU seconds at the end of each step."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.process_time())


def seconds_a_step(times: list[float]) -> float:
    return round((times[-1] - times[WARMUP - 1]) / (len(times) - WARMUP), 3)


def chat_about(file: Path, seed: int, world: str) -> list[dict]:
    """All questions about a clip, as a row of a data set."""
    chat = conversation(film_questions(make_film(seed, world, beats=NUM_FRAMES)))
    chat[0]["content"][0]["path"] = str(file)
    for answer in chat[1::2]:
        answer["content"] = [{"type": "text", "text": answer["content"]}]
    return chat


def time_loop(baseline: str, steps: int, batch_size: int) -> dict[str, float]:
    """Without and with the drawing of clips, which the rows of a seed share."""
    model, processor = prepare(baseline, STTSConfig(prune_layer=1, prune_ratio=0.5), 0)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    drawn, trained = [], []
    for step in range(steps):
        began = time.process_time()
        batch = training_batch(processor, 0, step, batch_size, NUM_FRAMES, worlds=MIXTURE)
        drawn.append(time.process_time() - began)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trained.append(time.process_time())
    drawing = sum(drawn[WARMUP:]) / (steps - WARMUP)
    return {"loop": seconds_a_step(trained), "loop, clips drawn before": round(seconds_a_step(trained) - drawing, 3)}


def time_trainer(baseline: str, steps: int, batch_size: int, folder: Path) -> dict[str, float]:
    """With the reading of files, and what it takes to write these."""
    model, processor = prepare(baseline, STTSConfig(prune_layer=1, prune_ratio=0.5), 0)
    began, chats = time.process_time(), []
    for seed in range(FIRST_SEED["train"], FIRST_SEED["train"] + steps * batch_size):
        world = MIXTURE[seed % len(MIXTURE)]
        chats.append(chat_about(film_file(folder, seed, world, NUM_FRAMES), seed, world))
    writing = (time.process_time() - began) / steps
    times = StepTimes()
    settings = {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder / "out"), max_steps=steps, per_device_train_batch_size=batch_size, use_cpu=True, **settings
        ),
        train_dataset=Dataset.from_dict({"messages": chats}),
        data_collator=VideoQACollator(processor),
        optimizers=(torch.optim.AdamW(parameter_groups(model)), None),
        callbacks=[times],
    )
    trainer.train()
    return {"trainer": seconds_a_step(times.times), "writing the clips of a step": round(writing, 3)}


@torch_threads(1)
def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    disable_progress_bar()
    sizes = (args.steps, args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        seconds = time_loop(args.baseline, *sizes) | time_trainer(args.baseline, *sizes, Path(folder))
    settings = {"seed": 0, "steps": args.steps, "batch_size": args.batch_size}
    with written_whole(args.output) as draft:
        draft.write_text(json.dumps({**provenance(), **settings, "cpu_seconds_a_step": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
