"""What the tests share: a trained checkpoint with heads that the CPU's kernels have, and both engines' answers."""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from stts_molmo import STTSMolmoForConditionalGeneration, STTSMolmoProcessor
from vllm import LLM, SamplingParams

from benchmarks.quality.scenes import FIRST_SEED
from benchmarks.quality.worlds import make_film, write_clip

ROOT = Path(__file__).parents[3]
TINY = ROOT / "checkpoints" / "stts-molmo-tiny"
HEAD_DIM = 32


def widen_heads(source: Path, target: Path, head_dim: int = HEAD_DIM) -> Path:
    """
    A copy of a checkpoint that computes the same with wider heads of the language model: vLLM's attention on a CPU has
    24 channels nowhere. The new channels are zeros, which neither norms nor rotations mix with the others; norms and
    frequencies make up for the new width.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((target / "config.json").read_text())
    text = config["text_config"]
    before, half = text["head_dim"], text["head_dim"] // 2
    grown = head_dim / before

    def widen(weight: torch.Tensor, dim: int) -> torch.Tensor:
        """Each head's two halves, which a rotation mixes, to where they are in a wide head."""
        heads = weight.unflatten(dim, (-1, 2, half)).movedim(dim + 2, -1)
        heads = torch.nn.functional.pad(heads, (0, head_dim // 2 - half))
        return heads.movedim(-1, dim + 2).flatten(dim, dim + 2).contiguous()

    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if ".language_model." not in name or ".self_attn." not in name:
            continue
        if "_norm." in name:
            # The mean square of a head shrinks with the share of zeros, and queries are scaled by the new width.
            scale = grown**-0.5 * (grown**0.5 if "q_norm" in name else 1)
            weights[name] = widen(weight * scale, 0)
        else:
            weights[name] = widen(weight, 1 if "o_proj" in name else 0)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    rope = text["rope_parameters"]
    rope["rope_theta"] = math.exp(math.log(rope["rope_theta"]) * grown)
    text["head_dim"] = head_dim
    (target / "config.json").write_text(json.dumps(config))
    return target


QUESTIONS = ("What color is the still shape?", "Where does the ball end?", "What color is the lamp at the end?")
NEW_TOKENS = 8
MAX_TOKENS = 1024  # of a prompt and its answer
BLOCK_SIZE = 32  # of the KV cache; a video's prompt has several blocks
LOGPROB_TOLERANCE = 2e-4  # in float32; some of the tokens have a probability of one in thousands


class Ask(NamedTuple):
    """One request: a video file, a question, and options of the plugin."""

    clip: Path
    question: str = QUESTIONS[0]
    prune_ratio: float | None = None
    method: str | None = None
    max_vision_tokens: int | None = None
    num_frames: int | None = None

    @property
    def chat(self) -> list[dict]:
        content = [{"type": "video", "path": str(self.clip)}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]

    @property
    def options(self) -> dict:
        names = ("prune_ratio", "method", "max_vision_tokens", "num_frames")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Answer(NamedTuple):
    """
    tokens: exactly `NEW_TOKENS` greedy ones.
    logprobs: of these.
    num_prompt_tokens: that the language model read.
    """

    tokens: list[int]
    logprobs: list[float]
    num_prompt_tokens: int


def make_clips(folder: Path) -> list[Path]:
    """Ten clips of 4 to 13 frames at two frames a second."""
    clips = []
    for index in range(10):
        clips.append(folder / f"{index}.mp4")
        write_clip(str(clips[-1]), make_film(FIRST_SEED["demo"] + index, "still", level=index % 3, beats=4 + index))
    return clips


class Reference:
    """Transformers' answers."""

    def __init__(self, checkpoint: Path):
        self.model = STTSMolmoForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.processor = STTSMolmoProcessor.from_pretrained(checkpoint)

    def prompt(self, ask: Ask) -> str:
        return self.processor.apply_chat_template(ask.chat, add_generation_prompt=True)

    def __call__(self, ask: Ask, chat=None, causal: bool = False, can_end: bool = False) -> Answer:
        """
        Args:
            chat: in place of the request's own.
            causal: as if vision tokens did not see those behind them.
            can_end: up to `NEW_TOKENS` tokens.
        """
        inputs = self.processor.apply_chat_template(
            chat or ask.chat,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={} if ask.num_frames is None else {"num_frames": ask.num_frames},
        )
        if causal:
            inputs["mm_token_type_ids"].zero_()
        options = {name: value for name, value in ask.options.items() if name != "num_frames"}
        least = 0 if can_end else NEW_TOKENS
        lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": least, "do_sample": False}
        output = self.model.generate(
            **inputs, **options, **lengths, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = [
            logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, tokens, strict=True)
        ]
        return Answer(tokens, logprobs, output.hidden_states[0][0].shape[1])


class Engine:
    """vLLM in a process of its own, as it runs by default: there it changes the class of the language model."""

    def __init__(self, checkpoint, reference, **options):
        self.reference = reference
        self.llm = LLM(
            str(checkpoint),
            dtype="float32",
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_model_len=MAX_TOKENS,
            max_num_batched_tokens=4 * MAX_TOKENS,
            block_size=BLOCK_SIZE,
            **options,
        )

    def requests(self, asks: list[Ask]) -> list[dict]:
        return [
            {
                "prompt": self.reference.prompt(ask),
                "multi_modal_data": {"video": ask.clip.read_bytes()},
                "mm_processor_kwargs": ask.options,
            }
            for ask in asks
        ]

    def outputs(self, requests: list[dict], **kwargs) -> list:
        lengths = {"max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS}
        return self.llm.generate(
            requests, SamplingParams(temperature=0, logprobs=0, **lengths), use_tqdm=False, **kwargs
        )

    def __call__(self, asks: list[Ask], **kwargs) -> list[Answer]:
        answers = []
        for output in self.outputs(self.requests(asks), **kwargs):
            (written,) = output.outputs
            logprobs = [step[token].logprob for step, token in zip(written.logprobs, written.token_ids, strict=True)]
            answers.append(Answer(list(written.token_ids), logprobs, len(output.prompt_token_ids)))
        return answers
