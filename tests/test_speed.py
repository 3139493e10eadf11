"""The speed benchmark runs every row at small sizes, and counts operations as one does by hand."""

import dataclasses
import json
import multiprocessing

import pytest
import torch
from stts_molmo.attention_stts_molmo import torch_attention_pool
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.tools.operations import Shape, attention, forward_operations, language_layer, vision_layer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import torch_threads
from benchmarks.processes import apart
from benchmarks.speed.bench import VIT_STAGES
from benchmarks.speed.large import added_bytes, read_frame_by_frame, write_large_clip
from benchmarks.speed.measuring import CpuClock, WallClock, describe, ratios, take_turns
from benchmarks.speed.memory import peak_rss
from benchmarks.speed.models import build_models, call, encode, encode_training_step, make_inputs
from benchmarks.speed.plot import plot
from benchmarks.speed.pooling import sdpa_pool
from benchmarks.speed.presets import HALF, NATIVE, PRESETS, ROWS, UNPRUNED
from benchmarks.speed.run import SECTIONS, main, run
from benchmarks.speed.tables import TABLES, all_tables, pooling_table, speed_over_native


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "dry.json"
    sections = [name for name in SECTIONS if name != "memory"]  # that starts a process for each row
    main(["--preset", "dry-run", "--output", str(path), "--sections", *sections])
    assert path.with_suffix(".png").stat().st_size < 200_000
    return json.loads(path.read_text())


def test_every_section_has_its_rows(result):
    rows = {}
    for record in result["records"]:
        assert "failure" not in record
        rows.setdefault(record["section"], set()).add(record.get("name"))
    every = {row.name for row in ROWS}
    assert rows["prefill"] == rows["training"] == every
    assert rows["vit forward"] == rows["vit training"] == every - {"post-ViT k=0.5"}
    assert rows["serving"] == rows["growth with frames"] == {"native", "k=0", "k=0.5"}
    assert rows["parity prefill"] == rows["parity training"] == rows["parity vit forward"] == {"native", "k=0"}
    assert rows["parity serving"] == {"native", "k=0"}
    stages = {record["stage"] for record in result["records"] if record["section"] == "clip"}
    assert stages >= {"decode sampled frames", "decode every frame", "preprocess", "decode beside preprocess"}
    assert rows["ask"] == {"k=0", "k=0.5"}
    assert rows["pooling"] == {"SDPA", "torch"}
    assert rows["packing"] == {"packed", "unpacked"}
    assert rows["large clip"] == {"frame by frame", "all, then resized"}


def test_a_table_for_every_section_that_is_no_plot(result):
    tables = all_tables(result["records"])
    assert set(tables) == set(TABLES) - {"memory"}
    lines = [line for table in tables.values() for line in table.splitlines()]
    rows = [line.split(" | ")[0] for line in lines]
    for label in ("| vision tower, 4 frames", "| training step, 8 frames", "| serving 2 x 2 frames", "| adapter"):
        assert label in rows
    assert any(line.startswith("| 5 of 60 frames | decode every frame |") for line in lines)


def test_memory_of_a_training_step_is_that_of_its_own_process():
    ballast = torch.ones(1 << 28)  # a GiB, which the child must not report as its own
    preset = dataclasses.replace(PRESETS["dry-run"], training=(Shape(1, 64, 64, 640),))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_rss, (preset, HALF))
    assert 0 < peak["bytes_before"] < peak["peak_bytes"] < ballast.nbytes


def test_results_say_where_they_come_from(result):
    assert set(result["logits_distance_from"]) == {"native", "eager"}
    assert {"hardware", "versions", "seed", "date", "load_average", "rounds", "config"} <= result.keys()
    record = next(r for r in result["records"] if r["section"] == "prefill" and r["name"] == "k=0.5")
    for name in ("seconds", "speedup_over_native", "speedup_over_k0"):
        assert record[name]["min"] <= record[name]["median"] <= record[name]["max"]
    assert record["limit"] > 1 and record["teraflops"] > 0


