"""
What `encode_ahead` takes off the device, and what waits in CPU memory: counted with the parts of SD3.5-Medium.

    python -m benchmarks.ahead

The transformer has its real width and few layers, the encoders theirs and one layer each, the VAE is whole; all weights
are random, in float32 (in bfloat16 all of it is half as much). On a CPU there is no other device to leave for: what
would be in CPU memory is kept in arrays of NumPy, and what torch holds counts as being on the device. Weights of the
published encoders are those of benchmarks/footprint.py.
"""

import argparse
import tempfile
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.common import LORA_TARGETS, MODELS, machine, peak_memory
from benchmarks.footprint import CLIP_G, CLIP_L, kl_vae, parameters
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from diffusion_opd.ahead import Memory
from diffusion_opd.placement import Parts, weights
from tests.tiny_pipelines import clip_tokenizer, t5_tokenizer

MIB, GIB = 2**20, 2**30


class OnHost(Memory):
    """In arrays of NumPy, which torch does not count."""

    def put_away(self, storage: torch.UntypedStorage) -> None:
        copy = torch.from_numpy(np.empty(storage.nbytes(), np.uint8)).untyped_storage()
        copy.copy_(storage)
        storage.resize_(0)
        self._waiting[storage._cdata] = storage, copy


class PartsOnHost(Parts):
    def leave(self) -> None:
        for tensor in () if self.are_away else self.tensors:
            if id(tensor) not in self._copies:
                raw = tensor.data.contiguous().view(-1).view(torch.uint8).numpy().copy()
                self._copies[id(tensor)] = torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)
        super().leave()

    def bring(self) -> None:
        were_away = self.are_away
        super().bring()
        for tensor in self.tensors if were_away else ():
            tensor.data = tensor.data.clone()


def pipeline(cls: Any, layers: int) -> DiffusionPipeline:
    """With the real widths."""

    def clip(config: dict[str, int], projection: int) -> CLIPTextModelWithProjection:
        sizes = config | {"num_hidden_layers": 1, "projection_dim": projection, "vocab_size": len(clip_tokenizer())}
        return CLIPTextModelWithProjection(CLIPTextConfig(**sizes))

    t5 = T5EncoderModel(
        T5Config(d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=64, vocab_size=len(t5_tokenizer()))
    )
    sizes = MODELS["sd35-medium"].transformer | {"num_layers": layers}
    transformer = SD3Transformer2DModel(**sizes | {"dual_attention_layers": tuple(range(layers))})
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    parts = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(),
        text_encoder=clip(CLIP_L, 768),
        text_encoder_2=clip(CLIP_G, 1280),
        text_encoder_3=t5,
    )
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    tokenizers = dict(tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=t5_tokenizer())
    return cls(**parts, **tokenizers)


class Counted(DiffusionOPDTrainer):
    """The bytes of its second optimizer step, in which nothing begins if two steps have begun together."""

    held = peak = on_device = 0

    def training_step(self, *args: Any) -> Tensor:
        if self.state.global_step == 0:
            loss = super().training_step(*args)
            self.held = max(self.held, 0 if self.ahead is None else self.ahead.num_bytes)
            return loss
        losses: list[Tensor] = []
        inherited = super().training_step
        others = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        others = [part for part in others if part is not self.model]

        def learn() -> None:
            losses.append(inherited(*args))
            tensors = [] if self.ahead is not None and self.ahead.parts.are_away else others
            self.on_device = sum(t.nbytes for part in tensors for t in weights(part))

        self.peak = peak_memory(learn, torch.device("cpu"))
        return losses[0]


def count(cls: Any, ahead: int | None, options: argparse.Namespace) -> Counted:
    torch.manual_seed(options.seed)
    student = pipeline(cls, options.layers)
    side = options.resolution
    pictures = {"image": [Image.effect_noise((side, side), 50).convert("RGB")] * 2}
    data = {"prompt": ["a cat", "a dog"]} | (pictures if cls is StableDiffusion3Img2ImgPipeline else {})
    with (
        patch("diffusion_opd.ahead.Memory", OnHost),
        patch("diffusion_opd.ahead.Parts", PartsOnHost),
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer = Counted(
            student,
            _teacher(folder, options),
            DiffusionOPDConfig(
                f"{folder}/run",
                per_device_train_batch_size=1,
                num_inference_steps=2,
                timestep_fraction=0.5,
                max_steps=2,
                encode_ahead=ahead,
                height=side,
                width=side,
                guidance_scale=4.5,
                image_steps=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                activation_checkpointing=True,
            ),
            train_dataset=Dataset.from_dict(data),
            peft_config=LoraConfig(r=32, target_modules=[f"attn.{name}" for name in LORA_TARGETS]),
        )
        trainer.train()
    return trainer


def _teacher(folder: str, options: argparse.Namespace) -> str:
    """A LoRA."""
    source = pipeline(StableDiffusion3Pipeline, options.layers).transformer
    source.add_adapter(
        LoraConfig(r=32, init_lora_weights=False, target_modules=[f"attn.{name}" for name in LORA_TARGETS])
    )
    layers = get_peft_model_state_dict(source)
    StableDiffusion3Pipeline.save_lora_weights(f"{folder}/teacher", transformer_lora_layers=layers)
    return f"{folder}/teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024, help="pixels")
    parser.add_argument("--layers", type=int, default=2, help="of the transformer's 24")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(machine(torch.device("cpu")))
    published = parameters("SD3.5-Medium")
    others = 2 * sum(number for name, number in published.items() if name != "denoiser")
    print(f"\nEncoders and VAE of the published pipeline: {others / GIB:.1f} GiB in bfloat16.\n")
    print(
        "| pipeline | encode_ahead | their weights on the device while learning, MiB | activations of a learnt step, "
        "MiB | waits in CPU memory for a sample, MiB |"
    )
    print("|---|---|---|---|---|")
    for cls in (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline):
        for ahead in (None, 2):
            found = count(cls, ahead, options)
            held = "" if ahead is None else f"{found.held / MIB:.1f}"
            print(f"| {cls.__name__} | {ahead} | {found.on_device / MIB:.0f} | {found.peak / MIB:.0f} | {held} |")


if __name__ == "__main__":
    main()
