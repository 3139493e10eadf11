"""The README's Python quick starts run as they stand, where nothing of ours is installed."""

import re
import shutil

from helpers import ROOT, run_clean


def test_quick_starts(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for folder in ("checkpoints", "examples/clips"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    from_pretrained, with_pipeline, with_trainer = blocks
    output = run_clean(from_pretrained + with_pipeline, tmp_path)
    answer, from_pipeline = output.strip().splitlines()
    assert answer and f"'{answer}'" in from_pipeline
    compile(with_trainer, "README.md", "exec")
