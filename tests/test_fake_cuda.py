"""
The CUDA path without a GPU: fake tensors have a device, a dtype and a shape but no values, and raise where a value is
asked for. Between the pixels and the LLM's tokens nothing waits for the device, and it is one graph.
"""

import contextlib

import pytest
import torch
from helpers import layout_of, make_model, video_tensors
from stts_molmo import attention_stts_molmo
from stts_molmo.attention_stts_molmo import (
    VisionCausalAttention,
    are_flash_operators_known,
    has_flash_kernel,
    varlen_attention,
)
from stts_molmo.modeling_stts_molmo import add_auxiliary_loss
from stts_molmo.pruning_stts_molmo import VideoLayout
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

varlen = pytest.importorskip("torch.nn.attention.varlen")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    if attention_stts_molmo.varlen_attn is None:
        pytest.skip(f"varlen attention of torch {torch.__version__} has no window")
    if not torch.cuda.is_available():  # torch remembers the answer, and real devices want the true one
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def fake_encoder(mode: FakeTensorMode, **stts_config):
    """
    Vision tower and adapter in bfloat16 on a CUDA device, as a function of pixels, layout, survivors and method; and
    what makes the first three for videos of some numbers of frames.
    """
    model = make_model(**stts_config).model
    with mode:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                module.register_parameter(name, torch.nn.Parameter(fake))

    def encode(pixels: torch.Tensor, layout: VideoLayout, num_kept: list[int], method: str) -> torch.Tensor:
        vision = model.vision_tower(pixels, layout=layout, num_kept=num_kept, method=method)
        return model.multi_modal_projector(vision.last_hidden_state, vision.pooled_patches_idx).last_hidden_state

    return encode


def fake_videos(mode: FakeTensorMode, num_frames: list[int]) -> tuple[torch.Tensor, VideoLayout, list[int]]:
    """Pixels of videos on a CUDA device, their layout, and how many of their tokens survive."""
    layout, pixels = layout_of(num_frames), video_tensors(num_frames)["pixel_values_videos"]
    with mode:
        blocks = torch.empty(layout.blocks.shape, dtype=torch.int64, device="cuda")
        pixels = torch.empty(pixels.shape, dtype=torch.bfloat16, device="cuda")
    return pixels, layout._replace(blocks=blocks), layout.num_kept(0.5)


@pytest.mark.parametrize("method", ["scorer", "cosine", "random", "tome"])
def test_nothing_waits_for_the_device(method):
    mode = FakeTensorMode()
    encode, videos = fake_encoder(mode), fake_videos(mode, [4, 6])
    with mode:
        tokens = encode(*videos, method)
    assert tokens.shape == (20, 32) and tokens.is_cuda


def test_waiting_would_be_found():
    mode = FakeTensorMode()
    encode, videos = fake_encoder(mode, refill_lone_frames=True), fake_videos(mode, [4, 6])
    with mode, pytest.raises(DataDependentOutputException):  # the authors' bins are filled on the host
        encode(*videos, "scorer")


@pytest.mark.parametrize(
    ("method", "use_kernels"), [("scorer", False), ("scorer", True), ("cosine", False), ("tome", False)]
)
def test_vision_tower_and_adapter_are_one_graph_for_each_length(method, use_kernels):
    mode, graphs = FakeTensorMode(), []

    def run_as_it_is(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    encode = torch.compile(
        fake_encoder(mode, use_kernels=use_kernels), backend=run_as_it_is, fullgraph=True, dynamic=False
    )
    for num_frames, expected, num_graphs in ([4, 6], 20, 1), ([4, 6], 20, 1), ([8], 16, 2):
        videos = fake_videos(mode, num_frames)
        with mode:
            assert encode(*videos, method).shape == (expected, 32)
        assert len(graphs) == num_graphs


def test_varlen_attention_is_that_of_flash(monkeypatch):
    """cuDNN's would be built for every new number of survivors, while the device waits."""
    select = getattr(varlen, "_select_backend", None)
    if select is None:
        pytest.skip(f"torch {torch.__version__} has no other kernel")
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda device_index: True)
    monkeypatch.setattr(varlen, "_cudnn_version", lambda query: 92600)
    chosen = []
    monkeypatch.setattr(varlen, "_select_backend", lambda *args: chosen.append(select(*args)) or chosen[-1])
    with FakeTensorMode():
        states = torch.empty(40, 4, 16, dtype=torch.bfloat16, device="cuda")
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        varlen.varlen_attn(states, states, states, offsets, offsets, 36, 36)
        varlen_attention(states, states, states, offsets, offsets, 36)
    assert chosen == [varlen._CUDNN_ATTENTION_BACKEND, varlen._FLASH_ATTENTION_BACKEND]


@pytest.mark.parametrize("num_items_in_batch", ["none", "number", "first device", "second device"])
def test_a_model_on_two_devices_adds_up_its_losses(num_items_in_batch):
    with FakeTensorMode():
        aux_loss, loss = torch.empty((), device="cuda:0"), torch.empty((), device="cuda:1")
        num_items = {"none": None, "number": 7, "first device": aux_loss, "second device": loss}[num_items_in_batch]
        total = add_auxiliary_loss(loss, aux_loss, 3, num_items)
    assert total.device == loss.device


class Context:
    """What `torch.autograd` gives a function: its engine runs no backward without a GPU."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("num_vision", [0, 1, 20])
def test_attention_without_a_mask_gives_torchs_kernels_what_they_take(num_vision):
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 4, 50, 16, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        vision = torch.empty(num_vision, dtype=torch.int64, device="cuda")
        ctx = Context()
        output = VisionCausalAttention.forward(ctx, query, key, value, vision, 0.25)
        gradients = VisionCausalAttention.backward.__wrapped__(ctx, output)[:3]
    for tensor in (output, *gradients):
        assert (tensor.shape, tensor.dtype, tensor.device) == (query.shape, query.dtype, query.device)


@pytest.mark.parametrize("reason", ["Turing", "flash is off", "only plain kernels"])
def test_half_precision_without_flash_goes_frame_by_frame(reason, monkeypatch):
    if reason == "Turing":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    elif reason == "flash is off":
        monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    monkeypatch.setattr(attention_stts_molmo, "varlen_attn", pytest.fail)
    states = torch.randn(5, 2, 8, dtype=torch.float16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    with sdpa_kernel(SDPBackend.MATH) if reason == "only plain kernels" else contextlib.nullcontext():
        outputs = varlen_attention(states, states, states, offsets, offsets, 3)
    assert outputs.shape == states.shape


def test_other_operators_than_the_known_ones_mean_a_dense_mask(monkeypatch):
    states = torch.empty(1)
    assert has_flash_kernel(states, 8)
    monkeypatch.setitem(
        attention_stts_molmo.FLASH_ARGUMENTS, "_scaled_dot_product_flash_attention_for_cpu", "query key value"
    )
    are_flash_operators_known.cache_clear()
    assert not has_flash_kernel(states, 8)
    are_flash_operators_known.cache_clear()
