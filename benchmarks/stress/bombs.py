"""Small inputs that ask for much: sizes, times, answers, templates, configs. Refused, or no dearer than said here."""

import base64
import contextlib
import gzip
import http.server
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor, STTSMolmoVideoProcessor
from stts_molmo.tools import prompts

from ..common import TINY
from ..processes import apart, peak_resident_bytes
from .files import write_video
from .fuzz import intact
from .links import checkpoint, inspect, load
from .trial import Case

MEGABYTE = 2**20


def measured(action: Callable[[], object]) -> tuple[Exception | None, float, float]:
    """What `action` raised, the bytes that it took at its peak, and its seconds of the processor."""
    before, start, error = peak_resident_bytes(), time.process_time(), None
    try:
        action()
    except Exception as raised:
        error = raised
    return error, peak_resident_bytes() - before, time.process_time() - start


def within(megabytes: float, seconds: float, action: Callable[[], object]) -> None:
    """Do it, and see that it took no more than that, whatever came of it."""
    error, num_bytes, cpu_seconds = apart(measured, action)
    assert num_bytes <= megabytes * MEGABYTE, f"took {num_bytes / MEGABYTE:.0f} MB, more than {megabytes}"
    assert cpu_seconds <= seconds, f"took {cpu_seconds:.1f} seconds, more than {seconds}"
    if error is not None:
        raise error


def sample(video, **options) -> None:
    limits = {name: options.pop(name) for name in list(options) if name not in ("fps", "num_frames")}
    STTSMolmoVideoProcessor.from_pretrained(TINY, **limits).sample_videos(video, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Videos and pictures
# ----------------------------------------------------------------------------------------------------------------------


def still(width: int, height: int, num_frames: int) -> bytes:
    """A video of one colour."""
    file = io.BytesIO()
    options = {"preset": "ultrafast", "threads": "2", "g": str(num_frames)}
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=1, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), format="yuv420p")
        for number in range(num_frames):
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def sample_still(width: int, height: int, megabytes: float) -> None:
    data = still(width, height, 64)
    within(megabytes, 90, partial(sample, data, num_frames=64))


def declaring(container: str, width: int, height: int) -> bytes:
    """A file whose header says so."""
    data = bytearray(intact(container))
    if container == "gif":
        data[6:10] = struct.pack("<HH", width, height)
    elif container == "avi":
        start = data.index(b"strf") + 12
        data[start : start + 8] = struct.pack("<ii", width, height)
    else:
        start = data.index(b"avc1") + 28
        data[start : start + 4] = struct.pack(">HH", width, height)
    return bytes(data)


def picture(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + -(-width // 8))) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def show(kind: str, size: tuple[int, int]) -> None:
    """A picture in a chat: an image, or a video of one frame."""
    link = "data:image/png;base64," + base64.b64encode(picture(*size)).decode()
    part = {"type": "image", "url": link} if kind == "image" else {"type": "video", "video": [link]}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "Which shape?"}]}]
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")


FAR = [*range(0, 900, 100), 10**12]  # milliseconds


# ----------------------------------------------------------------------------------------------------------------------
# Downloads
# ----------------------------------------------------------------------------------------------------------------------


