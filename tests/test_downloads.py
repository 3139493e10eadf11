"""Links: how much is taken, for how long, from which machines; and what a chat may name."""

import base64
import gzip
import http.server
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import stts_molmo.download_stts_molmo as download_module
import torch
from helpers import TINY, write_video
from PIL import Image
from stts_molmo.download_stts_molmo import download, is_public
from stts_molmo.processing_stts_molmo import LIMITS, STTSMolmoProcessor, STTSMolmoVideoProcessor

from benchmarks.stress.bombs import picture as make_picture

MEGABYTE = 2**20


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers that no honest server gives. Counts what was asked and what was taken."""

    def log_message(self, *args):
        pass

    def answer(self, *headers: tuple[str, str], status: int = 200):
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.end_headers()

    def write_until_refused(self, chunk: bytes, pause: float = 0.0):
        try:
            while not self.server.is_over.wait(pause):
                self.wfile.write(chunk)
                self.server.taken += len(chunk)
        except OSError:
            pass

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/endless":
            self.answer()
            self.write_until_refused(bytes(64 * 1024))
        elif self.path == "/declared":
            self.answer(("Content-Length", str(10**12)))
            self.write_until_refused(bytes(64 * 1024))
        elif self.path == "/compressed":
            self.answer(("Content-Encoding", "gzip"))
            self.wfile.write(gzip.compress(bytes(64 * MEGABYTE)))
        elif self.path == "/twice":
            self.answer(("Content-Encoding", "gzip, gzip"))
            self.wfile.write(gzip.compress(gzip.compress(bytes(MEGABYTE))))
        elif self.path == "/slow":
            self.answer()
            self.write_until_refused(b"x", pause=0.05)
        elif self.path == "/slow headers":
            self.write_until_refused(b"HTTP/1.1 200 OK\r\nX-Slow: ", pause=0)
        elif self.path == "/drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self.write_until_refused(b"X", pause=0.05)
        elif self.path.startswith("/to/"):
            self.answer(("Location", self.path[len("/to/") :]), status=302)
        elif self.path == "/round":
            self.answer(("Location", "/round"), status=302)
        else:
            self.answer()
            self.wfile.write(self.server.files.get(self.path, b"all"))


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("", 0), Handler)
    server.asked, server.taken, server.is_over, server.files = [], 0, threading.Event(), {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.is_over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(link, max_bytes=MEGABYTE, seconds=20.0) -> bytes:
    with download(link, max_bytes, seconds, allow_private_hosts=True) as file:
        file.seek(0)
        return file.read()


# How much and how long


def test_an_answer_within_the_limits(server):
    assert fetch(f"{server.url}/file", max_bytes=3) == b"all"
    assert fetch(f"{server.url}/to/{server.url}/file") == b"all"


@pytest.mark.parametrize("path", ["endless", "declared", "compressed"])
def test_more_bytes_than_the_limit(server, path):
    with pytest.raises(ValueError, match="it has more than 1048576 bytes, the limit .`max_download_bytes`"):
        fetch(f"{server.url}/{path}")
    assert server.taken < 20 * MEGABYTE


def test_an_encoding_without_a_bound(server):
    with pytest.raises(ValueError, match="its encoding is 'gzip, gzip'"):
        fetch(f"{server.url}/twice")


@pytest.mark.parametrize("path", ["slow", "drip"])
def test_more_seconds_than_the_limit(server, path):
    """Each byte comes in time, all of them never: in the answer's body, or already in its headers."""
    start = time.monotonic()
    with pytest.raises(ValueError, match="it took more than 0.5 seconds, the limit .`download_seconds`"):
        fetch(f"{server.url}/{path}", seconds=0.5)
    assert time.monotonic() - start < 15  # most of it is waiting for the processor on a busy machine


def test_redirects_that_never_end(server):
    with pytest.raises(ValueError, match="cannot be downloaded .*redirects"):
        fetch(f"{server.url}/round")


def test_the_file_of_a_failed_download_is_closed(server, monkeypatch):
    files = []
    make = download_module.tempfile.TemporaryFile
    monkeypatch.setattr(download_module.tempfile, "TemporaryFile", lambda: files.append(make()) or files[-1])
    with pytest.raises(ValueError):
        fetch(f"{server.url}/endless")
    assert files[0].closed


# From where


