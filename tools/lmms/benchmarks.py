"""The paper's thirteen benchmarks by lmms-eval, and its Table 1 with a row of ours in it."""

import json
import math
from argparse import Namespace
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from ..checkpoint import Checkpoint
from ..evaluation import Setting, fingerprint, write_json
from .model import STTSMolmo

TASKS = Path(__file__).parent / "tasks"


class Benchmark(NamedTuple):
    """A column of Table 1: a task of lmms-eval, or a group of which the mean counts, and which of its metrics."""

    task: str
    metric: str
    scale: float = 100  # lmms-eval's own are shares, or per cent already


BENCHMARKS = {
    "NextQA": Benchmark("nextqa_mc_test", "exact_match"),
    "PerceptionTest": Benchmark("perceptiontest_test_mc", "submission"),  # a file for its server, and no score
    "MVBench": Benchmark("mvbench", "mvbench_accuracy", 1),
    "Tomato": Benchmark("tomato", "tomato_score"),
    "MotionBench": Benchmark("motionbench_full", "motionbench_acc"),
    "TempCompass": Benchmark("tempcompass_multi_choice", "avg_accuracy", 1),
    "VideoMME": Benchmark("videomme", "videomme_perception_score", 1),
    "VideoMME-Sub": Benchmark("videomme_w_subtitle", "videomme_perception_score", 1),
    "LongVideo": Benchmark("longvideobench_val_v", "lvb_acc"),
    "LongVideo-Sub": Benchmark("longvideobench_val_v_subtitles", "lvb_acc"),
    "MLVU": Benchmark("mlvu_dev", "mlvu_percetion_score", 1),
    "LVBench": Benchmark("lvbench", "lvbench_score"),
    "VideoEvalPro": Benchmark("videoevalpro_mcq", "videoevalpro_mcq_score"),
}
SHORT = tuple(BENCHMARKS)[:6]
LONG = tuple(BENCHMARKS)[6:]

# Table 1, in the order of the columns; its averages are computed from these.
PAPER = {
    "Qwen3-VL-4B": (81.4, 70.7, 68.9, 31.8, 58.6, 70.8, 69.3, 74.0, 62.8, None, 58.4, 56.2, 49.8),
    "PLM-8B": (84.1, 82.7, 77.1, 33.2, 61.4, 72.7, 58.3, 65.4, 56.9, None, 52.6, 44.5, 47.2),
    "InternVL3.5-8B": (81.7, 72.7, 72.1, 24.6, 56.6, 70.3, 66.0, 68.6, 62.1, None, 53.2, 43.4, 48.1),
    "Baseline": (83.9, 78.7, 72.6, 36.5, 61.0, 69.9, 62.8, 67.6, 61.5, 60.9, 70.3, 42.0, 47.6),
    "+ STTS 30%": (84.1, 79.0, 72.7, 35.6, 59.2, 69.6, 63.4, 68.5, 61.1, 59.2, 69.5, 42.6, 47.7),
    "+ STTS 40%": (83.6, 77.3, 71.8, 34.6, 59.2, 69.3, 62.4, 67.4, 61.4, 60.2, 67.5, 41.1, 47.2),
    "+ STTS 50%": (83.7, 77.7, 72.4, 35.1, 58.2, 69.2, 62.4, 67.2, 61.0, 60.1, 68.4, 40.5, 46.0),
}


