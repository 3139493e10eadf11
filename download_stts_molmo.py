"""What a link names, fetched within limits: how many bytes, for how long, and from which machines."""

import base64
import io
import ipaddress
import reprlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from huggingface_hub.utils import httpx  # its export for others: httpx or httpx2, whichever it depends on

MAX_DOWNLOAD_BYTES = 2**31
DOWNLOAD_SECONDS = 600.0

# Of compressed answers those whose expansion is bounded: one read gives at most a thousand times its bytes.
ENCODINGS = ("", "identity", "gzip", "deflate")

NAT64 = ipaddress.ip_network("64:ff9b::/96")


def quoted(name: str) -> str:
    """A name for messages: in quotes, the middle of a long one left out."""
    shortener = reprlib.Repr()
    shortener.maxstring = 120
    return shortener.repr(str(name))


def is_link(name: str) -> bool:
    """Whether `download` fetches it: `http:`, `https:` and `data:`, in any case."""
    return name[:8].lower().startswith(("http://", "https://", "data:"))


def download(
    link: str,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
    seconds: float = DOWNLOAD_SECONDS,
    allow_private_hosts: bool = False,
) -> BinaryIO:
    """
    Fetch what `link` names into a file, on disk whatever its size; the bytes of a `data:` link in memory.

    Args:
        link (`str`): see `is_link`.
        max_bytes (`int`): most bytes to take, after decompression.
        seconds (`float`): most seconds to spend from the first request to the last byte.
        allow_private_hosts (`bool`): whether machines may be asked that the public internet does not reach, this one
            among them, by the link or by a redirect. Where a proxy is set, that one connects: it is asked for no
            address or name that is known here to be private.

    Raises:
        ValueError: the server cannot be reached or may not be, or does not serve the file within the limits.
    """
    if link[:5].lower() == "data:":
        return io.BytesIO(decode_data_link(link, max_bytes))
    file = tempfile.TemporaryFile()
    try:
        for chunk in stream(link, max_bytes, seconds, allow_private_hosts):
            file.write(chunk)
    # InvalidURL is no HTTPError, and a host that cannot be a name is a UnicodeError.
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        file.close()
        raise ValueError(f"{quoted(link)} cannot be downloaded ({error}); check the address.") from error
    except BaseException:
        file.close()
        raise
    return file


def decode_data_link(link: str, max_bytes: int) -> bytes:
    """
    The bytes in a link of the form `data:video/mp4;base64,AAAA...`.

    Raises:
        ValueError: there are too many of them, or it has another form.
    """
    header, _, data = link.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError(f"{quoted(link)} is not of the form data:video/mp4;base64,...; pass it in that one.")
    if len(data) * 3 // 4 > max_bytes:
        raise ValueError(f"{quoted(link)} has {too_large(max_bytes)}.")
    try:
        return base64.b64decode(b"".join(unquote_to_bytes(data).split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{quoted(link)} is not valid base64 ({error}); encode the file anew.") from error


def too_large(max_bytes: int) -> str:
    return f"more than {max_bytes} bytes, the limit (`max_download_bytes` of the video processor)"


def stream(link: str, max_bytes: int, seconds: float, allow_private_hosts: bool) -> Iterator[bytes]:
    """The answer to `link`, piece by piece. Raises `ValueError` and httpx's errors."""
    with (
        Guard(seconds, allow_private_hosts) as guard,
        httpx.Client(follow_redirects=True, event_hooks={"request": [guard.check_request]}) as client,
        client.stream("GET", link, headers={"Accept-Encoding": "identity"}) as response,
    ):
        response.raise_for_status()
        encoding = response.headers.get("Content-Encoding", "").lower()
        if encoding not in ENCODINGS:
            raise ValueError(f"its encoding is {encoding!r}")
        num_bytes = int(response.headers.get("Content-Length", 0))
        if num_bytes <= max_bytes:
            num_bytes = 0
            for chunk in response.iter_bytes():
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    break
                yield chunk
        if num_bytes > max_bytes:
            raise ValueError(f"it has {too_large(max_bytes)}")


class Guard:
    """Checks where each connection of a download goes before anything is sent, and cuts it when time is up."""

    def __init__(self, seconds: float, allow_private_hosts: bool):
        self.seconds = seconds
        self.allow_private_hosts = allow_private_hosts
        self.connection = None
        self.is_late = False
        self.timer = threading.Timer(seconds, self.cut)
        self.timer.daemon = True

    def __enter__(self) -> "Guard":
        self.timer.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.timer.cancel()
        if self.is_late and kind is not GeneratorExit:  # what is cut looks like an error or an end of the answer
            raise ValueError(
                f"it took more than {self.seconds:g} seconds, the limit (`download_seconds` of the video processor)"
            ) from error

    def cut(self) -> None:
        self.is_late = True
        if self.connection is not None:
            with suppress(OSError):
                self.connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def check_request(self, request) -> None:
        """Called with each request, those to where a redirect leads among them."""
        host = request.url.raw_host.decode("ascii")
        with suppress(socket.gaierror):  # no name known here: there is no connection, or a proxy's
            for *_, address in socket.getaddrinfo(host, None):
                self.check_address(host, address[0])
        request.extensions["trace"] = partial(self.watch, host)

    def watch(self, host: str, event: str, info: dict) -> None:
        """Called with each step of a connection to `host`, or to a proxy that connects to it."""
        if event.endswith("connect_tcp.started"):
            self.is_direct = info["host"] == host
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.connection = info["return_value"]
            if self.is_late:
                self.cut()
            if self.is_direct:  # a name may have another address than a moment ago
                self.check_address(host, self.connection.get_extra_info("server_addr")[0])

    def check_address(self, host: str, address: str) -> None:
        if not (self.allow_private_hosts or is_public(address)):
            raise ValueError(
                f"{quoted(host)} has the address {address}, which is not on the public internet; to allow that, set "
                "`allow_private_hosts` of the video processor"
            )


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: no private, local, shared or multicast one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:  # some stand for an address of version 4
        ip = ip.ipv4_mapped or ip.sixtofour or (ipaddress.ip_address(int(ip) % 2**32) if ip in NAT64 else ip)
    return ip.is_global and not ip.is_multicast