@pytest.mark.parametrize("name", ["native", "eager"])
def test_nothing_is_measured_when_logits_are_wrong(name, monkeypatch):
    def call_wrongly(models, row, inputs, **kwargs):
        outputs = call(models, row, inputs, **kwargs)
        is_eager = models.ours.config._attn_implementation == "eager"
        if row is NATIVE if name == "native" else is_eager:
            outputs.logits = outputs.logits.flip(-1)
        return outputs

    monkeypatch.setattr("benchmarks.speed.run.call", call_wrongly)
    with pytest.raises(ValueError, match=f"'{name}'"):
        next(run(PRESETS["dry-run"], ["vit"]))


def test_what_was_measured_is_there_when_a_section_fails_and_so_are_the_threads(tmp_path, monkeypatch):
    def fail(bench):
        raise KeyboardInterrupt

    monkeypatch.setitem(SECTIONS, "vit", fail)
    path, num_threads = tmp_path / "dry.json", torch.get_num_threads()
    with torch_threads(num_threads + 1):
        with pytest.raises(KeyboardInterrupt):
            main(["--preset", "dry-run", "--sections", "pooling", "vit", "--output", str(path)])
        assert torch.get_num_threads() == num_threads + 1  # a run computes with one
    assert torch.get_num_threads() == num_threads
    assert {record["section"] for record in json.loads(path.read_text())["records"]} == {"pooling"}


@pytest.mark.parametrize("pool", [sdpa_pool, torch_attention_pool])
def test_every_way_to_pool_gives_the_same(pool):
    query, key, value = torch.randn(4, 2, 8), torch.randn(4, 9, 2, 8), torch.randn(4, 9, 2, 8)
    weights = torch.einsum("bhd,bshd->bsh", query, key).mul(0.1).softmax(1)
    torch.testing.assert_close(pool(query, key, value, 0.1), torch.einsum("bsh,bshd->bhd", weights, value))


def test_operations_of_an_attention_by_hand():
    config = STTSMolmoConfig().vision_config  # 1152 wide, 16 heads of 72
    queries, keys = 5, 7
    projections = 2 * 1152 * 1152 * (2 * queries + 2 * keys)  # q and o; k and v
    products = 2 * 2 * 1152 * queries * keys  # with the keys, with the values
    assert attention(config, 1152, queries, keys, queries * keys) == projections + products
    mlp = 2 * 2 * 1152 * 4304 * queries
    assert vision_layer(config, queries, keys, queries * keys) == projections + products + mlp


@torch.no_grad()
def test_operations_of_whole_frames_equal_what_torch_counts():
    preset, shape = PRESETS["dry-run"], Shape(2, 4, 5, 8)
    models = build_models(preset)
    models.native.set_attn_implementation("eager")  # the counter knows products, not every attention kernel
    inputs = make_inputs(models.ours.config, shape, preset.device, preset.dtype)
    with FlopCounterMode(display=False) as counter:
        encode(models, NATIVE, inputs)
    needed = forward_operations(models.ours.config, shape, 0.0, "native")
    assert counter.get_total_flops() == sum(needed[name] for name in VIT_STAGES)


def test_pairs_of_the_language_model_equal_those_of_its_mask():
    config, shape, num_read = STTSMolmoConfig(**PRESETS["dry-run"].config), Shape(1, 3, 5, 8), 2
    kept = 3 * 4 - 6  # 4 tokens a frame, half of them dropped
    is_vision = torch.arange(kept + 8 + 5) < kept
    mask = torch.ones(len(is_vision), len(is_vision)).tril().bool() | (is_vision[:, None] & is_vision)
    text, length = config.text_config, len(is_vision)
    assert text.num_hidden_layers == 2
    first = language_layer(text, length, length, int(mask.sum()))
    last = language_layer(text, num_read, length, int(mask[-num_read:].sum()))
    assert forward_operations(config, shape, 0.5, "scorer", num_read)["language"] == first + last


