"""What the bundled checkpoint answers about a few test clips; a test fails when it answers less than this file says.

python -m benchmarks.quality.shipped      # writes benchmarks/results/quality_shipped.json
"""

import json

from stts_molmo.tools.files import written_whole
from transformers.utils.logging import disable_progress_bar

from ..common import RESULTS, TINY, provenance, torch_threads
from .batches import accuracy, hits_by_kind
from .evaluate import clip_batches, load
from .study import NUM_FRAMES

CLIPS = 12
WORLDS = ("still", "handheld")


def answers_of_the_shipped(world: str) -> float:
    """Share of right answers about the first `CLIPS` test clips of a world."""
    model, processor = load(str(TINY))
    batches = clip_batches(processor, CLIPS, NUM_FRAMES, NUM_FRAMES, world=world)
    return accuracy(hits_by_kind(model, batches, processor.tokenizer.eos_token_id))["all"]


@torch_threads(1)
def main():
    disable_progress_bar()
    shares = {world: round(answers_of_the_shipped(world), 4) for world in WORLDS}
    with written_whole(RESULTS / "quality_shipped.json") as draft:
        draft.write_text(json.dumps({**provenance(), "clips": CLIPS, "accuracy": shares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
