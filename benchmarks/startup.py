"""
What the start of a run costs: a student with three teachers of its architecture, all from folders, by part.

    python -m benchmarks.startup                                 # SD3.5-Medium's transformer, three LoRA teachers
    python -m benchmarks.startup --teachers pipelines --layers 6
    python -m benchmarks.startup --student full --layers 6

The transformer and the VAE have the published sizes (`--layers` makes the first less deep), the text encoders one layer
of the published width; weights are random, in bfloat16 on disk and in the run. Each case is the constructor of a
trainer in a process of its own. The transformer answers at once, with a number that all trained parameters have a part
in: a start-up check of this size takes minutes on a CPU, and it is the model's own time. What is left is ours.

Memory is what the process has taken for itself at its fullest (without files that are mapped into it), as multiples of
the student's weights. Seconds are of CPU time, by looking at what runs every few milliseconds; a part may lie within
another.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

ROOT = Path(__file__).parents[1]
MIB = 2**20
# What the constructor is made of, as `file:function`
PARTS = """student.py:load_student loading.py:load_teachers startup.py:check_student startup.py:sees_the_end
parties.py:check denoisers.py:unwrap_blocks encode_cache.py:encode embeddings.py:get_2d_sincos_pos_embed
lora.py:read_loras lora.py:add_loras plain.py:_empty plain.py:load_plainly manifest.py:hash_tensors
compatible.py:same_weights fingerprint.py:take_fingerprint fingerprint.py:contradictions adapters.py:frozen_copy
adapters.py:add_adapter student.py:_add_lora student.py:_check_encoders pipeline_utils.py:from_pretrained""".split()


def make(folder: Path, layers: int, teachers: str) -> None:
    """The student's folder, and those of its teachers."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from benchmarks.common import LORA_TARGETS, MODELS
    from benchmarks.footprint import CLIP_G, CLIP_L, kl_vae
    from tests.tiny_pipelines import clip_tokenizer, t5_tokenizer

    some = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02

    def drawn(module: Any, shift: int = 0) -> Any:
        """In bfloat16, with numbers of a few megabytes again and again."""
        module = module.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False).eval()
        for index, tensor in enumerate([*module.parameters(), *module.buffers()]):
            if tensor.is_floating_point():
                numbers = some.roll(index + shift)
                tensor.copy_(numbers.repeat(-(-tensor.numel() // len(numbers)))[: tensor.numel()].view(tensor.shape))
        return module

    sizes = MODELS["sd35-medium"].transformer
    sizes = sizes | {"num_layers": layers, "dual_attention_layers": tuple(range(min(layers, 13)))}
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**sizes)
        vae = kl_vae()
    vocabulary = {"vocab_size": len(clip_tokenizer())}
    large, giant = (CLIPTextConfig(**(one | vocabulary | {"num_hidden_layers": 1})) for one in (CLIP_L, CLIP_G))
    giant.projection_dim = 1280
    t5 = T5Config(d_model=4096, d_kv=64, d_ff=1024, num_layers=1, num_heads=64, vocab_size=len(t5_tokenizer()))
    # Real ones hold index buffers, which are no random numbers
    encoders = [CLIPTextModelWithProjection(one).to(torch.bfloat16) for one in (large, giant)]
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=drawn(transformer),
        vae=drawn(vae),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=T5EncoderModel(t5).to(torch.bfloat16),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder / "student")
    for index in range(3) if teachers == "pipelines" else ():
        drawn(transformer, shift=index + 1)
        pipeline.save_pretrained(folder / f"teacher_{index}")
    if teachers == "loras":
        targets = [f"attn.{target}" for target in LORA_TARGETS]
        transformer.add_adapter(LoraConfig(r=32, lora_alpha=64, target_modules=targets, init_lora_weights=False))
        layers_of = {key: value.bfloat16() for key, value in get_peft_model_state_dict(transformer).items()}
        for index in range(3):
            shifted = {key: value * (index + 1) for key, value in layers_of.items()}
            pipeline.save_lora_weights(folder / f"teacher_{index}", transformer_lora_layers=shifted)


class Watch(threading.Thread):
    """What another thread is in, in seconds of CPU time by part, and the memory of this process at its fullest."""

    def __init__(self, watched: int):
        super().__init__(daemon=True)
        self.watched, self.done = watched, threading.Event()
        self.peak, self.parts = 0, Counter[str]()

    def run(self) -> None:
        before = time.process_time()
        while not self.done.wait(0.005):
            frame, now, seen = sys._current_frames().get(self.watched), time.process_time(), set()
            while frame is not None:
                seen.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
                frame = frame.f_back
            for part in seen.intersection(PARTS):
                self.parts[part] += now - before
            before = now
            self.peak = max(self.peak, own_memory())


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def worker(folder: Path, student: str, placement: str) -> None:
    import torch
    from datasets import Dataset
    from diffusers import SD3Transformer2DModel
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from peft import LoraConfig

    from benchmarks.common import LORA_TARGETS
    from benchmarks.engines import bytes_of_tensors
    from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer

    def forward(self: Any, hidden_states: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = hidden_states * 0.5
        if torch.is_grad_enabled():
            output = output + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    SD3Transformer2DModel.forward = forward
    args = DiffusionOPDConfig(
        str(folder / "out"),
        per_device_train_batch_size=1,
        max_steps=1,
        num_inference_steps=4,
        guidance_scale=4.5,
        height=64,
        width=64,
        call_kwargs={"max_sequence_length": 32},
        teacher_placement=placement,
        bf16=True,
        use_cpu=True,
        report_to="none",
        image_steps=0,
    )
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=[f"attn.{target}" for target in LORA_TARGETS])
    teachers = {name: str(folder / f"teacher_{index}") for index, name in enumerate("abc")}
    data = Dataset.from_dict({"prompt": ["a cat", "a dog", "a fox"], "teacher_id": list("abc")})
    before, watch = own_memory(), Watch(threading.get_ident())
    watch.start()
    began, cpu = time.perf_counter(), time.process_time()
    trainer = DiffusionOPDTrainer(
        str(folder / "student"), teachers, args, data, peft_config=lora if student == "lora" else None
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    watch.done.set()
    watch.join()
    weights = sum(p.numel() * p.element_size() for p in SD3Transformer2DModel.parameters(trainer.pipeline.transformer))
    gc.collect()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": cpu,
                "peak": watch.peak - before,
                "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "held": bytes_of_tensors(torch),
                "weights": weights,
                "parts": watch.parts,
            }
        )
    )


def ask(folder: Path, student: str, placement: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.startup", "--worker", str(folder)]
    command += ["--student", student, "--placement", placement]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-5000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--student", choices=["lora", "full"], default="lora")
    parser.add_argument("--teachers", choices=["loras", "pipelines"], default="loras")
    parser.add_argument("--placement", default="device")
    parser.add_argument("--folder", type=Path, help="where the weights are, or are made once; by default nowhere")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.student, options.placement)
        sys.exit()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "student").is_dir():
            make(folder, options.layers, options.teachers)
        found = ask(folder, options.student, options.placement)
        print(f"{found['seconds']:.1f} s ({found['cpu']:.1f} s of CPU time); weights {found['weights'] / MIB:.0f} MiB")
        for name in ("peak", "resident", "held"):
            print(f"{name} {found[name] / MIB:.0f} MiB, {found[name] / found['weights']:.2f} of them")
        print("\n| part | s |\n|---|---|")
        for name, seconds in sorted(found["parts"].items(), key=lambda part: -part[1]):
            print(f"| {name} | {seconds:.2f} |")
