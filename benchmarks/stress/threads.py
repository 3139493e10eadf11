"""Requests from many threads at one processor and one model: each gets what it gets alone."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.checkpoint import load_model

from ..common import TINY
from .files import damaged
from .fuzz import SEED, intact
from .trial import Case

NUM_THREADS = 8
CONTAINERS = ("mp4", "webm", "gif", "mpegts")
QUESTIONS = ("Which shape flickers?", "What color is the still shape?", "How many shapes are there?")


class Request(NamedTuple):
    video: bytes
    question: str
    num_frames: int
    options: tuple


@cache
def parts() -> tuple[STTSMolmoProcessor, torch.nn.Module]:
    torch.set_num_threads(1)
    return STTSMolmoProcessor.from_pretrained(TINY), load_model(str(TINY), torch.device("cpu"), "auto")


def ask(request: Request) -> list[int] | str:
    """The tokens of an answer, or why there is none."""
    processor, model = parts()
    content = [{"type": "video", "video": request.video}, {"type": "text", "text": request.question}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    try:
        chat, sampling = [{"role": "user", "content": content}], {"num_frames": request.num_frames}
        inputs = processor.apply_chat_template(chat, **options, processor_kwargs=sampling)
    except ValueError as error:
        return str(error)
    return model.generate(**inputs, **dict(request.options), max_new_tokens=4, do_sample=False)[0].tolist()


def requests() -> list[Request]:
    """Each a video that is whole or damaged, a question, a number of frames, and a way to prune."""
    rng = np.random.default_rng(SEED)
    ways = [(("prune_ratio", 0.5),), (("method", "cosine"),), (("method", "random"),), (("max_vision_tokens", 60),), ()]
    videos = [intact(container) for container in CONTAINERS]
    videos += [damaged(intact(container), [SEED, 1, i]) for i in range(3) for container in CONTAINERS]
    return [
        Request(video, QUESTIONS[i % 3], int(rng.integers(1, 9)), ways[i % len(ways)]) for i, video in enumerate(videos)
    ]


@cache
def alone() -> list[list[int] | str]:
    return [ask(request) for request in requests()]


@cache
def together(number: int) -> list[Future]:
    """The answers to `number` requests, drawn from all, over threads."""
    alone()
    chosen, drawn = requests(), np.random.default_rng(SEED).integers(0, len(requests()), number)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [pool.submit(ask, chosen[index]) for index in drawn]


def compare(number: int, position: int) -> str:
    index = np.random.default_rng(SEED).integers(0, len(requests()), number)[position]
    answer, expected = together(number)[position].result(), alone()[index]
    assert answer == expected, f"{answer} in threads, {expected} alone"
    return "" if isinstance(answer, list) else "refused in both"


def cases(number: int) -> Iterator[Case]:
    for position in range(number):
        yield Case(f"requests from {NUM_THREADS} threads", f"{position} [{SEED}]", partial(compare, number, position))
