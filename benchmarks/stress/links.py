"""Names, links, playlists and checkpoints that lead elsewhere: nobody is asked, and nothing that lies there is read."""

import contextlib
import http.server
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor, STTSMolmoVideoProcessor
from stts_molmo.tools.checkpoint import describe_checkpoint, load_model

from ..common import TINY
from .fuzz import intact
from .trial import Case

SECRET = "this stands in a file that nobody named"


class Canary(http.server.BaseHTTPRequestHandler):
    """Notes that it was asked. Behind `/to/` it sends elsewhere."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(302 if self.path.startswith("/to/") else 200)
        self.send_header("Location", self.path.removeprefix("/to/"))
        self.end_headers()
        self.wfile.write(intact("mp4"))


@contextlib.contextmanager
def canary() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("", 0), Canary)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def neighbourhood() -> Iterator[tuple[Path, int]]:
    """A folder that is the current one, with a secret and a video beside it, and the port of a canary."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as parent, canary() as server:
        (Path(parent) / "secret.txt").write_text(SECRET)
        (Path(parent) / "private.ts").write_bytes(intact("mpegts"))
        home = Path(parent) / "home"
        home.mkdir()
        (home / "other.ts").write_bytes(intact("mpegts"))
        (home / "img001.gif").write_bytes(intact("gif"))
        os.chdir(home)
        try:
            yield home, server.server_port
        finally:
            os.chdir(before)
        assert not server.asked, f"asked for {server.asked}"


def refused(action, *arguments) -> None:
    """Do what must be refused, and raise that refusal if it gives away nothing."""
    try:
        action(*arguments)
    except ValueError as error:
        assert SECRET not in str(error), "the message quotes the file"
        raise
    except FileNotFoundError:
        raise
    raise AssertionError("was taken")


# ----------------------------------------------------------------------------------------------------------------------
# Names that FFmpeg or Python may take for more than a file
# ----------------------------------------------------------------------------------------------------------------------

NAMES = [
    *("concat:other.ts|../private.ts", "concat:../private.ts", "subfile,,start,0,end,0,,:../private.ts"),
    *("crypto:../private.ts", "async:../private.ts", "cache:../private.ts", "md5:../private.ts", "tee:x.ts"),
    *("data:video/mp2t,AAAA", "data:text/plain;base64,!", "fd:0", "pipe:0", "pipe:", "unix:socket", "lavfi:testsrc"),
    *("tcp://127.0.0.1:{port}", "udp://127.0.0.1:{port}", "tls://127.0.0.1:{port}", "rtmp://127.0.0.1:{port}/x"),
    *("rtp://127.0.0.1:{port}", "rtsp://127.0.0.1:{port}/x", "ftp://127.0.0.1:{port}/x", "gopher://127.0.0.1:{port}"),
    *("hls+http://127.0.0.1:{port}/x.m3u8", "mmsh://127.0.0.1:{port}/x", "srt://127.0.0.1:{port}", "ipfs://x"),
    *("img%03d.gif", "*.gif", "glob:*.gif", "../secret.txt", "file://../secret.txt", "file:///etc/passwd"),
    *("/etc/passwd", "/dev/stdin", "/dev/zero", "/dev/random", "/proc/self/environ", "/proc/self/mem", "..", ".", "/"),
    *("", " ", "\0", "other.ts\0.mp4", "~", "$HOME", "CON", "x" * 5000, "\ud800.mp4", "a\nb.mp4", "-i"),
]


def read_name(name: str) -> None:
    with neighbourhood() as (_, port):
        refused(STTSMolmoVideoProcessor.from_pretrained(TINY).sample_videos, name.format(port=port))


# ----------------------------------------------------------------------------------------------------------------------
# Playlists and texts that name others
# ----------------------------------------------------------------------------------------------------------------------

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>"
)
TEXTS = {
    "ffconcat": "ffconcat version 1.0\nfile {}\n",
    "ffconcat, unsafe": "ffconcat version 1.0\noption safe 0\nfile '{}'\n",
    "hls": HLS,
    "hls, key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{}"\n#EXTINF:2,\nother.ts\n#EXT-X-ENDLIST\n',
    "hls, map": '#EXTM3U\n#EXT-X-MAP:URI="{}"\n#EXTINF:2,\nother.ts\n#EXT-X-ENDLIST\n',
    "dash": DASH,
    "sdp": "v=0\no=- 0 0 IN IP4 {}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="{}"/></svg>',
    "ssa": "[Script Info]\n; {}\n[Events]\nDialogue: 0,0:00:00.00,0:00:02.00,Default,,0,0,0,,x\n",
}
TARGETS = ["other.ts", "../private.ts", "file:../private.ts", "http://127.0.0.1:{port}/private.ts"]


def read_text(text: str, target: str, suffix: str, as_bytes: bool) -> None:
    with neighbourhood() as (home, port):
        content = text.format(target.format(port=port)).encode()
        (home / f"list{suffix}").write_bytes(content)
        video = content if as_bytes else f"list{suffix}"
        refused(STTSMolmoVideoProcessor.from_pretrained(TINY).sample_videos, video)


# ----------------------------------------------------------------------------------------------------------------------
# Links to this machine and its neighbours
# ----------------------------------------------------------------------------------------------------------------------

