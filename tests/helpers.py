"""What several test files share: tiny random models and inputs, clips, clean processes, a Hub of one repository."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.repocard import metadata_load
from PIL import Image
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.pruning_stts_molmo import VideoLayout
from transformers import Molmo2Config, Molmo2ForConditionalGeneration
from transformers.masking_utils import create_causal_mask
from transformers.models.molmo2.video_processing_molmo2 import arange_for_pooling

ROOT = Path(__file__).parents[1]
TINY = ROOT / "checkpoints" / "stts-molmo-tiny"
CLIP = str(ROOT / "examples" / "clips" / "quiet.mp4")

VOCAB_SIZE = 64
IMAGE_TOKEN = 66  # <im_patch>
FRAME_START, FRAME_END = 68, 69
PATCH_DIM = 2 * 2 * 3


def config_dict(grid: int = 6, **stts_config) -> dict:
    """Config of a model with `grid * grid` patches a frame."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "image_size": [2 * grid, 2 * grid],
        "patch_size": 2,
    }
    adapter = {
        "vision_feature_layer": [4, -2],
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "text_hidden_size": 32,
    }
    text = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "additional_vocab_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 30000,
    }
    token_ids = {
        "image_start_token_id": 64,
        "image_end_token_id": 65,
        "image_patch_id": IMAGE_TOKEN,
        "low_res_image_start_token_id": 67,
        "frame_start_token_id": FRAME_START,
        "frame_end_token_id": FRAME_END,
    }
    config = {"vision_config": vision, "adapter_config": adapter, "text_config": text, **token_ids}
    if stts_config:
        config["stts_config"] = {"prune_layer": 1, **stts_config}
    return config


def randomize(model: torch.nn.Module, seed: int = 0):
    """Weights large enough that outputs differ visibly between inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def make_native(grid: int = 6, attn: str = "sdpa") -> Molmo2ForConditionalGeneration:
    config = Molmo2Config(**config_dict(grid))
    config._attn_implementation = attn
    model = Molmo2ForConditionalGeneration(config).eval()
    randomize(model)
    return model


def make_model(grid: int = 6, attn: str = "sdpa", **stts_config) -> STTSMolmoForConditionalGeneration:
    """The native model's weights under STTS."""
    config = STTSMolmoConfig(**config_dict(grid, **{"prune_ratio": 0.5, **stts_config}))
    config._attn_implementation = attn
    model = STTSMolmoForConditionalGeneration(config).eval()
    randomize(model, seed=1)
    missing, unexpected = model.load_state_dict(make_native(grid).state_dict(), strict=False)
    assert not unexpected and all("token_scorer" in name for name in missing)
    return model


