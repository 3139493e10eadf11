"""
An engine under load: clients in a closed loop, at several concurrencies, about videos of mixed lengths.

    python -m benchmarks.load --preset cpu --python .venv-vllm/bin/python \\
        --output benchmarks/results/load_vllm_cpu.json

The server is one process for all ratios, which take turns. No two requests have the same video, and the caches of
processed videos and of prefixes are off: each is read, encoded and prefilled.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from stts_molmo.tools.files import written_whole

from ..common import provenance
from ..quality.scenes import FIRST_SEED
from ..quality.worlds import make_film, write_clip
from ..speed.measuring import summary
from ..speed.models import SEED
from .checkpoint import write_checkpoint
from .client import Reply, cache_size, closed_loop, requests, take
from .presets import PRESETS, RATIOS, Preset

ARGUMENTS = (
    "--served-model-name=load",
    "--host=127.0.0.1",
    "--no-enable-chunked-prefill",
    "--no-enable-prefix-caching",
    "--mm-processor-cache-gb=0",
    "--trust-request-mm-kwargs",
)
SECONDS_TO_START = 900


@contextmanager
def serve(python: Path, checkpoint: Path, preset: Preset, log: Path) -> Iterator[int]:
    """
    vLLM in the environment of that Python; its port.

    Raises:
        ChildProcessError: it ended before it answered; the message has the end of its log.
        TimeoutError: it does not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={checkpoint}", f"--port={port}"]
    command += [f"--dtype={preset.dtype}", *ARGUMENTS, *preset.arguments]
    with open(log, "w") as file:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(SECONDS_TO_START):
            if process.poll() is not None:
                raise ChildProcessError(f"The server ended: {log.read_text()[-2000:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        else:
            raise TimeoutError(f"The server did not answer within {SECONDS_TO_START} s.")
        yield port
    finally:
        process.terminate()
        process.wait()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th and the 95th, to four digits."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": float(f"{cuts[9]:.4g}"), "p95": float(f"{cuts[18]:.4g}")}


def describe(
    concurrency: int, prune_ratio: float, rounds: list[tuple[float, list[Reply]]], blocks: int, block_size: int
) -> dict:
    """One cell of the result. Each request of a round was answered, or the round would have failed."""
    replies = [reply for _, of_round in rounds for reply in of_round]
    lengths = [reply.prompt_tokens + reply.new_tokens for reply in replies]
    blocks_each = statistics.mean(-(-length // block_size) for length in lengths)
    return {
        "concurrency": concurrency,
        "prune_ratio": prune_ratio,
        "requests": len(replies),
        "requests_per_second": summary([len(of_round) / seconds for seconds, of_round in rounds]),
        "first_token_seconds": percentiles([reply.first for reply in replies]),
        "answer_seconds": percentiles([reply.last for reply in replies]),
        "kv_tokens": round(statistics.mean(lengths), 1),
        "requests_that_fit": int(blocks / blocks_each),
    }


def run(preset: Preset, python: Path, folder: Path) -> Iterator[list[dict]]:
    """The cells measured so far, after each concurrency."""
    videos = []
    for frames in preset.num_frames:
        videos.append(folder / f"{frames}.mp4")
        write_clip(str(videos[-1]), make_film(FIRST_SEED["demo"], "still", beats=frames))
    write_checkpoint(preset.config, preset.dtype, max(preset.num_frames), folder / "checkpoint")
    numbers, cells = count(), []
    with serve(python, folder / "checkpoint", preset, folder / "log.txt") as port:
        blocks, block_size = cache_size(port)

        def measure(concurrency: int, prune_ratio: float, number: int) -> tuple[float, list[Reply]]:
            stamps = next(numbers) << 32
            bodies = take(requests(videos, prune_ratio, preset.new_tokens, stamps), number)
            return closed_loop(port, bodies, concurrency)

        for ratio in RATIOS:  # to warm up
            measure(1, ratio, len(videos))
        for concurrency in preset.concurrency:
            rounds = {ratio: [] for ratio in RATIOS}
            for index in range(preset.rounds):
                for ratio in RATIOS[:: (-1) ** index]:
                    number = max(preset.requests * concurrency, len(videos))
                    rounds[ratio].append(measure(concurrency, ratio, number))
            cells += [describe(concurrency, ratio, rounds[ratio], blocks, block_size) for ratio in RATIOS]
            yield cells


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(
        "python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vLLM and engines/vllm")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    origin = provenance("cuda" if args.preset == "gpu" else "cpu")
    script = "import vllm, torch, transformers; print(vllm.__version__, torch.__version__, "
    versions = subprocess.run([args.python, "-c", script + "transformers.__version__)"], capture_output=True, text=True)
    names = ("vllm", "torch", "transformers")
    origin["versions"] |= dict(zip(names, versions.stdout.split()[-3:], strict=True))
    settings = {name: getattr(preset, name) for name in ("config", "dtype", "num_frames", "new_tokens", "arguments")}
    with tempfile.TemporaryDirectory() as folder:
        for cells in run(preset, args.python, Path(folder)):
            load = [round(value, 2) for value in os.getloadavg()[:1]]
            result = {"preset": args.preset, "seed": SEED, **settings, **origin, "load_average": load, "cells": cells}
            with written_whole(args.output) as draft:
                draft.write_text(json.dumps(result, indent=1) + "\n")
            print(f"concurrency {cells[-1]['concurrency']}: done", flush=True)
