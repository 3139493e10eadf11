"""`stts-molmo serve`, asked by OpenAI's own client: the answers of `ask`, limits that hold, nothing lost or crossed.

Runs where the extra `serve` is installed (`make test-extras`).
"""

import base64
import contextlib
import http.client
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, write_video
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.streaming import Answerer, Limits
from typer.main import get_command
from typer.testing import CliRunner

MISSING = "the extra `serve` is not installed; make test-extras runs this"
openai = pytest.importorskip("openai", reason=MISSING)
uvicorn = pytest.importorskip("uvicorn", reason=MISSING)
serving = pytest.importorskip("stts_molmo.tools.serving", reason=MISSING)

CLIPS = ROOT / "examples" / "clips"
QUESTION = "What color is the still shape?"
NAME = "stts-molmo-tiny"
LIMITS = Limits(200_000, max_video_seconds=30, max_frame_size=300, max_frames=16, max_seconds=30, max_requests=8)


def client_of(url: str, **options):
    return openai.OpenAI(base_url=url, api_key="none", **{"max_retries": 0, "timeout": 60} | options)


def messages(video: str, question: str = QUESTION) -> list[dict]:
    parts = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def ask(client, video: str = "quiet.mp4", question: str = QUESTION, **options):
    return client.chat.completions.create(model=NAME, messages=messages(video, question), **options)


def data_link(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), device="cpu")