@pytest.mark.parametrize("videos, frames, delimiters", [(2, 64, 603), (1, 256, 2523)])
def test_limits_of_the_paper_settings_by_hand(videos, frames, delimiters):
    """A prefill of Molmo2-4B without what makes up a hundredth of it: adapter, scorer and the spared last layer."""
    patch = 2 * (4 * 1152**2 + 2 * 1152 * 4304)  # of a ViT layer
    patch_pair = 4 * 1152
    token = 36 * 2 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
    token_pair = 36 * 4 * 4096

    def by_hand(share: float) -> float:
        vision_tokens = share * 81 * frames
        length = vision_tokens + delimiters + 2048
        full, late = (729 * patch + 729**2 * patch_pair, share * 729 * patch + (share * 729) ** 2 * patch_pair)
        language = token * length + token_pair * (length**2 + vision_tokens**2) / 2
        return frames * (4.5 * full + 20.5 * late) + language  # layer 4: all keys, some queries

    config = STTSMolmoConfig(**PRESETS["gpu"].config)
    shape = Shape(videos, frames, 2048, delimiters)
    whole, half = (sum(forward_operations(config, shape, k, "scorer").values()) for k in (0.0, 0.5))
    assert whole / half == pytest.approx(by_hand(1.0) / by_hand(0.5), rel=0.02)
    assert whole == pytest.approx(videos * by_hand(1.0), rel=0.03)


def test_a_row_without_memory_is_reported_and_the_others_measured(tmp_path):
    def out_of_memory():
        raise torch.OutOfMemoryError("of 80 GB\nand a long explanation")

    steps = {NATIVE: out_of_memory, UNPRUNED: lambda: None, HALF: lambda: None}
    measurements = take_turns(steps, CpuClock, rounds=2)
    assert [row for row, measurement in measurements.items() if measurement.failure] == [NATIVE]
    config, operations = STTSMolmoConfig(**PRESETS["dry-run"].config), dict.fromkeys(steps, 1.0)
    records = describe("growth with frames", config, Shape(1, 3, 5, 8), measurements, operations)
    assert records[0]["failure"] == "OutOfMemoryError: of 80 GB" and records[2]["speedup_over_native"] is None
    assert records[2]["speedup_over_k0"]["median"] >= 0
    result = {"preset": "gpu", "hardware": "none", "versions": {"torch": "none"}, "records": records}
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
    cells = [speed_over_native(record) for record in records]
    assert cells == ["failed", "", ""]


def test_a_row_that_fails_later_on_is_left_out_from_then_on():
    calls = []

    def fail_once_warm():
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("CUDA error: invalid configuration argument")

    steps = {"fails": fail_once_warm, "works": lambda: None}
    measurements = take_turns(steps, CpuClock, rounds=3)
    assert len(calls) == 2 and measurements["fails"].times() == {
        "failure": "RuntimeError: CUDA error: invalid configuration argument"
    }
    assert len(measurements["works"].seconds) == 3
    assert ratios(measurements["works"], measurements["fails"]) is None


def test_a_way_to_pool_that_fails_leaves_the_times_of_the_others():
    failed = {"section": "pooling", "name": "SDPA", "blocks": 7, "failure": "RuntimeError", "speedup_over_sdpa": None}
    timed = {"section": "pooling", "name": "torch", "blocks": 7, "seconds": {"median": 0.5}, "speedup_over_sdpa": None}
    lines = pooling_table([failed, timed]).splitlines()
    assert lines[2:] == ["| SDPA | failed |  |", "| torch | 500.0 |  |"]


def test_rows_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    take_turns(steps, WallClock, rounds=3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba"


def test_a_training_step_that_fails_leaves_no_gradient(monkeypatch):
    models = build_models(PRESETS["dry-run"])

    def fail(models, row, inputs):
        models.ours.lm_head.weight.grad = torch.ones_like(models.ours.lm_head.weight)
        raise torch.OutOfMemoryError

    monkeypatch.setattr("benchmarks.speed.models.encode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        encode_training_step(models, NATIVE, {})
    assert models.native.lm_head.weight.grad is None


def test_one_section_with_or_without_checkpointing(tmp_path):
    path = tmp_path / "dry.json"
    main(["--preset", "dry-run", "--sections", "vit", "--no-gradient-checkpointing", "--output", str(path)])
    result = json.loads(path.read_text())
    assert {record["section"] for record in result["records"]} == {"vit forward", "vit training"}
    assert result["gradient_checkpointing"] is False


def test_a_clip_in_4k_takes_less_memory_than_500_mb(tmp_path):
    """Above what the process has before; what is there at a time is the decoder's frames and one of ours."""
    write_large_clip(tmp_path / "clip.mp4", 3840, 2160)
    assert apart(added_bytes, read_frame_by_frame, str(tmp_path / "clip.mp4")) < 500 * 2**20
