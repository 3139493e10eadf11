"""The load benchmark runs on this engine."""

import json
import sys
import tempfile
from contextlib import nullcontext

from benchmarks.load.presets import PRESETS, RATIOS
from benchmarks.load.run import main


def test_every_request_is_answered_and_counted(tmp_path, monkeypatch):
    preset, output = PRESETS["dry-run"], tmp_path / "load.json"
    make = tempfile.TemporaryDirectory  # which also writes the results, beside them
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **at: make(**at) if at else nullcontext(tmp_path))
    main(["--preset", "dry-run", "--python", sys.executable, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["versions"]["vllm"]
    cells = {(cell["concurrency"], cell["prune_ratio"]): cell for cell in result["cells"]}
    assert set(cells) == {(clients, ratio) for clients in preset.concurrency for ratio in RATIOS}
    for clients in preset.concurrency:
        kept, *pruned = (cells[clients, ratio] for ratio in RATIOS)
        assert all(cell["requests"] == preset.requests * clients for cell in (kept, *pruned))
        assert kept["kv_tokens"] > pruned[0]["kv_tokens"] > pruned[1]["kv_tokens"]
    assert "token scorer was never trained" in (tmp_path / "log.txt").read_text()