@contextlib.contextmanager
def serve(app) -> Iterator[str]:
    """The URL at which an application is served, in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server(checkpoint):
    return serving.Server(Answerer(checkpoint, LIMITS, allow_private_hosts=True), NAME, CLIPS)


@pytest.fixture(scope="module")
def client(server):
    with serve(server) as url, client_of(url) as client:
        yield client


@pytest.fixture
def long_answers(checkpoint, monkeypatch):
    """The tiny model says one word; now it goes on."""
    monkeypatch.setattr(checkpoint.model.generation_config, "eos_token_id", None)


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# ----------------------------------------------------------------------------------------------------------------------
# Answers
# ----------------------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"prune_ratio": 0.8},
    {"prune_ratio": 0, "num_frames": 3},
    {"method": "cosine"},
    {"method": "none"},
    {"method": "tome", "num_frames": 5},
    {"max_vision_tokens": 20},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_answer_is_that_of_ask_streamed_or_not(client, checkpoint, options):
    expected = answer_question(Checkpoint(str(TINY), device="cpu"), CLIPS / "busy.mp4", QUESTION, **options)
    whole = ask(client, "busy.mp4", extra_body=options)
    assert whole.choices[0].message.content == expected.answer
    assert whole.choices[0].finish_reason == "stop"
    stream = list(ask(client, "busy.mp4", extra_body=options, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected.answer
    assert stream[-2].choices[0].finish_reason == "stop"
    for figures in (whole.stts, stream[-2].stts):
        assert figures["vision_tokens"] == expected.vision_tokens
        assert (figures["frames"], figures["method"]) == (expected.frames, expected.method)
        assert (figures["prune_ratio"], figures["max_vision_tokens"]) == (
            expected.prune_ratio,
            expected.max_vision_tokens,
        )
    assert whole.usage == stream[-1].usage
    assert whole.usage.completion_tokens == 2  # the word and the end
    assert whole.usage.prompt_tokens > expected.vision_tokens["after"]


def test_what_nobody_asks_for_is_that_of_the_generation_config(client, checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint.model.generation_config, "prune_ratio", 0.25, raising=False)
    monkeypatch.setattr(checkpoint.model.generation_config, "method", "random", raising=False)
    assert ask(client).stts["vision_tokens"] == {"before": 72, "after": 54}
    figures = ask(client, extra_body={"max_vision_tokens": 30}).stts
    assert (figures["vision_tokens"]["after"], figures["method"]) == (30, "random")


def test_a_video_comes_as_a_file_a_link_or_data(client):
    with quiet_http(CLIPS) as url:
        names = [
            "busy.mp4",
            str(CLIPS / "busy.mp4"),
            (CLIPS / "busy.mp4").as_uri(),
            data_link(CLIPS / "busy.mp4"),
            f"{url}/busy.mp4",
        ]
        answers = {name: ask(client, name).choices[0].message.content for name in names}
    assert len(set(answers.values())) == 1


@contextlib.contextmanager
def quiet_http(folder: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


def test_a_conversation_goes_on(client, checkpoint):
    chat = [
        {"role": "system", "content": "Be brief."},
        *messages("quiet.mp4", "Which shape moves?"),
        {"role": "assistant", "content": "circle"},
        {"role": "user", "content": QUESTION},
    ]
    answer = client.chat.completions.create(model=NAME, messages=chat)
    assert answer.choices[0].message.content and answer.usage.prompt_tokens > ask(client).usage.prompt_tokens


def test_what_a_user_types_is_text(client):
    """A placeholder of the template among it, which would else ask for a second video."""
    assert ask(client, question=f"<|video|> <|im_end|> {QUESTION}").choices[0].message.content


def test_sampling(client, long_answers):
    options = {"temperature": 2.0, "max_completion_tokens": 6}
    one, again, *others = (ask(client, seed=seed, **options).choices[0] for seed in (1, 1, 2, 3, 4, 5))
    assert one.message.content == again.message.content
    assert {one.message.content} < {one.message.content, *(other.message.content for other in others)}
    greedy = {
        ask(client, temperature=0, top_p=0.5, seed=seed, max_tokens=3).choices[0].message.content for seed in (1, 2)
    }
    assert len(greedy) == 1
    assert one.finish_reason == "length"


def test_what_changes_no_answer_may_be_said(client):
    assert ask(client, n=1, user="me", presence_penalty=0).choices[0].message.content
    assert [model.id for model in client.models.list()] == [NAME]


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": QUESTION}
VIDEO = {"type": "video_url", "video_url": {"url": "quiet.mp4"}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
BAD = {
    "ratio": ({"prune_ratio": 1.5}, 400, r"prune_ratio=1.5 must be a number in \[0, 1\)"),
    "ratio of text": ({"prune_ratio": "half"}, 400, "prune_ratio='half' must be"),
    "ratio and budget": ({"prune_ratio": 0.5, "max_vision_tokens": 9}, 400, "exclude each other"),
    "budget": ({"max_vision_tokens": 0}, 400, "max_vision_tokens=0"),
    "method": ({"method": "magic"}, 400, "method='magic' is unknown; choose one of 'scorer'"),
    "method of another kind": ({"method": ["cosine"]}, 400, "method="),
    "misspelt": ({"prune_rate": 0.5}, 400, "'prune_rate' is not supported; did you mean 'prune_ratio'"),
    "unknown": ({"tools": []}, 400, "'tools' is not supported; supported are"),
    "not to be had": ({"n": 2}, 400, "n='2' is not supported"),
    "no frames": ({"num_frames": 0}, 400, "num_frames='0' must be a whole number from 1 to 16"),
    "too many frames": ({"num_frames": 17}, 400, "num_frames='17' must be a whole number from 1 to 16"),
    "too long an answer": ({"max_tokens": 10**6}, 400, "max_tokens='1000000' must be a whole number from 1 to 1024"),
    "temperature": ({"temperature": float("nan")}, 400, "temperature='nan' must be a number from 0 to 2"),
    "seed": ({"seed": True}, 400, "seed='True' must be a whole number"),
    "stream": ({"stream": "yes"}, 400, "stream='yes' must be true or false"),
    "stream options": ({"stream_options": 1}, 400, "stream_options='1' must be an object"),
    "another model": ({"model": "gpt"}, 404, "There is no model 'gpt'; this is 'stts-molmo-tiny'"),
    "no messages": ({"messages": []}, 400, "at least one message"),
    "messages of another kind": ({"messages": "hello"}, 400, "must be a list"),
    "a message of another kind": ({"messages": ["hello"]}, 400, "Each message must be an object"),
    "role": ({"messages": [{"role": "tool", "content": "1"}]}, 400, "role is one of system, user, assistant"),
    "content": ({"messages": [{"role": "user", "content": 1}]}, 400, "must be text, or a list of parts"),
    "part": ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "Each part of a message must be"),
    "part of another kind": ({"messages": [{"role": "user", "content": [[]]}]}, 400, "Each part of a message must be"),
    "no video": ({"messages": [USER]}, 400, "have 0 videos; send one `video_url`"),
    "two videos": ({"messages": [{"role": "user", "content": [VIDEO, VIDEO]}, USER]}, 400, "have 2 videos"),
    "a video of the assistant": ({"messages": [{"role": "assistant", "content": [VIDEO]}, USER]}, 400, "as the user"),
    "nothing asked": ({"messages": messages("quiet.mp4", " \n")}, 400, "asks nothing"),
    "the last word is the assistant's": (
        {"messages": [*messages("quiet.mp4"), {"role": "assistant", "content": "?"}]},
        400,
        "asks nothing",
    ),
    "half a character": ({"messages": messages("quiet.mp4", "\ud800?")}, 400, "is no text"),
    "half a character in a name": ({"\ud800": 1}, 400, "is not supported"),
    "half a character in a link": ({"messages": messages("a\ud800")}, 400, "that may be read"),
    "too much text": ({"messages": messages("quiet.mp4", "why " * 6000)}, 413, "more than 20000 characters"),
    "no such file": ({"messages": messages("none.mp4")}, 400, "no file 'none.mp4' that may be read"),
    "a file elsewhere": ({"messages": messages("../finetune.py")}, 400, r"no file '../finetune.py' that may be read"),
    "a file of the system": (
        {"messages": messages("file:///etc/passwd")},
        400,
        "no file 'file:///etc/passwd' that may",
    ),
    "a folder": ({"messages": messages(".")}, 400, "no file '.' that may be read"),
    "no name": ({"messages": messages("a\0b")}, 400, "that may be read"),
    "another protocol": ({"messages": messages("ftp://example.org/a.mp4")}, 400, "that may be read"),
    "no video in data": ({"messages": messages("data:video/mp4;base64,AAAA")}, 400, "cannot be read as a video"),
    "no base64": ({"messages": messages("data:video/mp4;base64,???")}, 400, "is not valid base64"),
    "too much data": (
        {"messages": messages("data:video/mp4;base64," + "A" * 280_000)},
        400,
        "has more than 200000 bytes, the limit",
    ),
    "a playlist": (
        {"messages": messages("data:;base64," + base64.b64encode(b"#EXTM3U\nhttp://127.0.0.1/a.ts\n").decode())},
        400,
        "cannot be read as a video|is a playlist",
    ),
    "nobody there": ({"messages": messages("http://127.0.0.1:9/a.mp4")}, 400, "cannot be downloaded"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_bad_requests_get_a_status_and_a_reason(client, server, case, streamed):
    body, status, reason = BAD[case]
    body = {"model": NAME, "messages": messages("quiet.mp4"), "stream": streamed} | body
    answer = post(client, json.dumps(body))
    error = json.loads(answer.read())["error"]
    assert answer.status == status
    assert error["type"] == "invalid_request_error" and error["message"]
    assert re.search(reason, error["message"]), error["message"]
    assert wait_for(lambda: server.num_requests == 0)


def post(client, body: str | bytes, **headers) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/chat/completions", body, headers)
    return connection.getresponse()


def test_the_client_raises_what_the_status_says(client):
    with pytest.raises(openai.BadRequestError, match="prune_ratio=2") as error:
        ask(client, extra_body={"prune_ratio": 2})
    assert error.value.param == "prune_ratio"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=messages("quiet.mp4"))


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        ("{}", {"Content_Type": "text/plain"}, 415, "application/json"),  # what a page of another site may send
        ("{", {}, 400, "no JSON"),
        (b"\xff", {}, 400, "no JSON"),
        ("[" * 10**5, {}, 400, "no JSON"),
        ("[1]", {}, 400, "no JSON object"),
        ("1" * 5000, {}, 400, "no JSON"),
    ],
    ids=["content type", "cut", "not text", "nested", "a list", "a long number"],
)
def test_what_is_no_request(client, body, headers, status, reason):
    answer = post(client, body, **headers)
    assert answer.status == status and reason in json.loads(answer.read())["error"]["message"]


def test_other_routes_are_not_there(client):
    for path, status in (("/v1/responses", 404), ("/load_model", 404), ("/health", 200)):
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
        connection.request("GET", path)
        assert connection.getresponse().status == status


# ----------------------------------------------------------------------------------------------------------------------
# Limits
# ----------------------------------------------------------------------------------------------------------------------


def test_a_request_that_is_too_large_is_refused_as_it_comes(client, server):
    with pytest.raises(openai.APIStatusError, match="more than 1315242 bytes, the limit") as error:
        ask(client, "data:video/mp4;base64," + "A" * 3 * 10**6)
    assert error.value.status_code == 413

    def endless():
        for _ in range(1000):
            yield b"[" * 10**4

    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
    with contextlib.suppress(OSError):  # once it is refused
        connection.request("POST", "/v1/chat/completions", endless(), {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
    assert wait_for(lambda: server.num_requests == 0)


def test_a_file_that_is_too_large_or_too_long_is_refused(client, tmp_path, checkpoint):
    (tmp_path / "large.mp4").write_bytes(bytes(LIMITS.max_bytes + 1))
    write_video(tmp_path / "long.mp4", num_frames=40, fps=1)
    write_video(tmp_path / "wide.mp4", num_frames=2, size=(320, 64))
    (tmp_path / "notes.mp4").write_text("no video")
    (tmp_path / "elsewhere.mp4").symlink_to(CLIPS / "quiet.mp4")
    server = serving.Server(Answerer(checkpoint, LIMITS, allow_private_hosts=True), NAME, tmp_path)
    with serve(server) as url, quiet_http(tmp_path) as files:
        client = client_of(url)
        for name in ("large.mp4", f"{files}/large.mp4"):
            with pytest.raises(openai.APIStatusError, match="more than 200000 bytes, the limit") as error:
                ask(client, name)
            assert error.value.status_code in (400, 413)
        with pytest.raises(openai.BadRequestError, match="is 39.0 seconds long; at most 30 are taken"):
            ask(client, "long.mp4")
        with pytest.raises(openai.BadRequestError, match="'wide.mp4' declares frames of 320 x 64 pixels; at most 300"):
            ask(client, "wide.mp4")
        with pytest.raises(openai.BadRequestError, match="'notes.mp4' cannot be read as a video"):
            ask(client, "notes.mp4")
        with pytest.raises(openai.BadRequestError, match="no file 'elsewhere.mp4' that may be read"):
            ask(client, "elsewhere.mp4")


def test_no_file_and_no_private_host_unless_allowed(checkpoint):
    with serve(serving.Server(Answerer(checkpoint, LIMITS), NAME)) as url, quiet_http(CLIPS) as files:
        client = client_of(url)
        for name in ("quiet.mp4", str(CLIPS / "quiet.mp4"), (CLIPS / "quiet.mp4").as_uri()):
            with pytest.raises(openai.BadRequestError, match="files of the server may not be read"):
                ask(client, name)
        with pytest.raises(openai.BadRequestError, match="not on the public internet"):
            ask(client, f"{files}/quiet.mp4")
        assert ask(client, data_link(CLIPS / "quiet.mp4")).choices[0].message.content == "green"


def test_what_takes_too_long_ends(checkpoint, long_answers):
    limits = replace(LIMITS, max_seconds=0.5, max_new_tokens=10**5)
    server = serving.Server(Answerer(checkpoint, limits), NAME, CLIPS)
    with serve(server) as url:
        client = client_of(url, max_retries=2)  # which a time-out is not worth
        start = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="no answer in time") as error:
            ask(client, max_tokens=10**5)
        assert error.value.status_code == 504 and time.monotonic() - start < 5
        with pytest.raises(openai.APIError, match="no answer in time"):
            list(ask(client, max_tokens=10**5, stream=True))
        assert wait_for(lambda: is_idle(server))


def is_idle(server) -> bool:
    """Whether nobody is answered, and the model's thread takes the next question."""
    free = threading.Event()
    server.answerer.model_thread.submit(free.set)
    return server.num_requests == 0 and free.wait(1)


