"""`stts-molmo serve`: over HTTP the part of OpenAI's API that asks about a video, one question at a time."""

import asyncio
import contextlib
import difflib
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..download_stts_molmo import is_link, quoted
from ..generation_stts_molmo import PRUNING_OPTIONS
from .answer import MAX_NEW_TOKENS
from .streaming import Answerer, Finished

ROLES = ("system", "user", "assistant")
FIELDS = (
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "seed", "num_frames", *PRUNING_OPTIONS),
)
# Of OpenAI's API what changes no answer, and what is not to be had, by the value that asks for nothing.
IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
NEUTRAL = {
    "frequency_penalty": 0,
    "logprobs": False,
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
}


class Json(JSONResponse):
    """With what a client may have sent half of, such as a surrogate, in ASCII."""

    def render(self, content) -> bytes:
        return json.dumps(content).encode("ascii")


class Refused(Exception):
    """A request that gets an error in place of an answer, in the form of OpenAI's API."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}

    def response(self) -> Json:
        retry = {"Retry-After": "1"} if self.status == 503 else {"x-should-retry": "false"}
        return Json(self.body(), self.status, retry)


@dataclass(frozen=True)
class Question:
    """A request, checked: the arguments of [`Answerer.answer`], and how to send what it gives."""

    asked: dict
    is_streamed: bool
    wants_usage: bool


class Server:
    """
    The application, as ASGI has it.

    Args:
        answerer: the model, and the limits of what is asked of it.
        name: of the model, as clients call it.
        folder: where clients may name files; nowhere when not given.
    """

    def __init__(self, answerer: Answerer, name: str, folder: Path | None = None):
        self.answerer, self.limits, self.name = answerer, answerer.limits, name
        self.folder = None if folder is None else folder.resolve(strict=True)
        self.max_body = 4 * self.limits.max_bytes // 3 + 2**20  # a video in base64, and the rest of a request
        self.num_requests = 0
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.list_models),
                Route("/health", lambda request: JSONResponse({"status": "ok"})),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whatever becomes of a request, it is not counted any more when it ends, and its answer ends too."""
        async with contextlib.AsyncExitStack() as ending:
            await self.app(scope | {"ending": ending}, receive, send)

    async def list_models(self, request: Request) -> JSONResponse:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "stts-molmo"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        """Answers `POST /v1/chat/completions`. An error that comes before the first piece has a status of its own."""
        ending = request.scope["ending"]
        try:
            self.admit(ending)
            question = self.read_question(await self.read_body(request))
            events = self.answerer.answer(**question.asked)
            ending.push_async_callback(events.aclose)
            with refused_for_errors():
                await while_connected(request, anext(events))
                if not question.is_streamed:
                    return Json(await while_connected(request, self.collect(events)))
            return StreamingResponse(self.stream(events, question.wants_usage), media_type="text/event-stream")
        except Refused as refused:
            return refused.response()
        except ClientDisconnect:
            return Response(status_code=499)

    def admit(self, ending: contextlib.AsyncExitStack) -> None:
        if self.num_requests >= self.limits.max_requests:
            raise Refused(f"The server is busy ({self.num_requests} at a time); try again later.", status=503)
        self.num_requests += 1
        ending.callback(self.dismiss)

    def dismiss(self) -> None:
        self.num_requests -= 1

    # ------------------------------------------------------------------------------------------------------------------
    # Requests
    # ------------------------------------------------------------------------------------------------------------------

    async def read_body(self, request: Request) -> dict:
        """The JSON object that a request carries, within the limits of size and time."""
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("Send JSON, with Content-Type: application/json.", status=415)
        body = bytearray()
        try:
            too_large = int(request.headers.get("Content-Length", 0)) > self.max_body
            async with asyncio.timeout(self.limits.max_seconds):
                async for chunk in request.stream() if not too_large else nothing():
                    body += chunk
                    too_large = len(body) > self.max_body
                    if too_large:
                        break
            if too_large:
                raise Refused(
                    f"The request has more than {self.max_body} bytes, the limit; send a smaller video, or a link.",
                    status=413,
                )
            values = json.loads(body)
        except TimeoutError as error:
            raise Refused(f"The request took more than {self.limits.max_seconds:g} seconds.", status=408) from error
        except (ValueError, RecursionError) as error:
            raise Refused(f"The request is no JSON ({error or type(error).__name__}).") from error
        if not isinstance(values, dict):
            raise Refused("The request is no JSON object.")
        return {name: value for name, value in values.items() if value is not None}

    def read_question(self, body: dict) -> Question:
        """Check what a request asks for."""
        check_fields(body)
        if body.get("model", self.name) != self.name:
            raise Refused(f"There is no model {quoted(body['model'])}; this is {self.name!r}.", "model", 404)
        try:
            pruning = self.answerer.check_pruning(**{name: body.get(name) for name in PRUNING_OPTIONS})
        except (TypeError, ValueError) as error:
            raise Refused(str(error), next((name for name in PRUNING_OPTIONS if name in body), None)) from error
        messages, link = read_messages(body.get("messages"), self.limits.max_characters)
        asked = {
            "messages": messages,
            "video": link if is_link(link) else self.find_file(link),
            "pruning": pruning,
            "num_frames": whole(body, "num_frames", 1, self.limits.max_frames),
            **self.read_generation(body),
        }
        stream_options = body.get("stream_options", {})
        if not isinstance(stream_options, dict):
            raise Refused(f"stream_options={quoted(stream_options)} must be an object.", "stream_options")
        return Question(asked, flag(body, "stream"), flag(stream_options, "include_usage"))

    def read_generation(self, body: dict) -> dict:
        """The arguments of `generate`, and the seed."""
        names = "max_completion_tokens", "max_tokens"  # the new name and the old
        limits = [whole(body, name, 1, self.limits.max_new_tokens) for name in names]
        generation = {
            "max_new_tokens": next((limit for limit in limits if limit is not None), MAX_NEW_TOKENS),
            "seed": whole(body, "seed", 0, 2**63 - 1),
            "top_p": number(body, "top_p", 0, 1),
        }
        temperature = number(body, "temperature", 0, 2)
        if temperature is not None:
            generation["do_sample"] = temperature > 0
            generation["temperature"] = temperature or None
        return {name: value for name, value in generation.items() if value is not None}

    def find_file(self, name: str) -> Path:
        """A file in the folder that clients may name files in; of others it is not told whether they exist."""
        if self.folder is None:
            raise Refused(
                f"{quoted(name)} is no link, and files of the server may not be read; send http://..., https://... or "
                "data:video/mp4;base64,..., or start the server with --allow-local.",
                "messages",
            )
        try:
            path = url2pathname(urlsplit(name).path) if name[:7].lower() == "file://" else name
            path = (self.folder / path).resolve()
            if not (path.is_relative_to(self.folder) and path.is_file()):
                raise FileNotFoundError("no such file")
            num_bytes = path.stat().st_size
        except (OSError, ValueError, RuntimeError) as error:
            raise Refused(f"There is no file {quoted(name)} that may be read; check the name.", "messages") from error
        if num_bytes > self.limits.max_bytes:
            raise Refused(f"{quoted(name)} has more than {self.limits.max_bytes} bytes, the limit.", "messages", 413)
        return path

    # ------------------------------------------------------------------------------------------------------------------
    # Answers
    # ------------------------------------------------------------------------------------------------------------------

    async def collect(self, events: AsyncIterator[str | Finished]) -> dict:
        """A whole answer."""
        *_, end = [event async for event in events]
        message = {"role": "assistant", "content": end.answer.answer}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(end)}
        return self.envelope("chat.completion") | {"choices": [choice], "usage": usage(end), "stts": figures(end)}

    async def stream(self, events: AsyncIterator[str | Finished], wants_usage: bool) -> AsyncIterator[str]:
        """An answer as server-sent events."""
        envelope = self.envelope("chat.completion.chunk")

        def chunk(delta: dict, reason: str | None = None, **more) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return server_sent(envelope | {"choices": [choice]} | more)

        yield chunk({"role": "assistant", "content": ""})
        try:
            with refused_for_errors():
                async for event in events:
                    if isinstance(event, Finished):
                        yield chunk({}, finish_reason(event), stts=figures(event))
                        if wants_usage:
                            yield server_sent(envelope | {"choices": [], "usage": usage(event)})
                    else:
                        yield chunk({"content": event})
        except Refused as refused:
            yield server_sent(refused.body())
            return
        yield "data: [DONE]\n\n"

    def envelope(self, kind: str) -> dict:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}