def test_machines_of_the_local_network_are_not_asked(server):
    for host in ("127.0.0.1", "localhost", "0x7f000001", "2130706433", "[::ffff:127.0.0.1]"):
        with pytest.raises(ValueError, match="is not on the public internet; to allow that, set `allow_private_hosts`"):
            download(f"http://{host}:{server.server_port}/file")
    assert not server.asked


def test_each_redirect_is_checked(server, monkeypatch):
    monkeypatch.setattr(download_module, "is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(ValueError, match="'127.0.0.2' has the address 127.0.0.2, which is not on the public"):
        download(f"{server.url}/to/http://127.0.0.2:{server.server_port}/secret")
    assert server.asked == [f"/to/http://127.0.0.2:{server.server_port}/secret"]


def test_a_name_that_changes_its_address_is_checked_again(server, monkeypatch):
    """The first look at the name gives a public address, the connection goes to another one."""
    answers = iter([True])
    monkeypatch.setattr(download_module, "is_public", lambda address: next(answers, False))
    with pytest.raises(ValueError, match="which is not on the public internet"):
        download(f"{server.url}/secret")
    assert not server.asked


def test_a_proxy_may_be_private_but_what_it_is_asked_for_may_not(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, server.url)
    monkeypatch.setenv("no_proxy", "")
    with download("http://203.0.114.1/file") as file:  # nobody connects to it but the proxy
        file.seek(0)
        assert file.read() == b"all"
    with pytest.raises(ValueError, match="'10.0.0.1' has the address"):
        download("http://10.0.0.1/file")
    assert server.asked == ["http://203.0.114.1/file"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("64:ff9b::5db8:d822", True),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1")),
        *((address, False) for address in ("169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255")),
        *((address, False) for address in ("::1", "::", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:10.0.0.1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "2002:7f00:1::")),
    ],
)
def test_public_addresses(address, expected):
    assert is_public(address) == expected


# Links that are none


@pytest.mark.parametrize("link", ["http://[::1", "http://", "https://exa mple/", "http://a..b/", "http://\ud800/"])
def test_bad_links(link):
    with pytest.raises(ValueError, match="cannot be downloaded .*; check the address"):
        download(link)


def test_a_redirect_to_something_else(server):
    with pytest.raises(ValueError, match="cannot be downloaded"):
        fetch(f"{server.url}/to/file:///etc/passwd")


def test_long_links_are_shortened_in_errors():
    for link in ("http://127.0.0.1/" + "x" * 60_000, "data:video/mp4;base64,?" + "A" * 60_000):
        with pytest.raises(ValueError) as caught:
            download(link)
        assert len(str(caught.value)) < 500
    with pytest.raises(FileNotFoundError) as missing:
        STTSMolmoVideoProcessor().sample_videos("x" * 60_000)
    assert len(str(missing.value)) < 500


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", num_frames=20)


@pytest.fixture
def video_processor() -> STTSMolmoVideoProcessor:
    return STTSMolmoVideoProcessor.from_pretrained(TINY)


def data_link(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_a_data_link_is_the_file(clip, video_processor):
    link = data_link(clip, "video/mp4")
    expected = video_processor(clip)["pixel_values_videos"]
    for form in (link, link.replace("data:", "DATA:"), link.replace("+", "%2B"), link[:100] + "\n" + link[100:]):
        assert torch.equal(video_processor(form)["pixel_values_videos"], expected)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("data:video/mp4,AAAA", "is not of the form data:video/mp4;base64"),
        ("data:video/mp4;base64,A?AA", "is not valid base64"),
        ("data:video/mp4;base64,AAAA", "cannot be read as a video"),
        ("data:video/mp4;base64,", r"is empty \(0 bytes\)"),
    ],
)
def test_bad_data_links(link, message, video_processor):
    with pytest.raises(ValueError, match=message):
        video_processor(link)


def test_a_data_link_beyond_the_limit(clip, video_processor):
    video_processor.max_download_bytes = 100
    with pytest.raises(ValueError, match="more than 100 bytes"):
        video_processor(data_link(clip, "video/mp4"))


# What a chat may name


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path


