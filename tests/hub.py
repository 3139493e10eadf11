"""A Hub of one repository that also takes commits, over HTTP, for the real client."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from helpers import HubHandler

REPO = "team/clips-qa"  # the one that HubHandler knows


class WritableHubHandler(HubHandler):
    """
    Branches are folders of `branches`; large files wait in `uploads` until a commit names them.

    Args:
        commits: each commit's branch and the paths that it adds and deletes.
        broken: weights whose upload breaks off, and how often: `{size: times}`.
    """

    def __init__(self, *args, branches: Path, commits: list, uploads: dict, broken: dict, **kwargs):
        self.branches, self.commits, self.uploads, self.broken = branches, commits, uploads, broken
        super().__init__(*args, root=branches / "main", **kwargs)

    def do_GET(self):
        branch = re.search(r"/(?:tree|resolve|revision)/([^/?]+)", self.path)
        if branch and (self.branches / branch[1]).is_dir():
            self.root = self.branches / branch[1]
        super().do_GET()

    do_HEAD = do_GET

    def answer(self, body: dict):
        encoded = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(encoded)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(encoded)

    @property
    def address(self) -> str:
        return "http://{}:{}".format(*self.server.server_address)

    def do_POST(self):
        body = self.read_body()
        path = self.path.partition("?")[0]
        self.requests.append(path)
        if path == "/api/repos/create":
            (self.branches / "main").mkdir(parents=True, exist_ok=True)
            return self.answer({"url": f"{self.address}/{REPO}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/branch/" in path:
            (self.branches / path.rpartition("/")[2]).mkdir()
            return self.answer({})
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(
                {"transfer": "basic", "objects": list(map(self.plan_upload, json.loads(body)["objects"]))}
            )
        return self.commit_lines(path.rpartition("/")[2], [json.loads(line) for line in body.splitlines()])

    def plan_upload(self, file: dict) -> dict:
        if file["oid"] in self.uploads:
            return file
        return {**file, "actions": {"upload": {"href": f"{self.address}/upload/{file['oid']}"}}}

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_PUT(self):
        self.requests.append(self.path)
        content = self.read_body()
        if self.broken.get(len(content), 0):
            self.broken[len(content)] -= 1
            self.close_connection = True
            return  # without an answer
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.uploads[self.path.rpartition("/")[2]] = content
        self.reply(b"")

    def commit_lines(self, branch: str, lines: list[dict]):
        contents = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            if line["key"] == "file"
            else self.uploads[line["value"]["oid"]]
            for line in lines
            if line["key"] in ("file", "lfsFile")
        }
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        for name, content in contents.items():
            (self.branches / branch / name).write_bytes(content)
        for name in deleted:
            (self.branches / branch / name).unlink()
        self.commits.append((branch, sorted(contents), deleted))
        self.answer({"commitUrl": f"{self.address}/{REPO}/commit/{self.commit}", "commitOid": self.commit})


class Hub:
    """What a test sees of the server."""

    def __init__(self, branches: Path):
        self.branches = branches
        self.requests, self.commits, self.uploads, self.broken = [], [], {}, {}

    @property
    def environment(self) -> dict[str, str]:
        """For a process that takes this server for the Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def writable_hub(branches: Path) -> Iterator[Hub]:
    """A Hub on this machine whose one repository is [`REPO`], empty at first."""
    hub = Hub(branches)
    handler = partial(
        WritableHubHandler,
        branches=branches,
        requests=hub.requests,
        commits=hub.commits,
        uploads=hub.uploads,
        broken=hub.broken,
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
