"""docs/measurements.md, docs/study.md and the tables of README.md are what their command writes from the results."""

import json
import shutil
from collections import defaultdict

import pytest

from benchmarks import measurements
from benchmarks.common import RESULTS, ROOT

README = "Before.\n<!-- accuracy -->stale<!-- /accuracy -->\nBetween.\n<!-- speed -->\n<!-- /speed -->\nAfter.\n"
NAMES = ("accuracy", "speed")


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the committed results, and what the command writes there."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(RESULTS, root / "benchmarks" / "results", ignore=shutil.ignore_patterns("*.png"))
    (root / "README.md").write_text(README)
    measurements.write(root)
    return root


@pytest.mark.parametrize("page", ["docs/measurements.md", "docs/study.md"])
def test_the_pages_are_what_their_command_writes(written, page):
    command = "python -m benchmarks.measurements"
    assert (ROOT / page).read_text(encoding="utf-8") == (written / page).read_text(encoding="utf-8"), f"run `{command}`"


def test_every_figure_is_drawn(written):
    drawn = {path.name for path in (written / "benchmarks" / "results").glob("*.png")}
    assert drawn == {path.name for path in RESULTS.glob("*.png")}


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_what_the_command_writes(written, name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if f"<!-- {name} -->" not in readme:
        pytest.skip(f"README.md has no <!-- {name} --> yet")
    assert between(readme, name) == between((written / "README.md").read_text(), name)


def test_a_table_stands_where_its_markers_are_and_all_else_stays(written):
    readme = (written / "README.md").read_text()
    expected = README
    for name in NAMES:
        table = between(readme, name)
        assert table.startswith("\n\n| ") and table.endswith(" |\n\n")
        expected = expected.replace(f"<!-- {name} -->{between(README, name)}", f"<!-- {name} -->{table}")
    assert readme == expected and "stale" not in readme


@pytest.mark.parametrize("text", ["", "<!-- speed -->", "<!-- speed --><!-- /speed -->" * 2])
def test_a_readme_without_one_place_for_a_table_is_refused(text):
    with pytest.raises(ValueError, match="places between `<!-- speed -->`"):
        measurements.fill(text, "speed", "| |\n")


def test_a_result_of_a_gpu_appears(monkeypatch):
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    pooling = results["pooling_cpu"] | {"hardware": "a GPU"}
    monkeypatch.setattr(measurements, "quality_tables", lambda *_: defaultdict(str))
    study = measurements.Study(results["quality_study"])
    without = measurements.page(results, study)
    page = measurements.page(results | {"pooling_gpu": pooling}, study)
    assert "Nothing was ever measured" in without and "Nothing was ever measured" not in page
    section = page[page.index("### pooling_gpu") : page.index("The commands check first")]
    assert "| SDPA | 121.4 | 1.00 |" in section and "; a GPU; " in section