# ----------------------------------------------------------------------------------------------------------------------
# What a request may hold
# ----------------------------------------------------------------------------------------------------------------------


def check_fields(body: dict) -> None:
    """Refuse what would be left out of account, misspelt names above all."""
    for name, value in body.items():
        if name in FIELDS or name in IGNORED or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            raise Refused(f"{name}={quoted(value)} is not supported; leave it out.", name)
        close = difflib.get_close_matches(name, FIELDS, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"supported are {', '.join(FIELDS)}."
        raise Refused(f"{quoted(name)} is not supported; {advice}", name)


def flag(body: dict, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refused(f"{name}={quoted(value)} must be true or false.", name)
    return value


def number(body: dict, name: str, low: float, high: float, kinds: tuple[type, ...] = (int, float)) -> float | None:
    value = body.get(name)
    if value is not None and not (type(value) in kinds and low <= value <= high):
        what = "a number" if float in kinds else "a whole number"
        raise Refused(f"{name}={quoted(value)} must be {what} from {low} to {high}.", name)
    return value


def whole(body: dict, name: str, low: int, high: int) -> int | None:
    return number(body, name, low, high, (int,))


def read_messages(messages, max_characters: int) -> tuple[list[dict], str]:
    """
    A chat in OpenAI's form.

    Returns:
        The messages as a processor takes them, and what their only video is called.
    """
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message.", "messages")
    videos, read = [], []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(f"Each message must be an object whose role is one of {', '.join(ROLES)}.", "messages")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise Refused("The content of a message must be text, or a list of parts.", "messages")
        read.append({"role": message["role"], "content": [read_part(part, videos) for part in parts]})
    if len(videos) != 1 or not any(part["type"] == "video" for part in all_parts(read, "user")):
        raise Refused(f"The messages have {len(videos)} videos; send one `video_url`, as the user.", "messages")
    if messages[-1]["role"] != "user" or not any(part.get("text", "").strip() for part in all_parts(read[-1:], "user")):
        raise Refused("The last message asks nothing; send text, as the user.", "messages")
    if sum(len(part.get("text", "")) for role in ROLES for part in all_parts(read, role)) > max_characters:
        raise Refused(f"The messages have more than {max_characters} characters of text, the limit.", "messages", 413)
    return read, videos[0]


def all_parts(messages: list[dict], role: str) -> list[dict]:
    return [part for message in messages if message["role"] == role for part in message["content"]]


def valid_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{quoted(text)} is no text ({error.reason}).", "messages") from error
    return text


def read_part(part, videos: list[str]) -> dict:
    """A part of a message as a processor takes it; what it calls a video goes to `videos`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": valid_text(part["text"])}
    if kind == "video_url":
        video = part.get("video_url")
        link = video.get("url") if isinstance(video, dict) else video
        if isinstance(link, str) and link:
            videos.append(link)
            return {"type": "video"}
    raise Refused(
        'Each part of a message must be {"type": "text", "text": "..."} or {"type": "video_url", "video_url": '
        f'{{"url": "..."}}}}, not {quoted(part)}.',
        "messages",
    )


# ----------------------------------------------------------------------------------------------------------------------
# What an answer holds
# ----------------------------------------------------------------------------------------------------------------------


def finish_reason(end: Finished) -> str:
    return "stop" if end.is_complete else "length"


def usage(end: Finished) -> dict[str, int]:
    total = end.num_read + end.num_written
    return {"prompt_tokens": end.num_read, "completion_tokens": end.num_written, "total_tokens": total}


def figures(end: Finished) -> dict:
    """What `ask --json` tells beside the answer."""
    return {name: value for name, value in asdict(end.answer).items() if name != "answer"}


def server_sent(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


# ----------------------------------------------------------------------------------------------------------------------
# HTTP
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused_for_errors():
    """Turn what [`Answerer.answer`] raises into what a client is told."""
    try:
        yield
    except TimeoutError as error:
        raise Refused("There is no answer in time; ask for fewer frames or tokens, or later.", status=504) from error
    except (OSError, ValueError) as error:
        raise Refused(str(error), "messages") from error
    except RuntimeError as error:
        raise Refused(str(error), status=500) from error


async def nothing() -> AsyncIterator[bytes]:
    for chunk in ():
        yield chunk


async def while_connected(request: Request, result: Awaitable):
    """Wait for a result; give it up, with a `ClientDisconnect`, where the client does."""
    task = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def run(server: Server, host: str, port: int, announce: Callable[[str], None]) -> None:
    """
    Serve until the process is told to stop.

    Args:
        port: any free one if 0.
        announce: is given the address, once requests are taken.

    Raises:
        OSError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        host, port, *_ = listener.getsockname()
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        config = uvicorn.Config(server, log_level="warning", timeout_graceful_shutdown=5, lifespan="off")
        with contextlib.suppress(KeyboardInterrupt):  # the signal that ended it, raised again once all is closed
            uvicorn.Server(config).run(sockets=[listener])