LINKS = [
    *("http://127.0.0.1:{port}/x", "http://localhost:{port}/x", "http://2130706433:{port}/x", "http://127.1:{port}/x"),
    *("http://0x7f000001:{port}/x", "http://0177.0.0.1:{port}/x", "http://0:{port}/x", "http://[::1]:{port}/x"),
    *("http://[::ffff:127.0.0.1]:{port}/x", "http://[::ffff:7f00:1]:{port}/x", "HTTP://LOCALHOST:{port}/x"),
    *("http://example.com@127.0.0.1:{port}/x", "http://127.0.0.1:{port}#@example.com/", "http://10.0.0.1/x"),
    *("http://192.168.0.1/x", "http://172.16.0.1/x", "http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/x"),
    *("http://100.64.0.1/x", "http://224.0.0.1/x", "http://[64:ff9b::7f00:1]/x", "http://[2002:7f00:1::]/x"),
    *("https://127.0.0.1:{port}/x", "http://", "http://[::1", "http://a..b/", "https://exa mple/", "http://\ud800/"),
]
REDIRECTS = ["http://127.0.0.2:{port}/x", "http://[::1]:{port}/x", "http://10.0.0.1/x", "http://169.254.169.254/"]
REDIRECTS += ["file:///etc/passwd", "ftp://127.0.0.1:{port}/x", "data:video/mp4;base64,AAAA", "//127.0.0.2:{port}/x"]


def fetch(link: str) -> None:
    with neighbourhood() as (_, port):
        refused(STTSMolmoVideoProcessor.from_pretrained(TINY).sample_videos, link.format(port=port))


def follow(link: str) -> None:
    """From a server that may be asked to one that may not: the first is taken for a public one."""
    from stts_molmo import download_stts_molmo

    is_public = download_stts_molmo.is_public
    with canary() as server:
        download_stts_molmo.is_public = lambda address: address == "127.0.0.1"
        processor = STTSMolmoVideoProcessor.from_pretrained(TINY)
        try:
            start = f"http://127.0.0.1:{server.server_port}/to/"
            refused(processor.sample_videos, start + link.format(port=server.server_port))
        finally:
            download_stts_molmo.is_public = is_public
            assert all(path.startswith("/to/") for path in server.asked), f"asked for {server.asked}"


# ----------------------------------------------------------------------------------------------------------------------
# Chats of a server that reads no files of its own
# ----------------------------------------------------------------------------------------------------------------------

PARTS = [
    *(("video", "../private.ts"), ("video", "file://../private.ts"), ("video", "FILE:///etc/passwd")),
    *(("video", ["../private.ts"]), ("image", "img001.gif"), ("image", "file:img001.gif"), ("image", "/etc/passwd")),
    *(("video", "http://127.0.0.1:{port}/x"), ("image", "http://127.0.0.1:{port}/x"), ("audio", "../secret.txt")),
]


def ask(kind: str, value) -> None:
    with neighbourhood() as (_, port):
        processor = STTSMolmoProcessor.from_pretrained(TINY)
        processor.video_processor.allow_local_files = False
        key = {"video": "video", "image": "url", "audio": "audio"}[kind]
        value = value.format(port=port) if isinstance(value, str) else value
        content = [{"type": kind, key: value}, {"type": "text", "text": "Which shape?"}]
        chat = [{"role": "user", "content": content}]
        refused(partial(processor.apply_chat_template, chat, tokenize=True, return_dict=True, return_tensors="pt"))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

SHARDS = ["../private/x.safetensors", "/{parent}/private/x.safetensors", "sub/x.safetensors", "..", "x.bin", "", 3]
SHARDS += [
    "C:\\x.safetensors",
    "..\\x.safetensors",
    "x\0.safetensors",
    None,
    ["x.safetensors"],
    "http://x/y.safetensors",
]


@contextlib.contextmanager
def checkpoint() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(TINY, Path(parent) / "checkpoint"))
        (Path(parent) / "private").mkdir()
        yield folder


def load(folder: Path) -> None:
    load_model(str(folder), torch.device("cpu"), "auto")


def inspect(folder: Path) -> None:
    describe_checkpoint(str(folder))


def index_elsewhere(name, command) -> None:
    with checkpoint() as folder:
        shutil.move(folder / "model.safetensors", folder.parent / "private" / "x.safetensors")
        name = name.format(parent=folder.parent) if isinstance(name, str) else name
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(command, folder)


def link_elsewhere(name: str) -> None:
    with checkpoint() as folder:
        shutil.move(folder / name, folder.parent / "private" / name)
        (folder / name).symlink_to(f"../private/{name}")
        refused(load, folder)


def unpickle(name: str) -> None:
    """A file whose unpickling writes another."""
    with checkpoint() as folder:
        mark = folder.parent / "mark"

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(mark),)

        file = io.BytesIO()
        torch.save({"lm_head.weight": Payload()}, file)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(file.getvalue())
        try:
            refused(load, folder)
        finally:
            assert not mark.exists(), "the file was unpickled"


PICKLES = ["pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json", "adapter_model.bin"]


def cases() -> Iterator[Case]:
    for name in NAMES:
        yield Case("names that are more than a file's", repr(name[:60]), partial(read_name, name))
    for (kind, text), target in ((item, target) for item in TEXTS.items() for target in TARGETS):
        for suffix, as_bytes in ((".mp4", False), (".m3u8", False), ("", True)):
            name = f"{kind}, {target}, {'bytes' if as_bytes else suffix}"
            yield Case("files that name others", name, partial(read_text, text, target, suffix, as_bytes))
    for link in LINKS:
        yield Case("links to private addresses", repr(link), partial(fetch, link))
    for link in REDIRECTS:
        yield Case("redirects elsewhere", repr(link), partial(follow, link))
    for kind, value in PARTS:
        yield Case("files and private links in a chat", f"{kind} {value!r}", partial(ask, kind, value))
    for name in SHARDS:
        for command in (inspect, load):
            action = partial(index_elsewhere, name, command)
            yield Case("weights that lie elsewhere", f"{command.__name__} {name!r}", action)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        yield Case("links out of a checkpoint", name, partial(link_elsewhere, name))
    for name in PICKLES:
        yield Case("weights that are a pickle", name, partial(unpickle, name))
