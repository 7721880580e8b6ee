"""What the benchmarks share: models with random weights, one optimizer step in two ways, and how a step is measured.

`one_pass` is the trainer's core: policy.py, transitions.py and objectives.py as trainer.py puts them together.
`two_pass` is a plain implementation of the released recipe, in its order: a rollout without gradient, then what the
teacher says at every state, then the student again with gradient. `check_equal` compares their losses and gradients.

Only torch, diffusers, transformers and peft are needed, so that a bare GPU machine can run this. Prompts are numbers:
their embeddings are random, since encoding costs the same either way.
"""

import argparse
import copy
import os
import platform
import statistics
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

diffusers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # one adapter a teacher

ROOT = Path(__file__).parents[1]
if find_spec("trl") is None:
    # The package's `__init__` imports the trainers and with them TRL; nothing that is measured here needs them
    package = types.ModuleType("diffusion_opd")
    package.__path__ = [str(ROOT / "diffusion_opd")]
    sys.modules["diffusion_opd"] = package

from diffusion_opd import objectives, transitions  # noqa: E402
from diffusion_opd.encode_cache import EncodeCache  # noqa: E402
from diffusion_opd.policy import Policy, active_adapter, tuner_layers  # noqa: E402
from diffusion_opd.scheduler_proxy import Step  # noqa: E402

GUIDANCE, TEACHER_GUIDANCE = 4.5, (4.5, 4.5, 1.0)  # of the released recipe: student; aesthetics, OCR, GenEval
LORA_TARGETS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()


@dataclass(frozen=True)
class Model:
    """Sizes of a model. `resolution` in pixels, 8 to a latent; `tokens` of text."""

    transformer: dict
    tokens: int
    resolution: int
    rank: int