def ask(processor, kind: str, value):
    content = [{"type": kind, kind: value}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")


def test_local_files_in_chats(clip, picture):
    """A server says no. What a caller opened stays allowed, and links."""
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    named = [("video", str(clip)), ("video", clip.as_uri()), ("video", [str(picture)]), ("image", str(picture))]
    expected = [ask(processor, *part)["input_ids"] for part in named]
    processor.video_processor.allow_local_files = False
    for kind, value in named:
        with pytest.raises(ValueError, match="files of this machine may not be read .`allow_local_files`"):
            ask(processor, kind, value)
    with pytest.raises(ValueError, match="may not be read"):
        ask(processor, "image", "/no/such/file")
    assert torch.equal(ask(processor, "video", clip.read_bytes())["input_ids"], expected[0])
    assert torch.equal(ask(processor, "video", data_link(clip, "video/mp4"))["input_ids"], expected[0])
    assert torch.equal(ask(processor, "image", data_link(picture, "image/png"))["input_ids"], expected[3])


def test_images_are_fetched_within_the_same_limits(server, picture):
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    for kind, value in (("image", f"{server.url}/file"), ("video", [f"{server.url}/file"])):
        with pytest.raises(ValueError, match="is not on the public internet"):
            ask(processor, kind, value)
    assert not server.asked
    processor.video_processor.allow_private_hosts = True
    with pytest.raises(ValueError, match="cannot be read as an image"):
        ask(processor, "image", f"{server.url}/file")
    assert server.asked == ["/file"]


def test_an_image_has_the_values_of_the_native_processor(server, picture):
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    processor.video_processor.allow_private_hosts = True
    native = processor.image_processor(str(picture), return_tensors="pt")
    server.files["/picture"] = picture.read_bytes()
    for name in (str(picture), picture.as_uri(), data_link(picture, "image/png"), f"{server.url}/picture"):
        assert torch.equal(ask(processor, "image", name)["pixel_values"], native["pixel_values"])


def test_images_that_declare_too_many_pixels_are_not_decoded(picture):
    """The first in a file of 14 KB: as RGB it takes 2.7 GB."""
    link = "data:image/png;base64," + base64.b64encode(make_picture(30_000, 30_000)).decode()
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    for kind, value in (("image", link), ("video", [link])):
        with pytest.raises(ValueError, match="is too large an image .*900000000 pixels"):
            ask(processor, kind, value)
    width, height = Image.open(picture).size
    processor.video_processor.max_frame_size = max(width, height) - 1
    with pytest.raises(ValueError, match=f"is an image of {width} x {height} pixels; at most {max(width, height) - 1}"):
        ask(processor, "image", str(picture))


def test_audio_in_a_chat_is_refused_before_it_is_fetched(server):
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    with pytest.raises(ValueError, match="A chat with audio is not supported"):
        ask(processor, "audio", f"{server.url}/file")
    assert not server.asked


def test_limits_are_those_of_whoever_runs_it(tmp_path):
    """No checkpoint brings them, and none is saved with them."""
    strict = {"allow_local_files": False, "max_frame_size": 99}
    for loaded in (STTSMolmoVideoProcessor(**strict), STTSMolmoVideoProcessor.from_pretrained(TINY, **strict)):
        assert not loaded.allow_local_files and loaded.max_frame_size == 99
        assert not set(LIMITS) & set(loaded.to_dict())
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    processor.save_pretrained(tmp_path / "checkpoint")
    settings = json.loads((tmp_path / "checkpoint" / "processor_config.json").read_text())
    settings["video_processor"] |= {"allow_private_hosts": True, "max_download_bytes": 10**15}
    (tmp_path / "checkpoint" / "processor_config.json").write_text(json.dumps(settings))
    processor = STTSMolmoProcessor.from_pretrained(tmp_path / "checkpoint")
    assert not processor.video_processor.allow_private_hosts
    assert processor.video_processor.max_download_bytes == 2**31


def test_a_video_may_be_so_long(tmp_path, monkeypatch):
    processor = STTSMolmoVideoProcessor.from_pretrained(TINY)
    clip = write_video(tmp_path / "clip.mp4", num_frames=5, fps=1)
    monkeypatch.setattr(processor, "max_video_seconds", 4)
    assert len(processor.sample_videos(clip)[0][0]) == 5
    monkeypatch.setattr(processor, "max_video_seconds", 3.9)
    with pytest.raises(ValueError, match=r"The video is 4.0 seconds long; at most 3.9 are taken"):
        processor.sample_videos(clip)
