"""Tables of a result, as Markdown. Medians of the rounds; speeds are those of native Molmo2 = 1."""

from collections.abc import Callable

from ..common import markdown_table

SPEED_ROWS = ("k=0", "k=0.3", "k=0.4", "k=0.5", "cosine k=0.5", "ToMe k=0.5", "post-ViT k=0.5")
SPEED_SECTIONS = {
    "vit forward": "vision tower, {frames} frames",
    "vit training": "the same, forward and backward",
    "prefill": "prefill, {frames} frames",
    "training": "training step, {frames} frames",
    "serving": "serving {videos} x {frames} frames",
}
PARITY_SECTIONS = {
    "parity vit forward": "vision tower, {frames} frames",
    "parity prefill": "prefill, {frames} frames",
    "parity training": "training step, {frames} frames",
    "parity serving": "serving {videos} x {frames} frames",
}
STAGES = {
    "early_vit": "ViT, layers 0 to l",
    "score": "scoring",
    "late_vit": "ViT, the layers after",
    "adapter": "adapter",
    "language": "LLM",
    "other": "between these",
    "new_token": "each new token",
}


def by_name(records: list[dict], cell: Callable[[dict], str], names: tuple[str, ...]) -> list[str]:
    cells = {record["name"]: cell(record) for record in records}
    return [cells.get(name, "") for name in names]


def speed_over_native(record: dict) -> str:
    if "failure" in record:
        return "failed"
    speed = record["speedup_over_native"]
    return "" if speed is None else f"{speed['median']:.2f}"


def speed_table(records: list[dict]) -> str:
    """Speed over native of every row; one line for each section and shape."""
    rows = []
    for section, label in SPEED_SECTIONS.items():
        chosen = [record for record in records if record["section"] == section]
        for videos, frames in dict.fromkeys((record["videos"], record["frames"]) for record in chosen):
            of_shape = [record for record in chosen if (record["videos"], record["frames"]) == (videos, frames)]
            cells = by_name(of_shape, speed_over_native, SPEED_ROWS)
            rows.append([label.format(videos=videos, frames=frames), *cells])
    return markdown_table(["speed, native = 1", *SPEED_ROWS], rows)


def parity_table(records: list[dict]) -> str:
    """k = 0 beside native, in many rounds; the spread is that of single rounds."""
    rows = []
    for section, label in PARITY_SECTIONS.items():
        for record in records:
            if (record["section"], record.get("name")) == (section, "k=0") and record.get("speedup_over_native"):
                ours = record["speedup_over_native"]
                spread = f"{ours['min']:.2f} to {ours['max']:.2f}"
                rows.append([label.format(**record), f"{ours['median']:.3f}", spread])
    return markdown_table(["k = 0, native = 1", "median", "single rounds"], rows)


def stage_table(records: list[dict]) -> str:
    """Milliseconds of each stage of a request."""
    chosen, names = [record for record in records if record["section"] == "stages"], ("native", "k=0", "k=0.5")
    rows = []
    for stage, label in STAGES.items():
        of_stage = [record for record in chosen if record["stage"] == stage]
        rows.append([label, *by_name(of_stage, lambda record: f"{1000 * record['seconds']['median']:.0f}", names)])
    return markdown_table([f"milliseconds, {chosen[0]['frames']} frames", *names], rows)


def memory_table(records: list[dict]) -> str:
    """What a training step takes on top of model and inputs."""
    chosen = [record for record in records if record["section"] == "memory"]
    native = chosen[0]["peak_bytes"] - chosen[0]["bytes_before"]
    rows = []
    for record in chosen:
        taken = record["peak_bytes"] - record["bytes_before"]
        rows.append([record["name"], f"{taken / 2**20:.0f}", f"{100 * taken / native:.0f} %"])
    return markdown_table([f"memory of a training step, {chosen[0]['frames']} frames", "MiB", "of native"], rows)


def ask_table(records: list[dict]) -> str:
    """`stts-molmo ask` with the bundled checkpoint, from file to answer."""
    chosen = [record for record in records if record["section"] == "ask"]
    rows = [
        [record["name"], f"{1000 * record['seconds']['median']:.0f}", f"{record['speedup_over_k0']['median']:.3f}"]
        for record in chosen
    ]
    return markdown_table(["`stts-molmo ask`, tiny model", "milliseconds", "speed, k = 0 is 1"], rows)


def pooling_table(records: list[dict]) -> str:
    """Forward and backward of the attention that pools blocks."""
    chosen = [record for record in records if record["section"] == "pooling"]
    rows = []
    for record in chosen:
        speed = record["speedup_over_sdpa"]
        milliseconds = f"{1000 * record['seconds']['median']:.1f}" if "seconds" in record else "failed"
        rows.append([record["name"], milliseconds, f"{speed['median']:.2f}" if speed else ""])
    return markdown_table([f"pooling {chosen[0]['blocks']} blocks", "milliseconds", "speed, SDPA is 1"], rows)


def clip_table(records: list[dict]) -> str:
    """Reading video files; frames a second are those of the file."""
    rows = [
        [
            f"{record['frames']} of {record['file_frames']} frames",
            record["stage"],
            f"{1000 * record['seconds']['median']:.0f}",
            f"{1000 * record['wall_seconds']['median']:.0f}",
            f"{record['files'] * record['file_frames'] / record['wall_seconds']['median']:.0f}"
            if "preprocess" not in record["stage"]
            else "",
        ]
        for record in records
        if record["section"] == "clip"
    ]
    return markdown_table(
        ["640 x 360, 30 frames a second", "", "CPU ms", "wall ms", "frames of the file a second"], rows
    )


TABLES = {
    "prefill": speed_table,
    "parity prefill": parity_table,
    "stages": stage_table,
    "memory": memory_table,
    "ask": ask_table,
    "pooling": pooling_table,
    "clip": clip_table,
}


def all_tables(result: dict) -> str:
    """The tables of the sections that were measured."""
    sections = {record["section"] for record in result["records"]}
    return "\n".join(draw(result["records"]) for section, draw in TABLES.items() if section in sections)