def test_one_too_many_is_told_to_come_back(checkpoint, long_answers):
    server = serving.Server(Answerer(checkpoint, replace(LIMITS, max_requests=1)), NAME, CLIPS)
    with serve(server) as url:
        client = client_of(url)
        stream = ask(client, max_tokens=1000, stream=True)
        with pytest.raises(openai.InternalServerError, match=r"busy \(1 at a time\); try again later"):
            ask(client)
        stream.close()
        assert wait_for(lambda: is_idle(server))
        assert ask(client, max_tokens=1)


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ----------------------------------------------------------------------------------------------------------------------


def test_those_who_leave_free_the_model(client, server, long_answers):
    start = time.monotonic()
    for stream in (True, False):
        body = {"model": NAME, "messages": messages("quiet.mp4"), "max_tokens": 1000, "stream": stream}
        for _ in range(3):
            raw = json.dumps(body).encode()
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(raw)}\r\n"
                connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + raw)
                if stream:
                    assert b"200 OK" in connection.recv(4096)
                else:
                    time.sleep(0.2)
    assert wait_for(lambda: is_idle(server))
    assert time.monotonic() - start < 15
    assert ask(client, max_tokens=1).choices[0].message.content


def test_those_who_never_finish_asking_are_let_go(checkpoint):
    server = serving.Server(Answerer(checkpoint, replace(LIMITS, max_seconds=0.3)), NAME, CLIPS)
    with serve(server) as url:
        client = client_of(url)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        )
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
            connection.sendall(head.encode() + b"\r\n{")
            assert b"408" in connection.recv(4096)
        assert wait_for(lambda: server.num_requests == 0)


