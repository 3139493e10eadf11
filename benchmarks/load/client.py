"""Clients of an OpenAI server, and what they see: how long answers take, and whether each got one."""

import base64
import http.client
import json
import re
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle, islice
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 600  # seconds
QUESTION = "What color is the still shape?"


class Reply(NamedTuple):
    """
    first, last: seconds from sending a request to the first and to the last piece of its answer.
    prompt_tokens, new_tokens: as the server counts them.
    """

    first: float
    last: float
    prompt_tokens: int
    new_tokens: int


def stamp(video: bytes, number: int) -> bytes:
    """The same mp4 as a file of its own, with the number in a box that players skip: caches do not know it."""
    return video + struct.pack(">I4sQ", 16, b"free", number)


def requests(videos: Sequence[Path], prune_ratio: float, new_tokens: int, first: int) -> Iterator[bytes]:
    """Bodies of requests about the videos in turn, no two of the same file; `first` is the number of the first."""
    files = [path.read_bytes() for path in videos]
    for video, number in zip(cycle(files), count(first)):
        url = "data:video/mp4;base64," + base64.b64encode(stamp(video, number)).decode()
        content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = {
            "model": "load",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "mm_processor_kwargs": {"prune_ratio": prune_ratio},
        }
        yield json.dumps(body).encode()


def send(port: int, body: bytes) -> Reply:
    """
    Raises:
        ValueError: the server refused the request, or broke off.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"The server answered {response.status}: {response.read()[:500]!r}.")
    first, usage = None, None
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter()
            usage = json.loads(line[len(b"data: ") :]).get("usage") or usage
    last = time.perf_counter()
    connection.close()
    if first is None or usage is None:
        raise ValueError("The server broke off before the end of its answer.")
    return Reply(first - start, last - start, usage["prompt_tokens"], usage["completion_tokens"])


def closed_loop(port: int, bodies: Sequence[bytes], concurrency: int) -> tuple[float, list[Reply]]:
    """Seconds until the last of so many clients is done, and the replies in the order of the bodies."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        replies = list(clients.map(lambda body: send(port, body), bodies))
    return time.perf_counter() - start, replies


def take(bodies: Iterator[bytes], number: int) -> list[bytes]:
    return list(islice(bodies, number))


def cache_size(port: int) -> tuple[int, int]:
    """Blocks of the server's KV cache, and tokens of each."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    (line,) = (line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
    return int(labels["num_gpu_blocks"]), int(labels["block_size"])
