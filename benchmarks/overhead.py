"""
Overhead of the trainer's optimizer step over its floor, on the toy world's pipeline with three LoRA teachers.

The step is everything from one `on_step_end` of `trainer.train()` to the next: data, prompt encoding, the pipelines'
Python, objective, metrics, clipping, AdamW, schedule, logging. The floor is what no implementation can leave out: the
denoiser's forwards and backwards with the very inputs of a step, and nothing else. Both take turns within one training.

Before that, the trainer's constructor: its seconds, and the calls of the denoiser in the start-up check.

    python -m benchmarks.overhead                       # guidance 1.0, as the toy world is sampled
    python -m benchmarks.overhead --guidance 4.5        # as the recipe
    python -m benchmarks.overhead --batch 4 --profile   # where the trainer's time goes
"""

import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from benchmarks.common import LORA_TARGETS, arguments, machine, ratios, spread
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from diffusion_opd.policy import active_adapter, tuner_layers
from examples.toy_world.pipeline import SAMPLING, untrained_pipeline

TASKS = ("compose", "text", "style")
WARMUP = 2


class Floor(TrainerCallback):
    """Times the trainer's steps and, after each, the floor. The inputs are recorded in the first step."""

    def __init__(self, modules: set[nn.Module]):
        self.calls: list[Callable[[], Tensor]] = []
        self.hooks = [module.register_forward_pre_hook(self.record, with_kwargs=True) for module in modules]
        self.steps: list[tuple[float, float]] = []
        self.floors: list[tuple[float, float]] = []

    def record(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = {key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        layers, with_gradient = tuner_layers(module), torch.is_grad_enabled()
        adapter = layers[0]._active_adapter[0] if layers else None

        def call() -> None:
            with torch.set_grad_enabled(with_gradient), active_adapter(layers, adapter):
                prediction = module(**inputs)[0]
            if with_gradient:
                prediction.backward(prediction.detach())

        self.calls.append(call)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 1:
            for hook in self.hooks:
                hook.remove()
        if state.global_step > WARMUP:
            self.steps.append((time.perf_counter() - self.started[0], time.process_time() - self.started[1]))
        self.started = time.perf_counter(), time.process_time()
        for call in self.calls:
            call()
        if state.global_step > WARMUP:
            self.floors.append((time.perf_counter() - self.started[0], time.process_time() - self.started[1]))
        kwargs["model"].zero_grad()
        self.started = time.perf_counter(), time.process_time()


class Profile(TrainerCallback):
    """Where the time of the trainer's steps goes."""

    def __init__(self) -> None:
        self.profiler = cProfile.Profile()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == WARMUP:
            self.profiler.enable()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.profiler.disable()
        pstats.Stats(self.profiler).sort_stats("cumulative").print_stats(60)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(batch=16)
    parser.add_argument("--student", choices=["lora", "full"], default="lora")
    parser.add_argument("--guidance", type=float, default=1.0, help="of the student and of every teacher")
    parser.add_argument("--profile", action="store_true", help="profile the steps instead of timing them")
    options = parser.parse_args()
    print(machine(options.device))

    guidance = {"true_cfg_scale": options.guidance, "negative_prompt": ""} if options.guidance != 1 else {}
    sampling = SAMPLING | guidance
    torch.manual_seed(options.seed)
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=[f"attn.{target}" for target in LORA_TARGETS])
    with tempfile.TemporaryDirectory() as folder:
        lora.init_lora_weights = False
        for task in TASKS:
            transformer = get_peft_model(untrained_pipeline(options.seed).transformer, lora)
            transformer.save_pretrained(Path(folder, task))
        lora.init_lora_weights = "gaussian"
        student, checked = untrained_pipeline(options.seed), []
        hook = student.transformer.register_forward_hook(lambda *_: checked.append(None))
        started = time.perf_counter(), time.process_time()
        trainer = DiffusionOPDTrainer(
            student,
            {task: str(Path(folder, task)) for task in TASKS},
            DiffusionOPDConfig(
                folder,
                **{key: sampling.pop(key) for key in ("num_inference_steps", "height", "width")},
                call_kwargs=sampling,
                max_steps=WARMUP + options.repetitions,
                per_device_train_batch_size=options.batch,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                image_steps=0,
                use_cpu=options.device.type == "cpu",
                bf16=False,
                seed=options.seed,
            ),
            train_dataset={
                task: Dataset.from_dict({"prompt": [f"{i} red circles" for i in range(64)]}) for task in TASKS
            },
            peft_config=lora if options.student == "lora" else None,
        )
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        hook.remove()
        print(f"start-up: {len(checked)} calls of the student's denoiser, {seconds[0]:.2f} s, CPU {seconds[1]:.2f} s")
        modules = {trainer.model, *(teacher.pipeline.transformer for teacher in trainer.loaded_teachers.values())}
        watch = Profile() if options.profile else Floor(modules)
        trainer.add_callback(watch)
        trainer.train()

    if not options.profile:
        size = f"{options.student}, guidance {options.guidance}, {options.batch} x {len(TASKS)} samples"
        print(f"{size}, {len(watch.calls)} calls of the denoiser a step")
        for name, clock in (("wall", 0), ("CPU", 1)):
            step, floor = ([t[clock] * 1000 for t in times] for times in (watch.steps, watch.floors))
            over = [100 * (ratio - 1) for ratio in ratios(watch.steps, watch.floors, clock)]
            print(f"  {name}: step {spread(step, '.0f')} ms, floor {spread(floor, '.0f')} ms, ", end="")
            print(f"overhead {spread(over, '.1f')} %")


if __name__ == "__main__":
    main()