def test_numbers_that_are_none_are_no_answer():
    checkpoint = Checkpoint(str(TINY), device="cpu")
    server = serving.Server(Answerer(checkpoint, LIMITS), NAME, CLIPS)
    with torch.no_grad():
        checkpoint.model.lm_head.weight[3] = float("nan")
    with serve(server) as url:
        client = client_of(url, max_retries=2)
        with pytest.raises(openai.InternalServerError, match="no answer: the weight lm_head.weight is not finite"):
            ask(client)
        with pytest.raises(openai.APIError, match="no answer: the weight lm_head.weight is not finite"):
            list(ask(client, stream=True))


def test_an_untrained_scorer_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(type(checkpoint.model), "has_untrained_scorer", lambda model: True)
    for allowed in (False, True):
        with serve(serving.Server(Answerer(checkpoint, LIMITS, allow_untrained=allowed), NAME, CLIPS)) as url:
            client = client_of(url)
            assert ask(client, extra_body={"method": "cosine"})
            with contextlib.nullcontext() if allowed else pytest.raises(openai.BadRequestError, match="is not trained"):
                ask(client)


# ----------------------------------------------------------------------------------------------------------------------
# Many at a time, of the program itself
# ----------------------------------------------------------------------------------------------------------------------

NUM_CLIENTS, NUM_REQUESTS = 8, 200
QUESTIONS = (QUESTION, "Which shape moves?", "What color is the background?")
MAX_GROWTH = 32  # MiB of the server's memory, over the last 160 requests


