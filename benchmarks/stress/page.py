"""docs/robustness.md, from the JSON that the run wrote."""

from ..common import ROOT, markdown_table
from .files import CODECS, DAMAGES

PAGE = ROOT / "docs" / "robustness.md"

# What is promised, and the tests that fail where it is not kept.
PROMISES = {
    "**Contradictions in a file are reported**: a clock that goes back, frames or seconds that are declared and not "
    "there, a size or a time that cannot be.": [
        "test_damaged_videos.py::test_joined_recordings_lose_nothing",
        "test_video_decoding.py::test_truncated_video_gives_the_frames_that_are_there",
        "test_damaged_videos.py::test_a_far_time_is_refused_before_memory_is_asked_for",
        "test_damaged_videos.py::test_a_declared_size_beyond_the_limit",
    ],
    "**Damage that the decoder or the container flags is reported**, with how many of the sampled frames it hits.": [
        "test_damaged_videos.py::test_corrupt_frames_are_counted",
        "test_damaged_videos.py::test_packets_that_the_container_marks_are_counted",
        "test_stress.py::test_a_short_part_of_each_section_loses_nothing",
    ],
    "**Nothing is unpickled unsafely**: weights are safetensors, whatever the files are called. Code of a checkpoint "
    "runs only with `trust_remote_code=True`, which Transformers asks for.": [
        "test_stress.py::test_a_short_part_of_each_section_loses_nothing",
        "test_house.py::test_the_installed_package_needs_no_trust_in_remote_code",
    ],
    "**No request leaves the machine unless the caller named it**: a link in the call or the chat, or a checkpoint on "
    "the Hub. A link leads to the public internet alone, at every redirect, unless `allow_private_hosts` is set.": [
        "test_downloads.py::test_machines_of_the_local_network_are_not_asked",
        "test_downloads.py::test_each_redirect_is_checked",
        "test_downloads.py::test_a_name_that_changes_its_address_is_checked_again",
        "test_video_decoding.py::test_playlists_are_refused",
        "test_stress.py::test_importing_and_answering_ask_nobody",
    ],
    "**Nothing half-written is taken for whole**: a run that is killed leaves the old file or the new one, and "
    "training goes on from the newest checkpoint that is whole.": [
        "test_interrupted.py::test_a_killed_writer_s_scratch_folder_goes_with_the_next_run",
        "test_interrupted.py::test_the_newest_checkpoint_that_is_whole",
        "test_finetune_example.py::test_killed_and_resumed_ends_at_the_same_loss",
    ],
}

HEAD = """<!-- Written by `make stress`. -->

# What was tried against it

`make stress` attacks the program: damaged files, names and links that lead elsewhere, small inputs that ask for much,
kills at any moment, many threads. Each case ends in one of three ways. *Held*: it went on, and what came out was looked
at. *Refused*: one `ValueError` or missing-file error with a sentence. *Lost*: anything else, such as another exception,
an end of the process, no end, more memory than the case's bound, a wrong or half-written result, a secret in a message,
a server that was asked. A short, fixed part of all this runs in `make test`.

## What is promised
"""

FUZZING = """
## How

The {variants} damaged files are of {containers} containers, 36 frames each, with one to three of {damages} kinds of
damage: bits flipped, bytes overwritten, the end cut off, a piece cut out or repeated, extreme values near the start,
the file twice. Variant *i* is of container *i* mod {containers} and follows from the seed `[{seed}, i]` alone. *Held*
means here: frames in order, at finite times that ascend, and a warning wherever a frame that was sampled had a mark of
FFmpeg's as corrupt ({told} of the variants had a warning). In {unmarked} more a decoder that reads all frames in order
marks one of those that were sampled, and the one that jumps and works in threads did not: it had found the frame whole
behind a key frame, or FFmpeg's threads had output it before its mark was made.

Kills come at moments drawn from the same seed. Each section runs in processes of its own, so that a crash or a hang is
counted and not suffered.

Not tried: what needs a GPU, a full disk, a machine that loses power, other FFmpeg builds than the one PyAV brings.

Tried on {date} with {versions} on {hardware}.
All sections took {seconds:.0f} seconds, others at work on the machine or not. From
[stress.json](../benchmarks/results/stress.json).
"""


def render(result: dict) -> str:
    """The page."""
    rows = [row for section in result["sections"].values() for row in section["rows"]]
    text = HEAD
    for promise, tests in PROMISES.items():
        text += f"\n- {promise}\n  " + ",\n  ".join(f"`{test}`" for test in tests) + "\n"
    header = ["what", "tried", "held", "refused", "lost"]
    table = [
        [row["kind"], *(f"{row[name]:,}" for name in header[1:4]), str(len(row["lost"]) or "nothing")] for row in rows
    ]
    text += "\n## What came of it\n\n" + markdown_table(header, table)
    damaged = next((row for row in rows if row["kind"] == "damaged video files"), {"tried": 0, "notes": {}})
    return text + FUZZING.format(
        variants=f"{damaged['tried']:,}",
        told=f"{damaged['notes'].get('told', 0):,}",
        unmarked=damaged["notes"].get("marked only where all is decoded in order", 0),
        containers=len(CODECS),
        damages=len(DAMAGES),
        seed=result["seed"],
        date=result["date"],
        hardware=result["hardware"],
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        seconds=sum(section["seconds"] for section in result["sections"].values()),
    )
