"""Tables of a result, as Markdown. Medians of the rounds; speeds are those of native Molmo2 = 1."""

from collections.abc import Callable, Iterable, Iterator

from ..common import markdown_table

SPEED_ROWS = ("k=0", "k=0.3", "k=0.4", "k=0.5", "cosine k=0.5", "ToMe k=0.5", "post-ViT k=0.5")
SPEED_SECTIONS = {
    "vit forward": "vision tower, {frames} frames",
    "vit training": "the same, forward and backward",
    "prefill": "prefill, {frames} frames, {text} tokens of text",
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


def limit(record: dict) -> str:
    """What the operations saved allow."""
    return "" if "failure" in record else f"{record['limit']:.2f}"


def by_shape(records: list[dict], sections: Iterable[str]) -> Iterator[tuple[str, list[dict]]]:
    """A label for each of the sections and its shapes, and their records."""
    for section in sections:
        chosen = [record for record in records if record["section"] == section]
        for shape in dict.fromkeys(map(shape_of, chosen)):
            of_shape = [record for record in chosen if shape_of(record) == shape]
            yield SPEED_SECTIONS[section].format(**of_shape[0]), of_shape


def shape_of(record: dict) -> tuple[int, int, int]:
    return record["videos"], record["frames"], record["text"]


def speed_table(records: list[dict]) -> str:
    """Speed over native of every row; one line for each section and shape."""
    rows = [
        [label, *by_name(of_shape, speed_over_native, SPEED_ROWS)]
        for label, of_shape in by_shape(records, SPEED_SECTIONS)
    ]
    return markdown_table(["speed, native = 1", *SPEED_ROWS], rows)


def speed_summary(records: list[dict]) -> str:
    """Speed over native by ratio, beside what the operations saved allow at half of the tokens."""
    names = ("k=0.3", "k=0.4", "k=0.5")
    rows = [
        [label, *by_name(of_shape, speed_over_native, names), *by_name(of_shape, limit, names[-1:])]
        for label, of_shape in by_shape(records, ("vit forward", "prefill", "training"))
    ]
    return markdown_table(["speed, native = 1", "30 %", "40 %", "50 %", "operations allow at 50 %"], rows)


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


def packing_table(records: list[dict]) -> str:
    """A training step on samples of different lengths."""
    rows = []
    for record in records:
        if record["section"] == "packing":
            speed = record["speedup_over_unpacked"]
            seconds = f"{record['seconds']['median']:.2f}" if "seconds" in record else "failed"
            speeds = [f"{speed['median']:.2f}" if speed else "", f"{record['limit']:.2f}"]
            rows.append([record["name"], str(record["rows"]), seconds, *speeds])
    header = ["training step, videos of different lengths", "rows", "s", "speed, unpacked = 1", "operations allow"]
    return markdown_table(header, rows)


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


def large_table(records: list[dict]) -> str:
    """Reading a clip of high resolution."""
    chosen = [record for record in records if record["section"] == "large clip"]
    rows = [
        [
            record["name"],
            f"{record['added_bytes'] / 2**20:.0f}",
            f"{record['seconds']['median']:.1f}",
            f"{record['times_frame_by_frame']['median']:.2f}",
        ]
        for record in chosen
    ]
    what = "{frames} frames of {width} x {height}".format(**chosen[0])
    return markdown_table([what, "MB added at the peak", "CPU s", "times the first"], rows)


def growth_table(records: list[dict]) -> str:
    """Seconds of a prefill, and the speed at k = 0.5 beside what the operations saved allow."""
    names = ("native", "k=0", "k=0.5")
    chosen = [record for record in records if record["section"] == "growth with frames"]

    def seconds(record: dict) -> str:
        return "failed" if "failure" in record else f"{record['seconds']['median']:.1f}"

    rows = []
    for frames in dict.fromkeys(record["frames"] for record in chosen):
        of_shape = [record for record in chosen if record["frames"] == frames]
        speeds = by_name(of_shape, speed_over_native, names[-1:]) + by_name(of_shape, limit, names[-1:])
        rows.append([str(frames), *by_name(of_shape, seconds, names), *speeds])
    return markdown_table(["frames", *(f"{name}, s" for name in names), "speed, native = 1", "operations allow"], rows)


# What draws a table, and the sections it draws.
TABLES = {
    "speed": (speed_table, SPEED_SECTIONS),
    "parity": (parity_table, PARITY_SECTIONS),
    "stages": (stage_table, ("stages",)),
    "memory": (memory_table, ("memory",)),
    "ask": (ask_table, ("ask",)),
    "pooling": (pooling_table, ("pooling",)),
    "packing": (packing_table, ("packing",)),
    "growth": (growth_table, ("growth with frames",)),
    "clip": (clip_table, ("clip",)),
    "large": (large_table, ("large clip",)),
}


def all_tables(records: list[dict]) -> dict[str, str]:
    """The tables of the sections that were measured, by name."""
    measured = {record["section"] for record in records}
    return {name: draw(records) for name, (draw, sections) in TABLES.items() if measured & set(sections)}