@pytest.fixture(scope="module")
def program() -> Iterator[tuple[str, subprocess.Popen]]:
    command = [sys.executable, "-m", "stts_molmo", "serve", TINY, "--port", "0", "--allow-local", CLIPS]
    command += ["--device", "cpu", "--max-requests", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    announced = process.stdout.readline()
    (url,) = re.findall(r"Serving stts-molmo-tiny at (\S+)\.$", announced)
    yield url, process
    process.terminate()
    assert process.wait(20) == 0
    process.stdout.close()


def memory(process: subprocess.Popen) -> float:
    """MiB that a process holds."""
    (pages,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(pages) / 1024


def test_two_hundred_mixed_requests_of_eight_clients(program, checkpoint):
    """Each gets what it asked for, told by its text and its figures; the bad ones their own error."""
    url, process = program
    kinds = [
        {"video": video, "question": question, "options": options}
        for video, question in (("quiet.mp4", QUESTIONS[0]), ("busy.mp4", QUESTIONS[1]), ("busy.mp4", QUESTIONS[2]))
        for options in ({}, {"num_frames": 3}, {"prune_ratio": 0.25}, {"method": "cosine", "num_frames": 5})
    ]
    for kind in kinds:
        expected = answer_question(
            Checkpoint(str(TINY), "cpu"), CLIPS / kind["video"], kind["question"], **kind["options"]
        )
        kind["expected"] = expected.answer, expected.vision_tokens, expected.method
    links = {name: data_link(CLIPS / name) for name in ("quiet.mp4", "busy.mp4")}
    sizes = {}

    def request(client, number: int) -> bool:
        if number % 10 == 9:
            with pytest.raises(openai.BadRequestError, match=f"num_frames='{1000 + number}'"):
                ask(client, extra_body={"num_frames": 1000 + number})
            return True
        kind = kinds[number % len(kinds)]
        video = links[kind["video"]] if number % 5 == 0 else kind["video"]
        arguments = {"extra_body": kind["options"], "stream": number % 2 == 1}
        answer = ask(client, video, kind["question"], **arguments)
        if arguments["stream"]:
            chunks = list(answer)
            text, figures = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].stts
        else:
            text, figures = answer.choices[0].message.content, answer.stts
        sizes[number] = memory(process)
        return (text, figures["vision_tokens"], figures["method"]) == kind["expected"]

    def work(first: int) -> list[bool]:
        with client_of(url) as client:
            return [request(client, number) for number in range(first, NUM_REQUESTS, NUM_CLIENTS)]

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        results = [result for results in clients.map(work, range(NUM_CLIENTS)) for result in results]
    assert results == [True] * NUM_REQUESTS
    assert len({kind["expected"][0] for kind in kinds}) > 1
    warm = max(size for number, size in sizes.items() if number < NUM_REQUESTS // 5)
    assert max(sizes.values()) < warm + MAX_GROWTH, (warm, max(sizes.values()))


def test_a_rude_crowd_changes_no_answer(program):
    """Those who hang up, send noise, damaged videos or too much, between those who ask."""
    url, process = program
    client, clip = client_of(url, max_retries=5), (CLIPS / "busy.mp4").read_bytes()

    def hang_up(rng: random.Random, promised: int | None = None, **options):
        body = json.dumps({"model": NAME, "messages": messages("quiet.mp4"), "temperature": 2.0} | options).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {promised or len(body)}\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            time.sleep(rng.random() / 4)

    def send_damaged(rng: random.Random):
        noise = bytearray(clip)
        for position in rng.sample(range(len(clip)), 200):
            noise[position] = rng.randrange(256)
        link = "data:video/mp4;base64," + base64.b64encode(noise).decode()
        assert post(client, json.dumps({"messages": messages(link)})).status in (200, 400, 503)

    def act(number: int):
        rng = random.Random(number)
        match number % 6:
            case 0:
                hang_up(rng, stream=True, max_tokens=1000)
            case 1:
                hang_up(rng, max_tokens=1000)
            case 2:
                hang_up(rng, promised=10**6)
            case 3:
                send_damaged(rng)
            case 4:
                assert post(client, rng.randbytes(300)).status in (400, 503)
            case _:
                assert ask(client).choices[0].message.content == "green"

    with ThreadPoolExecutor(NUM_CLIENTS) as crowd:
        list(crowd.map(act, range(60)))
    client.close()
    assert wait_for(lambda: len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 16)
    with client_of(url) as client:
        assert ask(client).choices[0].message.content == "green"


def test_the_command_line_says_what_is_wrong(tmp_path):
    def error(*arguments) -> str:
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "There is no directory" in error(tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in error(TINY, "--port", taken.getsockname()[1])


# ----------------------------------------------------------------------------------------------------------------------
# docs/serving.md
# ----------------------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_what_the_docs_ask_is_answered(program, capsys):
    (python,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(python.replace("http://127.0.0.1:8000/v1", program[0]), {})
    assert capsys.readouterr().out == "green {'before': 72, 'after': 51}\ngreen"
    (curl,) = re.findall(r"```bash\n(curl .*?)```", PAGE, re.DOTALL)
    if shutil.which("curl"):
        command = curl.replace("http://127.0.0.1:8000/v1", program[0])
        answer = json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout)
        assert answer["stts"]["vision_tokens"]["after"] == 20


def test_the_docs_know_the_defaults_and_the_fields():
    (command,) = re.findall(r"^(stts-molmo serve .*)$", PAGE, re.MULTILINE)
    options = {option.opts[0]: option for option in get_command(app).commands["serve"].params}
    assert {word for word in command.split() if word.startswith("--")} < options.keys()
    defaults = dict(re.findall(r"^\| `(--[\w-]+)` \| (\d+) \|", PAGE, re.MULTILINE))
    assert {name: str(options[name].default) for name in defaults} == defaults and len(defaults) == 7
    limits = Limits()
    assert limits.max_bytes == options["--max-mb"].default * 2**20
    assert all(options[f"--{name.replace('_', '-')}"].default == getattr(limits, name) for name in CLI_LIMITS)
    fields = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))))
    assert fields == set(serving.FIELDS) - {"model", "messages", "stream_options"}


CLI_LIMITS = ("max_video_seconds", "max_frame_size", "max_frames", "max_new_tokens", "max_seconds", "max_requests")
