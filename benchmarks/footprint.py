"""
What a published pipeline holds, and what one learnt step of its denoiser keeps in memory: counted, without its weights.

Parameters are counted on the meta device. Memory is that of the real classes on tensors without data
(`FakeTensorMode`), operator by operator: what autograd saves, what lives between, what the backward pass needs. Not in
it: the workspaces of kernels, and what an allocator wastes.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from benchmarks.common import LORA_TARGETS, MODELS


@dataclass(frozen=True)
class Published:
    """
    The parts of a pipeline, built from the configurations in its repository, and how it calls its denoiser.

    Args:
        denoiser, others (functions): Build the denoiser, and the text encoders and the VAE.
        inputs (function): What the denoiser is called with, for `samples` of `side` x `side` latents and `text` tokens.
        calls, samples (`int`): Calls of the denoiser for one guided prediction, and samples in each for one picture.
    """

    denoiser: Callable[[], nn.Module]
    others: dict[str, Callable[[], nn.Module]]
    inputs: Callable[[int, int, int], dict[str, Any]]
    calls: int = 1
    samples: int = 1


def clip(make: type[nn.Module], **sizes: int) -> Callable[[], nn.Module]:
    return lambda: make(CLIPTextConfig(vocab_size=49408, **sizes))


CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)


def t5_xxl() -> nn.Module:
    sizes = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def qwen2_5_vl_7b() -> nn.Module:
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    text |= dict(num_key_value_heads=4, vocab_size=152064)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config)


def kl_vae() -> nn.Module:
    """Of SD3 and FLUX.1."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3_inputs(samples: int, side: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(samples, 16, side, side),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, 4096),
        "pooled_projections": torch.empty(samples, 2048),
    }


def flux_inputs(samples: int, side: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(samples, (side // 2) ** 2, 64),
        "timestep": torch.empty(samples),
        "guidance": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, 4096),
        "pooled_projections": torch.empty(samples, 768),
        "img_ids": torch.empty((side // 2) ** 2, 3),
        "txt_ids": torch.empty(text, 3),
    }


def qwen_inputs(samples: int, side: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(samples, (side // 2) ** 2, 64),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, 3584),
        "img_shapes": [[(1, side // 2, side // 2)]] * samples,
    }


PIPELINES = {
    # Guidance: the prompt and the empty prompt in one batch
    "SD3.5-Medium": Published(
        lambda: SD3Transformer2DModel(**MODELS["sd35-medium"].transformer),
        {
            "CLIP-L": clip(CLIPTextModelWithProjection, **CLIP_L),
            "CLIP-G": clip(CLIPTextModelWithProjection, **CLIP_G, projection_dim=1280),
            "T5-XXL": t5_xxl,
            "VAE": kl_vae,
        },
        sd3_inputs,
        samples=2,
    ),
    # Guidance is an input
    "FLUX.1-dev": Published(
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        {"CLIP-L": clip(CLIPTextModel, **CLIP_L), "T5-XXL": t5_xxl, "VAE": kl_vae},
        flux_inputs,
    ),
    # Guidance: one call after the other
    "Qwen-Image": Published(
        QwenImageTransformer2DModel,
        {"Qwen2.5-VL-7B": qwen2_5_vl_7b, "VAE": AutoencoderKLQwenImage},
        qwen_inputs,
        calls=2,
    ),
}


def count(module: nn.Module) -> int:
    """Parameters, and tables such as SD3's of positions."""
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])


@cache
def parameters(name: str) -> dict[str, int]:
    """Of each part of a pipeline."""
    published = PIPELINES[name]
    with torch.device("meta"):
        return {part: count(make()) for part, make in {"denoiser": published.denoiser, **published.others}.items()}


class Alive(TorchDispatchMode):
    """Bytes of the tensors that were made inside it: alive `now`, and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # those from outside
            if isinstance(tensor, Tensor):
                self._watch(tensor, count=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor, count=True)
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, tensor: Tensor, count: bool) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self._known:
            self._known.add(key)
            size = storage.nbytes() * count
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def layer_norm(x: Tensor, shape: Any, *parameters: Any, **kwargs: Any) -> Tensor:
    """In float32, as CUDA's autocast runs it; a CPU's leaves it in the dtype that comes."""
    parameters = [value.float() if isinstance(value, Tensor) else value for value in parameters]
    return torch.layer_norm(x.float(), shape, *parameters, **kwargs)


def predict(denoiser: nn.Module, inputs: dict[str, Any], calls: int) -> Tensor:
    """A guided prediction in mixed precision, as accelerate runs a model."""
    total = 0
    for _ in range(calls):
        with torch.autocast("cpu", torch.bfloat16), patch.object(F, "layer_norm", layer_norm):
            total = total + denoiser(**inputs, return_dict=False)[0].float()
    return total


def learnt_step(student: nn.Module, teacher: nn.Module, inputs: dict[str, Any], calls: int = 1) -> None:
    """The student's graph, the teacher's answer while the graph is there, the backward pass."""
    prediction = predict(student, inputs, calls)
    with torch.no_grad():
        target = predict(teacher, inputs, calls)
    loss = (prediction - target).square().mean()
    with patch.object(F, "layer_norm", layer_norm):  # for what is recomputed
        loss.backward()


def parties(make: Callable[[], nn.Module], lora: bool, checkpointing: bool, rank: int = 32) -> list[nn.Module]:
    """Student and teacher as a run uses them, on the meta device: all weights in bfloat16, but for a LoRA's in float32.
    A LoRA shares its denoiser with its teachers. (A whole denoiser is trained in float32; FSDP2 and DeepSpeed use it in
    bfloat16.)"""
    with torch.device("meta"):
        student = make().eval().to(torch.bfloat16)
        teacher = make().eval().to(torch.bfloat16).requires_grad_(False)
        if lora:
            student = teacher
            targets = [f"attn.{target}" for target in LORA_TARGETS]
            student.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
            cast_training_params(student)
    if checkpointing:
        student.enable_gradient_checkpointing()
    return [student, teacher]


def peak_of_step(student: nn.Module, teacher: nn.Module, inputs: Callable[[], dict[str, Any]], calls: int = 1) -> int:
    """Bytes at the peak of `learnt_step`, besides weights and gradients. It takes the data from modules."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for denoiser in {student, teacher}:
            denoiser.to_empty(device="cpu")
        for parameter in student.parameters():  # gradients of an earlier micro-batch
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        tensors = inputs()
        with Alive() as alive:
            learnt_step(student, teacher, tensors, calls)
    return alive.peak


@cache
def activations(name: str, pixels: int, batch: int, text: int, lora: bool = True, checkpointing: bool = True) -> int:
    """Bytes at the peak of one learnt step in bfloat16, besides weights, gradients and optimizer."""
    published = PIPELINES[name]

    def inputs() -> dict[str, Any]:
        made = published.inputs(batch * published.samples, pixels // 8, text)
        return {key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in made.items()}

    return peak_of_step(*parties(published.denoiser, lora, checkpointing), inputs, published.calls)


@cache
def decoding(name: str, pixels: int, pictures: int) -> int:
    """Bytes at the peak of the VAE's decoder, which makes sample pictures, in bfloat16 and besides its weights."""
    with torch.device("meta"):
        vae = PIPELINES[name].others["VAE"]().eval().to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        vae.to_empty(device="cpu")
        frames = [1] if isinstance(vae, AutoencoderKLQwenImage) else []
        latents = torch.empty(pictures, 16, *frames, pixels // 8, pixels // 8, dtype=torch.bfloat16)
        with Alive() as alive:
            vae.decode(latents)
    return alive.peak
