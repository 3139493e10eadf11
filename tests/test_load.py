"""The load benchmark, against a server that answers as an OpenAI server streams, and tables of what it measured."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import CLIP
from stts_molmo import STTSMolmoConfig, STTSMolmoForConditionalGeneration, STTSMolmoProcessor
from stts_molmo.video_stts_molmo import read_video

from benchmarks.load.checkpoint import write_checkpoint
from benchmarks.load.client import Reply, cache_size, closed_loop, requests, send, stamp, take
from benchmarks.load.presets import PRESETS, RATIOS
from benchmarks.load.run import describe
from benchmarks.load.tables import all_tables

METRICS = 'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="100"} 1.0\n'


class Handler(BaseHTTPRequestHandler):
    """Answers after a while; remembers how many were in the making at a time, and what they asked."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.busy += 1
            server.most = max(server.most, server.busy)
        refused = body["mm_processor_kwargs"]["prune_ratio"] >= 1
        self.send_response(400 if refused else 200)
        self.end_headers()
        for piece in () if refused else ({}, {"usage": {"prompt_tokens": 60, "completion_tokens": 4}}):
            time.sleep(0.05)
            self.wfile.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
            self.wfile.flush()
        with server.lock:
            server.busy -= 1


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.bodies, server.busy, server.most = threading.Lock(), [], 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def bodies(number: int, ratio: float = 0.5) -> list[bytes]:
    return take(requests([Path(CLIP)], ratio, 4, first=7), number)


def test_so_many_clients_send_every_request_once(server):
    seconds, replies = closed_loop(server.server_port, bodies(9), concurrency=3)
    assert len(replies) == len(server.bodies) == 9 and server.most == 3
    assert len({json.dumps(body) for body in server.bodies}) == 9
    assert all((reply.prompt_tokens, reply.new_tokens) == (60, 4) for reply in replies)
    assert all(0.05 <= reply.first < reply.last < seconds for reply in replies)
    assert seconds >= 3 * 0.1


def test_a_refused_request_is_an_error(server):
    (body,) = bodies(1, ratio=1)
    with pytest.raises(ValueError, match="answered 400"):
        send(server.server_port, body)


def test_the_size_of_the_cache_is_the_servers(server):
    assert cache_size(server.server_port) == (100, 32)


def test_a_stamped_video_is_another_file_of_the_same_frames(tmp_path):
    with open(CLIP, "rb") as file:
        data = file.read()
    videos = []
    for number in (1, 2):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(stamp(data, number))
        videos.append(read_video(str(path))[0])
    assert stamp(data, 1) != stamp(data, 2) and (videos[0] == videos[1]).all()


def test_a_cell_counts_what_was_seen():
    replies = [Reply(0.1 * n, 0.2 * n, 60, 4) for n in range(1, 11)]
    cell = describe(4, 0.5, [(2.0, replies), (4.0, replies)], blocks=100, block_size=32)
    assert cell["requests"] == 20 and cell["requests_per_second"] == {"median": 3.75, "min": 2.5, "max": 5.0}
    assert cell["first_token_seconds"] == {"p50": 0.55, "p95": 1.0}
    assert (cell["kv_tokens"], cell["requests_that_fit"]) == (64.0, 50)


def test_tables_have_a_line_for_each_concurrency_and_ratio():
    replies = [Reply(0.1, 0.2, 60, 4)] * 2
    cells = [
        describe(concurrency, ratio, [(2.0 - ratio, replies)], 100, 32) for concurrency in (1, 3) for ratio in RATIOS
    ]
    tables = all_tables(cells)
    assert tables["throughput"].splitlines()[2:] == [
        "| 1 | 1.00 | 1.18 | 1.33 | 1.33 | 1.10 |",
        "| 3 | 1.00 | 1.18 | 1.33 | 1.33 |  |",
    ]
    assert tables["latency"].splitlines()[3] == "| 3 |" + " 0.10 (0.10) |" * 3 + " 0.20 (0.20) |" * 3
    assert tables["cache"].splitlines()[2:] == [f"| {ratio:g} | 64 | 50 |" for ratio in RATIOS]


def test_a_checkpoint_of_random_weights_loads(tmp_path):
    preset = PRESETS["dry-run"]
    write_checkpoint(preset.config, preset.dtype, 6, tmp_path)
    model = STTSMolmoForConditionalGeneration.from_pretrained(tmp_path)
    processor = STTSMolmoProcessor.from_pretrained(tmp_path)
    inputs = processor(text="<|video|>", videos=CLIP, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, prune_ratio=0.5, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_together(name):
    """What vLLM on a CPU has heads for, and longest prompts that fit."""
    preset = PRESETS[name]
    config = STTSMolmoConfig(**preset.config)
    assert config.text_config.head_dim % 32 == 0
    longest = next(int(x.partition("=")[2]) for x in preset.arguments if x.startswith("--max-model-len"))
    side = config.vision_config.image_size[0] // config.vision_config.patch_size // 3
    assert max(preset.num_frames) * (side**2 + 10) + preset.new_tokens < longest
