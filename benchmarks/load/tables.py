"""Tables of a result, as Markdown."""

from ..common import markdown_table
from .presets import RATIOS

# Requests per second without and with EVS at half of the tokens, by concurrency, as its author reports them:
# Cosmos3-Edge on an H200, a clip of 10 s at 3 frames a second, 256 new tokens
# (github.com/vllm-project/vllm/pull/51221).
EVS_PUBLISHED = {
    1: (1.084, 1.189),
    2: (1.835, 1.778),
    4: (2.896, 2.254),
    8: (3.757, 2.563),
    16: (5.312, 2.825),
    32: (6.424, 2.958),
}


def by_concurrency(cells: list[dict]) -> dict[int, dict[float, dict]]:
    table = {}
    for cell in cells:
        table.setdefault(cell["concurrency"], {})[cell["prune_ratio"]] = cell
    return table


def throughput_table(cells: list[dict]) -> str:
    """Requests per second, and what half of the tokens gain here and in EVS's report."""
    rows = []
    for concurrency, row in by_concurrency(cells).items():
        speeds = [row[ratio]["requests_per_second"]["median"] for ratio in RATIOS]
        published = EVS_PUBLISHED.get(concurrency)
        evs = f"{published[1] / published[0]:.2f}" if published else ""
        rows.append([str(concurrency), *(f"{s:.2f}" for s in speeds), f"{speeds[-1] / speeds[0]:.2f}", evs])
    names = [f"k = {ratio:g}" for ratio in RATIOS]
    return markdown_table(["clients", *names, f"gain at {RATIOS[-1]:g}", "EVS, as published"], rows)


def latency_table(cells: list[dict]) -> str:
    """Median and 95th percentile."""
    rows = []
    for concurrency, row in by_concurrency(cells).items():
        times = [row[ratio][name] for name in ("first_token_seconds", "answer_seconds") for ratio in RATIOS]
        rows.append([str(concurrency), *(f"{time['p50']:.2f} ({time['p95']:.2f})" for time in times)])
    names = [f"{what}, k = {ratio:g}" for what in ("first token", "answer") for ratio in RATIOS]
    return markdown_table(["clients", *names], rows)


def cache_table(cells: list[dict]) -> str:
    """What a request takes of the KV cache; the most clients that were measured."""
    last = by_concurrency(cells)[max(cell["concurrency"] for cell in cells)]
    rows = [
        [f"{ratio:g}", f"{last[ratio]['kv_tokens']:.0f}", str(last[ratio]["requests_that_fit"])] for ratio in RATIOS
    ]
    return markdown_table(["k", "tokens in the cache for each request", "requests that fit"], rows)


def all_tables(cells: list[dict]) -> dict[str, str]:
    return {
        "throughput": throughput_table(cells),
        "latency": latency_table(cells),
        "cache": cache_table(cells),
    }