MODELS = {
    # The size of the toy world's transformer
    "toy": Model(
        dict(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            caption_projection_dim=128,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=32,
        ),
        tokens=16,
        resolution=128,
        rank=32,
    ),
    # transformer/config.json of stabilityai/stable-diffusion-3.5-medium
    "sd35-medium": Model(
        dict(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            caption_projection_dim=1536,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        tokens=77 + 128,  # of CLIP and of T5
        resolution=512,
        rank=32,
    ),
}


class EmbeddedPipeline(StableDiffusion3Pipeline):
    """SD3 whose prompts are random embeddings; it has no text encoders and no VAE."""

    def encode_prompt(self, prompt: list[str], **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = len(prompt)
        return tuple(part[:n] for part in self.__dict__["embeddings"])


@dataclass
class Parties:
    """A student and its LoRA teachers, with everything that a step needs."""

    student: EmbeddedPipeline
    teacher: EmbeddedPipeline  # the student itself, or its frozen copy if the student trains in full
    guidance: tuple[float, ...]  # of the teachers
    batch: int
    steps: int
    learnt: int
    resolution: int
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    @cached_property
    def policies(self) -> tuple[EncodeCache, Policy, list[Policy]]:
        """The encode cache, the student and its teachers, made once as the trainer makes them."""
        cache = EncodeCache()
        size = {"height": self.resolution, "width": self.resolution}
        student = Policy(self.student, self.steps, {"guidance_scale": GUIDANCE, **size}, cache)
        teachers = [
            Policy(self.teacher, self.steps, {"guidance_scale": guidance, **size}, cache, adapter=f"teacher_{index}")
            for index, guidance in enumerate(self.guidance)
        ]
        return cache, student, teachers


def build(
    name: str,
    device: torch.device,
    seed: int = 0,
    lora: bool = True,
    checkpointing: bool = False,
    num_teachers: int = 3,
    batch: int = 3,
    steps: int = 10,
    resolution: int | None = None,
    teacher_guidance: Sequence[float] = TEACHER_GUIDANCE,
) -> Parties:
    """Random weights: bfloat16 where frozen on a GPU, float32 else. LoRA ranks and targets are the recipe's."""
    model = MODELS[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    widths = model.transformer["joint_attention_dim"], model.transformer["pooled_projection_dim"]
    config = dict(r=model.rank, lora_alpha=2 * model.rank, target_modules=[f"attn.{name}" for name in LORA_TARGETS])
    torch.manual_seed(seed)
    with device:
        texts = [torch.randn(batch, model.tokens, widths[0], dtype=dtype) for _ in range(2)]
        pooled = [torch.randn(batch, widths[1], dtype=dtype) for _ in range(2)]
        transformer = SD3Transformer2DModel(**model.transformer).eval()
        # Zero in a new model, whose prediction would not depend on the prompt
        nn.init.normal_(transformer.proj_out.weight, std=0.02)
        frozen = transformer if lora else copy.deepcopy(transformer)
        frozen.to(dtype)
        for index in range(num_teachers):
            frozen.add_adapter(LoraConfig(**config, init_lora_weights=False), f"teacher_{index}")
        frozen.requires_grad_(False)
        if lora:
            transformer.add_adapter(LoraConfig(**config, init_lora_weights="gaussian"), "default")
            transformer.set_adapter("default")
    for key, parameter in transformer.named_parameters():
        parameter.requires_grad_(".default." in key or not lora)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    pipelines = []
    for module in (transformer, frozen):
        if device.type == "cuda":  # as accelerate wraps a model in mixed precision
            module.forward = torch.autocast("cuda", dtype=torch.bfloat16)(module.forward)
        pipeline = EmbeddedPipeline(module, FlowMatchEulerDiscreteScheduler(shift=3.0), None, *[None] * 6)
        pipeline.__dict__["embeddings"] = texts[0], texts[1], pooled[0], pooled[1]
        pipelines.append(pipeline)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return Parties(
        pipelines[0],
        pipelines[0] if lora else pipelines[1],
        tuple(teacher_guidance[index % len(teacher_guidance)] for index in range(num_teachers)),
        batch,
        steps,
        max(1, int(0.99 * steps)),
        resolution or model.resolution,
        torch.optim.AdamW(parameters, lr=1e-5),
    )


def noise_generators(parties: Parties, task: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * task + index) for index in range(parties.batch)]


def one_pass(parties: Parties) -> Tensor:
    """Losses and gradients of all tasks, each in one pass (the trainer's way)."""
    cache, student, teachers = parties.policies
    inputs = {"prompt": [f"prompt {index}" for index in range(parties.batch)]}
    total = torch.zeros((), device=parties.parameters[0].device)

    def move(step: Step) -> Tensor:
        return transitions.ode(step.sample, step.prediction, step.schedule, step.index).mean

    for task, teacher in enumerate(teachers):
        with student.walk(inputs, noise_generators(parties, task), move) as walk, teacher.follow(walk) as follow:
            for visit in walk.visits(range(parties.learnt)):
                with torch.no_grad():
                    (target,) = follow(visit)
                (step,) = visit.steps
                mine = transitions.ode(step.sample, step.prediction, step.schedule, step.index)
                theirs = transitions.ode(step.sample, target, step.schedule, step.index)
                loss = objectives.kl(mine, theirs).mean() / (parties.learnt * len(teachers))
                loss.backward()
                total = total + loss.detach()
        cache.clear()
    return total


def two_pass(parties: Parties, lean: bool = False) -> Tensor:
    """Losses and gradients of all tasks, as the released code computes them.

    Args:
        parties (`Parties`): Whose.
        lean (`bool`, *optional*, defaults to `False`):
            Leaves out what the released code computes and does not use: the last step of the rollout, and what the
            teacher says at the state before it.
    """
    visited = parties.learnt if lean else parties.steps
    student, teacher = parties.student.transformer, parties.teacher.transformer
    text, empty, pooled_text, pooled_empty = parties.student.__dict__["embeddings"]
    scheduler = copy.deepcopy(parties.student.scheduler)
    scheduler.set_timesteps(parties.steps, device=text.device)
    steps = [after - before for before, after in pairwise(scheduler.sigmas.tolist())]
    layers = tuner_layers(teacher)

    def predict(transformer: nn.Module, x: Tensor, time: Tensor, guidance: float) -> Tensor:
        guided = guidance > 1
        velocity = transformer(
            hidden_states=torch.cat([x, x]) if guided else x,
            timestep=time.expand(len(x) * (2 if guided else 1)),
            encoder_hidden_states=torch.cat([empty, text]) if guided else text,
            pooled_projections=torch.cat([pooled_empty, pooled_text]) if guided else pooled_text,
            return_dict=False,
        )[0]
        if not guided:
            return velocity
        without, conditional = velocity.chunk(2)
        return without + guidance * (conditional - without)

    channels = student.config.in_channels
    shape = (1, channels, parties.resolution // 8, parties.resolution // 8)
    total = torch.zeros((), device=text.device)
    for task, guidance in enumerate(parties.guidance):
        noise = [torch.randn(shape, generator=g, dtype=text.dtype) for g in noise_generators(parties, task)]
        states, means = [torch.cat(noise).to(text.device)], []
        with torch.no_grad():
            for j in range(visited):
                velocity = predict(student, states[j], scheduler.timesteps[j], GUIDANCE)
                states.append((states[j].float() + steps[j] * velocity.float()).to(text.dtype))
            with active_adapter(layers, f"teacher_{task}"):
                for j in range(visited):
                    velocity = predict(teacher, states[j], scheduler.timesteps[j], guidance)
                    means.append(states[j].float() + steps[j] * velocity.float())
        for j in range(parties.learnt):
            velocity = predict(student, states[j], scheduler.timesteps[j], GUIDANCE)
            mean = states[j].float() + steps[j] * velocity.float()
            loss = 0.5 * ((mean - means[j]) ** 2).mean() / (parties.learnt * len(parties.guidance))
            loss.backward()
            total = total + loss.detach()
    return total


def optimizer_step(parties: Parties, gradients: Callable[[Parties], Tensor]) -> None:
    gradients(parties)
    nn.utils.clip_grad_norm_(parties.parameters, 1.0)
    parties.optimizer.step()
    parties.optimizer.zero_grad()


def check_equal(parties: Parties) -> tuple[float, float]:
    """Relative differences of loss and gradient between the two ways."""
    results = []
    for gradients in (two_pass, one_pass):
        loss = gradients(parties)
        results.append((loss, torch.cat([p.grad.flatten() for p in parties.parameters])))
        parties.optimizer.zero_grad()
    (loss, gradient), (other_loss, other_gradient) = results
    return (
        ((loss - other_loss).abs() / loss).item(),
        ((gradient - other_gradient).norm() / gradient.norm()).item(),
    )


# Measuring


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    arms: dict[str, Callable[[], object]], repetitions: int, warmup: int = 1
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each arm, in turn, so that noise of the machine meets all of them. Every repetition
    begins with another arm."""
    for _ in range(warmup):
        for run in arms.values():
            run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    names = list(arms)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            arms[name]()
            synchronize()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def ratios(slow: Sequence[tuple[float, float]], fast: Sequence[tuple[float, float]], clock: int = 0) -> list[float]:
    """Ratio of each repetition; clock 0 is wall time, 1 CPU time."""
    return [a[clock] / b[clock] for a, b in zip(slow, fast, strict=True)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that were alive during `run`, on top of those before it."""
    if device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def count_flops(name: str, way: Callable[[Parties], Tensor], lora: bool, checkpointing: bool, **settings: Any) -> int:
    """Floating-point operations (matrix products and attention) of one step of a model: no machine in it.

    Which calls of the denoiser the step makes is seen by running it with a stub in the place of the denoiser; what such
    a call costs is counted on the meta device.
    """
    resolution = settings.pop("resolution", None)
    parties = build("toy", torch.device("cpu"), lora=lora, **settings)
    calls: Counter[tuple[bool, int, bool]] = Counter()
    one = torch.ones((), requires_grad=True)

    def stub(is_student: bool, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor]:
        calls[is_student, len(hidden_states), torch.is_grad_enabled()] += 1
        return (one * hidden_states,)

    parties.teacher.transformer.forward = partial(stub, False)
    parties.student.transformer.forward = partial(stub, True)  # the only one, if the teacher is the same module
    way(parties)

    parties = build(
        name, torch.device("meta"), lora=lora, checkpointing=checkpointing, resolution=resolution, **settings
    )
    text, _, pooled, _ = (part[:1] for part in parties.student.__dict__["embeddings"])
    side = parties.resolution // 8
    total = 0
    for (is_student, samples, with_gradient), number in calls.items():
        module = (parties.student if is_student else parties.teacher).transformer
        state = torch.empty(samples, module.config.in_channels, side, side, device="meta")
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(with_gradient):
            velocity = module(
                hidden_states=state,
                timestep=torch.empty(samples, device="meta"),
                encoder_hidden_states=text.expand(samples, -1, -1),
                pooled_projections=pooled.expand(samples, -1),
                return_dict=False,
            )[0]
            if with_gradient:
                velocity.sum().backward()
        total += number * counter.get_total_flops()
    return total


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
        where = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}; `{command}`"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--batch", type=int, default=3, help="prompts a task")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser
