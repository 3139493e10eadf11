"""The model as lmms-eval asks it: `lmms-eval --model stts_molmo --model_args pretrained=CHECKPOINT,prune_ratio=0.5`."""

import re
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from rich.progress import track
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from ...processing_stts_molmo import STTSMolmoProcessor, take_request
from ..answer import require_usable
from ..checkpoint import Checkpoint, find_device
from ..console import stderr
from ..finite import RequireFinite
from ..prompts import render_prompt
from ..video import Clip, read_clip

logger = logging.get_logger(__name__)

MAX_NEW_TOKENS = 1024  # of a task that does not say
SAMPLING = ("temperature", "top_p", "top_k")


class STTSMolmo(lmms):
    """
    Asks a checkpoint one question at a time.

    Args:
        pretrained: directory or Hub id of an STTS checkpoint, or one that is loaded.
        prune_ratio, method, max_vision_tokens, num_frames: the checkpoint's own when not given.
        test_time_scaling: spend what pruning saves on more frames (section 5.3).
        allow_untrained: let a scorer choose that was never trained.
        dtype: of the weights; `"auto"` is the checkpoint's own.
        device: of a single process; each of several has its own.
        batch_size: 1, lmms-eval's own default.

    Raises:
        OSError, ValueError: checkpoint or an option is not usable.
    """

    is_simple = False  # asked with chats, not with text and pictures apart

    def __init__(
        self,
        pretrained: str | Checkpoint,
        prune_ratio: float | None = None,
        method: str | None = None,
        max_vision_tokens: int | None = None,
        num_frames: int | None = None,
        test_time_scaling: bool = False,
        allow_untrained: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
    ):
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"batch_size={batch_size} is not supported: a video fills a batch; leave it out.")
        is_loaded = isinstance(pretrained, Checkpoint)
        device = pretrained.device if is_loaded else find_device(device or "auto")
        self.accelerator = Accelerator(cpu=device.type == "cpu")  # without, processes on CPUs would not find each other
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = self.accelerator.device
        self.checkpoint = pretrained if is_loaded else Checkpoint(pretrained, str(device), dtype)
        self.options = {"prune_ratio": prune_ratio, "method": method, "max_vision_tokens": max_vision_tokens}
        self.sampling = {"num_frames": num_frames, "test_time_scaling": test_time_scaling}
        require_usable(self.checkpoint, **self.sampling, allow_untrained=allow_untrained, **self.options)
        if test_time_scaling:
            prunes = self.checkpoint.config.stts_config.pruning(**self.options).method != "none"
            saving = {"prune_ratio": prune_ratio, "max_vision_tokens": max_vision_tokens}
            self.sampling |= saving if prunes else {"prune_ratio": 0.0}
        self.failures: list[str] = []  # why questions of this process got no answer, for whoever reports

    @property
    def device(self) -> torch.device:
        return self.checkpoint.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers. One about a video that cannot be read is empty, which counts as wrong, and a warning says so."""
        answers = []
        is_shown = self.rank == 0 and stderr.is_terminal
        for request in track(requests, "answering", console=stderr, disable=not is_shown):
            _, to_messages, options, number, task, split = request.args
            if (request.metadata or {}).get("__padding_only__"):  # another process has one more; nobody reads this
                answers.append("")
                continue
            chat = ChatMessages(messages=to_messages(self.task_dict[task][split][number])).to_hf_messages()
            try:
                media = self.read_media(chat)
            except (OSError, ValueError) as error:
                self.failures.append(f"{task}, question {number}: {error}")
                logger.warning(f"No answer to {self.failures[-1]}")
                answers.append("")
                continue
            answers.append(self.answer(chat, *media, options))
        return answers

    def read_media(self, chat: list[dict]) -> tuple[list[Clip], list]:
        parts = [part for message in chat for part in message["content"]]
        clips = [self.read_clip(part) for part in parts if part["type"] == "video"]
        return clips, [part["image"] for part in parts if part["type"] == "image"]

    def read_clip(self, part: dict) -> Clip:
        video = take_request(part)["video"]
        if isinstance(video, str) and Path(video).is_dir():
            return read_folder(self.checkpoint.processor, Path(video), **self.sampling)
        return read_clip(self.checkpoint.processor, video, **self.sampling)

    @torch.no_grad()
    def answer(self, chat: list[dict], clips: list[Clip], images: list, options: dict) -> str:
        model, processor = self.checkpoint.model, self.checkpoint.processor
        inputs = processor(
            text=render_prompt(processor, chat),
            images=images or None,
            videos=[clip.frames for clip in clips] or None,
            video_metadata=[clip.metadata for clip in clips] or None,
            do_sample_frames=False,
            device=model.device,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(
            **inputs, **self.options, **generation_options(options), logits_processor=[RequireFinite()]
        )
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in filter(None, options.get("until") or ()):
            text = text.split(stop)[0]
        return text.strip()

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("stts_molmo writes answers and scores none; take a task with `generate_until`.")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("stts_molmo answers one turn; take a task with `generate_until`.")


def read_folder(processor: STTSMolmoProcessor, folder: Path, **sampling) -> Clip:
    """
    Read those pictures in a folder that the processor samples, frames of a video in the order of their numbers. MVBench
    has some of its videos like this. How many frames a second are is in a name like `video_fps3_hq_segment`.

    Raises:
        FileNotFoundError: there are no pictures.
    """
    files = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise FileNotFoundError(f"There are no pictures in {folder}.")
    files.sort(key=lambda path: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path.name)])
    (*_, fps) = [2, *re.findall(r"fps(\d+)", str(folder))]
    metadata = VideoMetadata(total_num_frames=len(files), fps=float(fps))
    metadata.frames_indices = processor.video_processor.sample_frames(metadata, **sampling)
    return Clip(np.stack([Image.open(files[index]).convert("RGB") for index in metadata.frames_indices]), metadata)


def generation_options(options: dict) -> dict:
    """A task's `generation_kwargs` as `generate` knows them; greedy where the temperature is 0 or not given."""
    wanted = {"max_new_tokens": options.get("max_new_tokens", MAX_NEW_TOKENS), "num_beams": options.get("num_beams", 1)}
    if not options.get("temperature"):
        return {**wanted, "do_sample": False, **dict.fromkeys(SAMPLING)}
    sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    return {**wanted, "do_sample": True, **sampling}