def run_benchmarks(
    checkpoint: Checkpoint,
    settings: list[Setting],
    output: Path,
    names: Collection[str] = (),
    *,
    limit: int | None = None,
    allow_untrained: bool = False,
    tasks: TaskManager | None = None,
) -> dict | None:
    """
    Score a checkpoint in benchmarks of the paper at each setting, and write `output` after each of them.

    What `output` holds already, of the same checkpoint and limit, stays and is not asked again: a run that was killed
    goes on. On several processes lmms-eval shares out the questions of each benchmark.

    Args:
        output: JSON file; `rows`, the paper's and one for each setting, are what `stts-molmo publish --results` takes.
        names: of [`BENCHMARKS`]; all when not given.
        limit: questions of each task, for trying it out.
        allow_untrained: let a scorer choose that was never trained.
        tasks: that lmms-eval knows; all of its own and ours when not given.

    Returns:
        What was written, on the first process; `None` on others.

    Raises:
        ValueError: a name is unknown, or an option not usable.
    """
    unknown = sorted(set(names) - BENCHMARKS.keys())
    if unknown:
        raise ValueError(f"There is no benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}.")
    tasks = tasks or TaskManager("WARNING", include_path=str(TASKS), model_name="stts_molmo")
    asked = {"checkpoint": checkpoint.path, "fingerprint": fingerprint(checkpoint, limit), "limit": limit}
    known = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    all_scores = known["scores"] if known.get("fingerprint") == asked["fingerprint"] else {}
    for setting in settings:
        model = STTSMolmo(
            checkpoint, num_frames=setting.num_frames, allow_untrained=allow_untrained, **setting.options()
        )
        scores = all_scores.setdefault(describe(setting), {})
        for name in BENCHMARKS:
            if name in scores or name not in (names or BENCHMARKS):
                continue
            model.accelerator.wait_for_everyone()  # all have read before the first one writes
            scores[name] = run_benchmark(model, BENCHMARKS[name], limit, tasks, output.parent)
            if model.rank == 0:
                write_json(output, {**asked, "rows": table(all_scores), "scores": all_scores})
    return json.loads(output.read_text(encoding="utf-8")) if model.rank == 0 else None


def describe(setting: Setting) -> str:
    """`64 frames, scorer 50%`."""
    method, prune_ratio, max_vision_tokens = setting.pruning
    amount = f"{prune_ratio:.0%}" if max_vision_tokens is None else f"to {max_vision_tokens} tokens"
    return f"{setting.num_frames} frames, " + ("nothing pruned" if method == "none" else f"{method} {amount}")


def run_benchmark(
    model: STTSMolmo, benchmark: Benchmark, limit: int | None, tasks: TaskManager, folder: Path
) -> dict | None:
    """
    `{"score": per cent, "failed": questions}`; the score is `None` of what is to be submitted elsewhere, for which
    lmms-eval writes a file into `folder`/submissions.
    """
    model.failures.clear()
    results = simple_evaluate(
        model=model,
        tasks=[benchmark.task],
        task_manager=tasks,
        limit=limit,
        batch_size=1,
        bootstrap_iters=0,
        log_samples=False,
        cli_args=Namespace(output_path=str(folder), process_with_media=False),
    )
    failed = len(gather_object(model.failures))
    return None if results is None else {"score": read_score(results, benchmark), "failed": failed}


def read_score(results: dict, benchmark: Benchmark) -> float | None:
    """The score, in per cent, among what `simple_evaluate` returns."""
    parts = results["group_subtasks"].get(benchmark.task) or [benchmark.task]
    values = [results["results"][part].get(f"{benchmark.metric},none") for part in parts]
    values = [value["overall"] if isinstance(value, dict) else value for value in values]
    if any(not isinstance(value, (int, float)) for value in values):
        return None
    return benchmark.scale * math.fsum(values) / len(values)


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


def table(scores: dict[str, dict]) -> list[dict]:
    """
    Table 1: the paper's rows, and below them one for each setting in `scores`.

    An average is over those columns that every row of ours has, in the rows of the paper too: else a benchmark that was
    left out would pass for a difference. `Average` is the mean of the other two, as in the paper.
    """
    ours = {name: [(row.get(column) or {}).get("score") for column in BENCHMARKS] for name, row in scores.items()}
    measured = {
        column
        for column, values in zip(BENCHMARKS, zip(*ours.values(), strict=True), strict=True)
        if None not in values
    }
    return [
        {"model": name, **add_averages(dict(zip(BENCHMARKS, values, strict=True)), measured)}
        for name, values in {**{f"paper: {name}": values for name, values in PAPER.items()}, **ours}.items()
    ]


def add_averages(row: dict[str, float | None], measured: Collection[str]) -> dict[str, float | None]:
    def average(values: Iterable[float | None]) -> float | None:
        values = [value for value in values if value is not None]
        return math.fsum(values) / len(values) if values else None

    short, long = (average(row[name] for name in names if name in measured) for names in (SHORT, LONG))
    both = None if None in (short, long) else average([short, long])
    return {**row, "Short avg.": short, "Long avg.": long, "Average": both}


def describe_row(row: dict) -> dict[str, str]:
    """A row of the table as the paper prints it."""
    return {
        name: f"{value:.1f}" if isinstance(value, float) else "-" if value is None else value
        for name, value in row.items()
    }