def video_tensors(num_frames: list[int], grid: int = 6, window: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the processor returns for videos, with random pixels; frame `t` repeats much of frame `t - 1`."""
    generator = torch.Generator().manual_seed(seed)
    pixels, pooling, grids, offset = [], [], [], 0
    blocks, rows, columns = arange_for_pooling(torch.arange(grid * grid).view(grid, grid), window, window)
    for count in num_frames:
        video = torch.randn(count, grid * grid, PATCH_DIM, generator=generator)
        still = torch.rand(count, grid * grid, 1, generator=generator) < 0.4
        for t in range(1, count):
            video[t] = torch.where(still[t], video[t - 1], video[t])
        pixels.append(video)
        for _ in range(count):
            pooling.append(torch.where(blocks >= 0, blocks + offset, blocks))
            offset += grid * grid
        grids.append([count, rows, columns])
    return {
        "pixel_values_videos": torch.cat(pixels),
        "video_token_pooling": torch.cat(pooling),
        "video_grids": torch.tensor(grids),
    }


def prompt_ids(num_frames: int, tokens_per_frame: int, question: list[int]) -> list[int]:
    """Question after a video, with a timestamp and delimiters around each frame's placeholders."""
    ids = [1]
    for t in range(num_frames):
        ids += [2 + t % 7, FRAME_START, *[IMAGE_TOKEN] * tokens_per_frame, FRAME_END]
    return ids + question


def make_inputs(
    num_frames: list[int | None], grid: int = 6, window: int = 3, side: str = "left", seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch; `None` in `num_frames` is a row of text only."""
    tokens_per_frame = (-(-grid // window)) ** 2
    rows = [
        prompt_ids(count or 0, tokens_per_frame, [10 + index, 20, 30 + (seed + index) % 8, 9])
        for index, count in enumerate(num_frames)
    ]
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    pad = (lambda row, fill: fill + row) if side == "left" else (lambda row, fill: row + fill)
    input_ids = torch.tensor([pad(row, fill) for row, fill in zip(rows, pads, strict=True)])
    attention_mask = torch.tensor([pad([1] * len(row), fill) for row, fill in zip(rows, pads, strict=True)])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN).long(),
    }
    videos = [count for count in num_frames if count]
    return inputs | (video_tensors(videos, grid, window, seed) if videos else {})


def image_inputs(num_images: int) -> dict[str, torch.Tensor]:
    """Prompts with images of one crop: a 3 x 3 high-resolution grid after a 2 x 2 low-resolution one."""
    videos = video_tensors([2 * num_images])
    pooling = videos["video_token_pooling"]
    ids = [1, *([IMAGE_TOKEN] * 8) * num_images, 20, 21, 3]
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(2 * num_images, 36, PATCH_DIM),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 2, 2]] * num_images),
        "image_num_crops": torch.tensor([2] * num_images),
    }


CASES = {
    "video": lambda: make_inputs([4]),
    "videos of different lengths": lambda: make_inputs([4, 6, 1]),
    "video and text": lambda: make_inputs([4, None, 3]),
    "text": lambda: make_inputs([None, None]),
    "image": lambda: image_inputs(1),
    "multi-image": lambda: image_inputs(3),
}


BATCH = [4, None, 6, 1, 3, 2, None, 5]


def solo(inputs, row, num_frames):
    """Row `row` of a batch as a batch of one, without its padding."""
    keep = inputs["attention_mask"][row].bool()
    single = {name: inputs[name][row, keep][None] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    video = sum(1 for count in num_frames[:row] if count)
    if num_frames[row]:
        frames = [count for count in num_frames if count]
        start, stop = sum(frames[:video]), sum(frames[: video + 1])
        single["pixel_values_videos"] = inputs["pixel_values_videos"][start:stop]
        pooling = inputs["video_token_pooling"][start * 4 : stop * 4]
        single["video_token_pooling"] = pooling - start * 36
        single["video_grids"] = inputs["video_grids"][video : video + 1]
    return single


def with_labels(inputs):
    labels = torch.where(inputs["input_ids"] < VOCAB_SIZE, inputs["input_ids"], -100)
    inputs["labels"] = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def layout_of(num_frames, grid=6, window=3):
    videos = video_tensors(num_frames, grid, window)
    rows, columns = videos["video_grids"][0, 1:].tolist()
    blocks = videos["video_token_pooling"][: rows * columns].long()
    return VideoLayout(num_frames, (rows, columns), grid * grid, blocks)


GREEDY = {"max_new_tokens": 6, "do_sample": False}


BEAMS = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}


def new_tokens(model, inputs, **kwargs):
    """Tokens after the prompt, which must come back untouched."""
    sequences = model.generate(**inputs, **kwargs)
    prompt = inputs["input_ids"]
    repeats = len(sequences) // len(prompt)
    assert torch.equal(sequences[:, : prompt.shape[1]], prompt.repeat_interleave(repeats, dim=0))
    return sequences[:, prompt.shape[1] :]


TEXT, VISION, PAD = 0, 1, 2


def tokens(*runs: tuple[int, int]) -> list[int]:
    """Kinds of tokens of one row from `(kind, count)` pairs."""
    return [kind for kind, count in runs for _ in range(count)]


ROWS = {
    "vision first": tokens((VISION, 20), (TEXT, 13)),
    "vision in the middle": tokens((TEXT, 9), (VISION, 15), (TEXT, 9)),
    "vision last": tokens((TEXT, 20), (VISION, 13)),
    "many runs": tokens((TEXT, 3), *[(VISION, 4), (TEXT, 2)] * 5),
    "only vision": tokens((VISION, 33)),
    "two vision tokens": tokens((TEXT, 5), (VISION, 1), (TEXT, 7), (VISION, 1), (TEXT, 19)),
    "one vision token": tokens((TEXT, 7), (VISION, 1), (TEXT, 25)),
    "no vision": tokens((TEXT, 33)),
    "padded on the left": tokens((PAD, 6), (TEXT, 2), (VISION, 20), (TEXT, 5)),
    "padded on the right": tokens((TEXT, 2), (VISION, 20), (TEXT, 3), (PAD, 8)),
    "one position": tokens((PAD, 32), (TEXT, 1)),
}


MASK_CASES = {name: [row] for name, row in ROWS.items()} | {"a batch of all": list(ROWS.values())}


def torch_dense_mask(mm_token_type_ids, attention_mask):
    """What Transformers builds: bool `(batch, 1, length, length)`."""
    config = Molmo2Config().text_config
    config._attn_implementation = "sdpa"
    return create_causal_mask(
        config=config,
        inputs_embeds=torch.empty(*mm_token_type_ids.shape, 1),
        attention_mask=attention_mask,
        past_key_values=None,
        block_sequence_ids=torch.where(mm_token_type_ids == 1, 0, -1),
    )


def outputs_and_gradients(case, build_mask, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """Attention under `build_mask(types, attention_mask)`: the output, and gradients of query, key and value."""
    kinds = torch.tensor(MASK_CASES[case], device=device)
    types, attention_mask = (kinds == VISION).long(), (kinds != PAD).long()
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight = torch.randn(4, len(kinds), 3, kinds.shape[1], 8, generator=generator).bfloat16()
    states = [x.to(device, dtype).requires_grad_() for x in (query, key, value)]
    output = F.scaled_dot_product_attention(*states, attn_mask=build_mask(types, attention_mask), scale=0.3)
    output = output.masked_fill(attention_mask[:, None, :, None] == 0, 0)  # nobody reads padded positions
    gradients = torch.autograd.grad((output * weight.to(device)).sum(), states)
    return [x.float().cpu() for x in (output, *gradients)]


def load_processor(chat_template: str | None = None) -> STTSMolmoProcessor:
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    processor.chat_template = chat_template or processor.chat_template
    return processor


def tokenized_config(**stts_config) -> dict:
    """The tests' tiny geometry for the frames and ids of the tiny checkpoint's processor."""
    tokens = {
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    processor = load_processor()
    config = config_dict(grid=9, **stts_config)
    config |= {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    config["vision_config"] |= {"image_size": [36, 36], "patch_size": 4}
    config["text_config"]["vocab_size"] = min(processor.image_token_ids)
    return config


def make_tokenized_model(**stts_config) -> STTSMolmoForConditionalGeneration:
    model = STTSMolmoForConditionalGeneration(
        STTSMolmoConfig(**tokenized_config(**{"prune_ratio": 0.5, **stts_config}))
    )
    randomize(model)
    return model


NUM_LEVELS = 50  # numbers repeat after this many frames; lossy codecs keep steps of 4 apart


def brightness(number: int) -> int:
    return 20 + 4 * (number % NUM_LEVELS)


def write_video(
    path, num_frames=60, times=None, fps=30, size=(64, 48), codec="libx264", options=None, paint=None, **container
):
    """Write flat grey frames, or the frames that `paint(number, array)` draws; `times` are presentation times in s."""
    options = {"g": "12", "threads": "1"} | (options or {})
    with av.open(path if hasattr(path, "write") else str(path), "w", **container) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            pixels = np.full((size[1], size[0], 3), brightness(number), np.uint8)
            if paint is not None:
                paint(number, pixels)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def put_scratch_elsewhere(folder: Path, monkeypatch):
    """Temporary files go to `folder`, as if that were on a file system of its own: nothing can be moved out of it."""
    folder.mkdir()
    replace = os.replace

    def replace_within_a_file_system(source, destination):
        if folder in Path(source).parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        replace(source, destination)

    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(os, "replace", replace_within_a_file_system)


def frame_number(frame) -> int:
    """The number of a decoded frame, modulo `NUM_LEVELS`."""
    return round((float(frame.float().mean()) - 20) / 4)


def remux(source, target, **container):
    """Copy the packets of a video into another container."""
    with av.open(str(source)) as reader, av.open(str(target), "w", **container) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                writer.mux(packet)
    return target


# Nothing of ours, not even where it is installed.
PREAMBLE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("stts_molmo", "stts_kernels"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
"""


def run_clean(script: str, tmp_path: Path, **env) -> str:
    """Run `script` in a new process with an empty Hub cache and no network but this machine's."""
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    command = [sys.executable, "-c", PREAMBLE + script]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


class HubHandler(BaseHTTPRequestHandler):
    """The three endpoints that the Hub client needs to load a repository."""

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, *args, root: Path, requests: list[str], **kwargs):
        self.root, self.requests = root, requests
        super().__init__(*args, **kwargs)

    def log_message(self, *args):
        pass

    def reply(self, body: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.requests.append(path)
        files = sorted(file for file in self.root.iterdir() if file.is_file())
        if path.startswith("/api/models/team/clips-qa"):
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in files
                ]
                return self.reply(json.dumps(entries).encode(), Content_Type="application/json")
            siblings = [{"rfilename": file.name} for file in files]
            info = {"id": "team/clips-qa", "sha": self.commit, "siblings": siblings, "private": False, "tags": []}
            if (self.root / "README.md").exists():  # the Hub takes these from the card
                card = metadata_load(self.root / "README.md") or {}
                info |= {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
            return self.reply(json.dumps(info).encode(), Content_Type="application/json")
        name = path.rpartition("/")[2]
        if path.startswith("/team/clips-qa/resolve/") and name in {file.name for file in files}:
            body = (self.root / name).read_bytes()
            return self.reply(body, X_Repo_Commit=self.commit, ETag=f'"{name}-{len(body)}"')
        code = "EntryNotFound" if path.startswith("/team/clips-qa/") else "RepoNotFound"
        return self.reply(b"", 404, X_Error_Code=code, X_Repo_Commit=self.commit)

    do_HEAD = do_GET


def save_plain_molmo2(folder: Path) -> Molmo2ForConditionalGeneration:
    """A Molmo2 of random weights with as many layers as the defaults of `convert` and of the fine-tuning need."""
    config = tokenized_config()
    config["vision_config"]["num_hidden_layers"] = 7
    config["adapter_config"]["vision_feature_layer"] = [6, 5]
    model = Molmo2ForConditionalGeneration(Molmo2Config(**config))
    randomize(model)
    model.save_pretrained(folder)
    load_processor().save_pretrained(folder)
    return model


def load_script(name: str) -> ModuleType:
    """A file of examples/ as a module; saved with a run are its arguments, by the name of their module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_joint_rows(path: Path) -> Path:
    """A dataset like the paper's Table 4 in small: videos, an image, two images, text."""
    Image.new("RGB", (36, 36), "red").save(path.with_name("red.png"))
    image, text = {"type": "image", "path": "red.png"}, {"type": "text", "text": "What color is it?"}
    video = {"type": "video", "path": CLIP}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    contents = [[video, text], [image, text], [image, image, text], [text], [video, text]]
    chats = [{"messages": [{"role": "user", "content": content}, answer]} for content in contents]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path