class Greedy(http.server.BaseHTTPRequestHandler):
    """Answers that no honest server gives."""

    def log_message(self, *args):
        pass

    def answer(self, *headers: tuple[str, str]):
        self.send_response(200)
        for header in headers:
            self.send_header(*header)
        self.end_headers()

    def go_on(self, chunk: bytes, pause: float = 0.0):
        with contextlib.suppress(OSError):
            while not self.server.is_over.wait(pause):
                self.wfile.write(chunk)

    def do_GET(self):
        with contextlib.suppress(OSError):
            getattr(self, self.path[1:])()

    def endless(self):
        self.answer()
        self.go_on(bytes(MEGABYTE // 16))

    def declared(self):
        self.answer(("Content-Length", str(10**12)))
        self.go_on(bytes(MEGABYTE // 16))

    def compressed(self):
        self.answer(("Content-Encoding", "gzip"))
        self.wfile.write(gzip.compress(bytes(256 * MEGABYTE), 1))

    def deflated(self):
        self.answer(("Content-Encoding", "deflate"))
        self.wfile.write(zlib.compress(bytes(256 * MEGABYTE), 1))

    def twice(self):
        self.answer(("Content-Encoding", "gzip, gzip"))
        self.wfile.write(gzip.compress(gzip.compress(bytes(256 * MEGABYTE), 1)))

    def unknown(self):
        self.answer(("Content-Encoding", "zstd"))
        self.go_on(bytes(1024))

    def slow(self):
        self.answer()
        self.go_on(b"x", pause=0.05)

    def slow_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.go_on(b"X", pause=0.05)

    def long_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.go_on(bytes(MEGABYTE // 16).replace(b"\0", b"x"))

    def silent(self):
        self.server.is_over.wait(30)

    def wrong_length(self):
        self.answer(("Content-Length", "-5"))
        self.wfile.write(b"x" * 99)

    def round(self):
        self.send_response(302)
        self.send_header("Location", "/round")
        self.end_headers()


ANSWERS = ["endless", "declared", "compressed", "deflated", "twice", "unknown", "slow", "slow_headers", "long_headers"]
ANSWERS += ["silent", "wrong_length", "round"]
DOWNLOAD_LIMITS = {"allow_private_hosts": True, "max_download_bytes": 16 * MEGABYTE, "download_seconds": 2}


def fetch(path: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Greedy)
    server.is_over = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        within(100, 10, partial(sample, f"http://127.0.0.1:{server.server_port}/{path}", **DOWNLOAD_LIMITS))
    finally:
        server.is_over.set()
        server.shutdown()
        server.server_close()


def read_data_link() -> None:
    sample("data:video/mp4;base64," + "A" * (100 * MEGABYTE), max_download_bytes=MEGABYTE)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

# A template, and what is said of it.
TEMPLATES = {
    "never ends": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "still running"),
    "never ends in a filter": (
        "{% for a in range(9999) %}{{ range(99999) | map('int') | sum }}{% endfor %}",
        "running",
    ),
    "a power": ("{{ 9 ** 9 ** 9 }}", r"powers \(`\*\*`\)"),
    "growing numbers": (
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "still running|memory",
    ),
    "growing text": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "memory|still running",
    ),
    "a text of terabytes": ("{{ 'a' * 100000000000000 }}", "Memory|memory"),
    "a long prompt": ("{{ 'a' * 9000000 }}", "it writes 9,000,000 characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "syntax": ("{% for", "unexpected .end of template"),
    "its own error": ("{{ raise_exception('no systems') }}", "no systems"),
    "division": ("{{ 1 // 0 }}", "division"),
    "way out": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "absent": (None, "does not have a chat template"),
}

CHAT = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which shape?"}]}]


def render(template: str | None) -> None:
    prompts.MAX_SECONDS, prompts.MAX_MEMORY = 1, 256 * MEGABYTE  # in a process of its own
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    processor.chat_template = template
    prompts.render_prompt(processor, CHAT)


# Where a config has sizes, and ones that no model has.
SIZES = [
    ("text_config", "num_hidden_layers", 10_000_000),
    ("text_config", "num_hidden_layers", 257),
    ("text_config", "num_hidden_layers", 0),
    ("text_config", "vocab_size", 10**10),
    ("text_config", "hidden_size", 10**12),
    ("text_config", "head_dim", 10**10),
    ("text_config", "num_attention_heads", -4),
    ("text_config", "max_position_embeddings", 10**15),
    ("vision_config", "num_hidden_layers", 10**18),
    ("vision_config", "patch_size", 0),
    ("vision_config", "patch_size", 10**9),
    ("vision_config", "image_size", [378, 10**9]),
    ("adapter_config", "intermediate_size", 10**11),
]


def configure(section: str, name: str, value, command: Callable[[Path], None]) -> None:
    with checkpoint() as folder:
        config = json.loads((folder / "config.json").read_text())
        config[section][name] = value
        (folder / "config.json").write_text(json.dumps(config))
        within(100, 10, partial(command, folder))


def nest(name: str, command: Callable[[Path], None]) -> None:
    with checkpoint() as folder:
        (folder / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        within(100, 10, partial(command, folder))


def cases() -> Iterator[Case]:
    for container in ("gif", "avi", "mp4"):
        for size in ((65535, 65535), (65535, 16), (16, 65535)):
            action = partial(within, 300, 20, partial(sample, declaring(container, *size)))
            yield Case("videos of declared sizes", f"{container} {size}", action)
    for width, height in ((3840, 2160), (7680, 4320)):
        megabytes = 500 if width < 4000 else 1500
        action = partial(sample_still, width, height, megabytes)
        yield Case("64 large frames in a small file", f"{width} x {height}", action)
    for options in ({"fps": 1}, {"fps": 1e-3}, {"fps": 1e9}, {"num_frames": 4}, {"num_frames": 10**9}):
        action = partial(within, 100, 10, partial(sample, write_video("matroska", num_frames=10, times=FAR), **options))
        yield Case("times far away", str(options), action)
    for kind in ("image", "video"):
        for size in ((30_000, 30_000), (100_000, 100), (13_000, 13_000)):  # the last is the largest that Pillow takes
            action = partial(within, 6000, 60, partial(show, kind, size))
            yield Case("pictures of large sizes", f"{kind} {size}", action)
    for path in ANSWERS:
        yield Case("downloads", path, partial(fetch, path))
    yield Case("downloads", "data link", partial(within, 300, 10, read_data_link))
    for name, (template, _) in TEMPLATES.items():
        yield Case("chat templates", name, partial(within, 600, 10, partial(render, template)))
    for section, name, value in SIZES:
        for command in (inspect, load):
            action = partial(configure, section, name, value, command)
            yield Case("sizes in a config", f"{command.__name__} {section}.{name}={value}", action)
    for name in ("config.json", "model.safetensors.index.json"):
        for command in (inspect, load):
            yield Case("files nested deeply", f"{command.__name__} {name}", partial(nest, name, command))
