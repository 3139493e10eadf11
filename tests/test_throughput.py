"""The throughput benchmark runs every row at small sizes, and counts operations as one does by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import throughput
from operation_count import Shape, attention, forward_operations, grid_sizes, vision_layer
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("throughput") / "dry.json"
    sections = [name for name in throughput.SECTIONS if name != "memory"]  # that starts a process for each row
    throughput.main(["--preset", "dry-run", "--output", str(path), "--sections", *sections])
    assert path.with_suffix(".png").stat().st_size < 200_000
    return json.loads(path.read_text())


def test_every_section_has_its_rows(result):
    rows = {}
    for record in result["records"]:
        rows.setdefault(record["section"], set()).add(record.get("name"))
    every = {row.name for row in throughput.ROWS}
    assert rows["prefill"] == rows["training"] == every
    assert rows["vit forward"] == rows["vit training"] == every - {"post-ViT k=0.5"}
    assert rows["serving"] == rows["growth with frames"] == {"native", "k=0", "k=0.5"}
    assert {record["stage"] for record in result["records"] if record["section"] == "clip"} == {"decode", "preprocess"}


def test_memory_of_a_training_step():
    peak = throughput.peak_rss(throughput.PRESETS["dry-run"], throughput.HALF)
    assert peak["peak_bytes"] >= peak["bytes_before"] > 0


def test_results_say_where_they_come_from(result):
    assert {"hardware", "versions", "seed", "date", "load_average", "rounds", "config"} <= result.keys()
    record = next(r for r in result["records"] if r["section"] == "prefill" and r["name"] == "k=0.5")
    for name in ("seconds", "speedup_over_native", "speedup_over_k0"):
        assert record[name]["min"] <= record[name]["median"] <= record[name]["max"]
    assert record["limit"] > 1 and record["teraflops"] > 0


def test_operations_of_an_attention_by_hand():
    config = STTSMolmoConfig().vision_config  # 1152 wide, 16 heads of 72
    queries, keys = 5, 7
    projections = 2 * 1152 * 1152 * (2 * queries + 2 * keys)  # q and o; k and v
    products = 2 * 2 * 1152 * queries * keys  # with the keys, with the values
    assert attention(config, 1152, queries, keys, queries * keys) == projections + products
    mlp = 2 * 2 * 1152 * 4304 * queries
    assert vision_layer(config, queries, keys, queries * keys) == projections + products + mlp


def test_limits_of_the_paper_settings():
    """Prefill of Molmo2-4B, against the figures derived by hand from the architecture."""
    config = STTSMolmoConfig(**throughput.PRESETS["gpu"].config)
    assert grid_sizes(config) == (729, 81)
    for shape, limit in ((Shape(2, 64, 2048, 603), 1.6), (Shape(1, 256, 2048, 2523), 2.0)):
        whole, half = (sum(forward_operations(config, shape, k, "scorer").values()) for k in (0.0, 0.5))
        assert limit < whole / half < limit + 0.4
