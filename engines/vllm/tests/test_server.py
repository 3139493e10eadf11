"""The OpenAI server: wrong requests are refused and change nothing, many at once lose and cross none."""

import base64
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import MAX_TOKENS, QUESTIONS, Ask

from benchmarks.quality.scenes import FIRST_SEED
from benchmarks.quality.worlds import make_film, write_clip

SECONDS_TO_START = 300


class Server:
    def __init__(self, checkpoint, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = {
            "model": checkpoint,
            "served-model-name": "tiny",
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "float32",
            "max-model-len": MAX_TOKENS,
            "max-num-batched-tokens": 4 * MAX_TOKENS,
            "block-size": 32,
            "mm-processor-kwargs": '{"method": "cosine", "num_frames": 16}',
        }
        flags = ["--enforce-eager", "--no-enable-chunked-prefill", "--trust-request-mm-kwargs"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        self.process = subprocess.Popen(
            command, env=os.environ | {"VLLM_MEDIA_CONNECTOR": "stts_molmo"}, stdout=log, stderr=log
        )

    def wait(self):
        for _ in range(SECONDS_TO_START):
            assert self.process.poll() is None, "the server ended; see its log"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                    return
            except OSError:
                time.sleep(1)
        raise TimeoutError

    def post(self, content: list[dict], **body) -> tuple[int, dict]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, **body}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps({"max_tokens": 8, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS_TO_START) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    def ask(self, ask: Ask) -> tuple[str, int]:
        """The answer, and how many tokens the prompt has."""
        status, reply = self.post([video_part(ask.clip), text_part(ask.question)], mm_processor_kwargs=ask.options)
        assert status == 200, reply
        return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]


def link(data: bytes) -> dict:
    return {
        "type": "video_url",
        "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(data).decode()},
    }


def video_part(path) -> dict:
    return link(path.read_bytes())


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    with open(tmp_path_factory.mktemp("server") / "log.txt", "w") as log:
        server = Server(checkpoint, log)
        try:
            server.wait()
            yield server
        finally:
            server.process.terminate()
            server.process.wait(60)


@pytest.fixture(scope="module")
def expected(reference, clips):
    """What Transformers answers under the options of the engine, as texts."""
    known = {}

    def answer(ask: Ask) -> tuple[str, int]:
        if ask not in known:
            complete = ask._replace(method=ask.method or "cosine", num_frames=ask.num_frames or 16)
            tokens, _, num_prompt_tokens = reference(complete, can_end=True)
            known[ask] = reference.processor.tokenizer.decode(tokens, skip_special_tokens=True), num_prompt_tokens
        return known[ask]

    return answer


WRONG = {
    "ratio": ({"prune_ratio": 1.5}, "prune_ratio=1.5 must be"),
    "kind of ratio": ({"prune_ratio": [0.5]}, "must be a number"),
    "method": ({"method": "best"}, "is unknown"),
    "name": ({"ratio": 0.5}, "what can be given is"),
    "both": ({"prune_ratio": 0.5, "max_vision_tokens": 50}, "exclude each other"),
    "budget": ({"max_vision_tokens": 5}, "less than the 9 tokens of a frame"),
    "frames": ({"num_frames": 10**12}, "at most"),
    "kind of frames": ({"num_frames": "many"}, "expected int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused(server, clips, name):
    options, message = WRONG[name]
    status, error = server.post([video_part(clips[9]), text_part(QUESTIONS[0])], mm_processor_kwargs=options)
    assert 400 <= status < 500 and message in error["message"], (status, error)


def test_a_prompt_that_is_too_long_is_refused(server, tmp_path):
    clip = tmp_path / "long.mp4"
    write_clip(str(clip), make_film(FIRST_SEED["demo"], "still", beats=40))
    status, error = server.post([video_part(clip)], mm_processor_kwargs={"fps": 10, "prune_ratio": 0})
    assert 400 <= status < 500 and str(MAX_TOKENS) in error["message"], (status, error)


@pytest.mark.parametrize(
    "url, message",
    [
        ("file:///etc/passwd", "--allowed-local-media-path"),
        ("/etc/passwd", "HTTP, data or file URL"),
        ("http://127.0.0.1:9/clip.mp4", "cannot be fetched"),
        ("data:video/mp4;base64,bm8gdmlkZW8=", "cannot be read as a video"),
        ("data:video/mp4;base64,", "is empty"),
    ],
)
def test_what_is_no_video_is_refused(server, url, message):
    status, error = server.post([{"type": "video_url", "video_url": {"url": url}}, text_part(QUESTIONS[0])])
    assert 400 <= status < 500 and message in error["message"], (status, error)


def test_two_videos_and_images_are_refused(server, clips):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    for content in ([video_part(clips[0])] * 2, [image]):
        status, error = server.post(content)
        assert status == 400 and "At most" in error["message"], (status, error)


def test_two_hundred_mixed_requests_lose_and_cross_none(server, clips, expected):
    """Of different videos, questions, ratios and methods, sixteen at a time, wrong ones among them."""
    kinds = [
        Ask(clip, question, ratio, method)
        for clip in clips
        for question in QUESTIONS
        for ratio, method in ((None, None), (0.0, None), (0.5, "scorer"), (0.7, None))
    ]
    rng = random.Random(0)
    asks = [rng.choice(kinds) for _ in range(200)]
    wrong = rng.sample(range(200), 20)
    answers = {ask: expected(ask) for ask in set(asks)}

    def send(index: int):
        if index not in wrong:
            return server.ask(asks[index])
        status, _ = server.post([video_part(asks[index].clip)], mm_processor_kwargs={"prune_ratio": 2})
        return status

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(send, range(200)))
    for index, (ask, reply) in enumerate(zip(asks, replies, strict=True)):
        assert reply == (400 if index in wrong else answers[ask]), ask
    assert len(set(answers.values())) > 20
