"""Small runs in however many processes this is started with; rank 0 writes what it saw as JSON.

Started by test_distributed.py for one run, `accelerate launch ... distributed_run.py OUT --engine ddp --batch 2`, or
for many that launched.py hands over: `accelerate launch ... distributed_run.py --engine ddp --serve FOLDER`.
"""

import argparse
import json
import os
from pathlib import Path

from tests import conftest  # noqa: F401  (no network, one thread)

os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import is_deepspeed_available  # noqa: E402
from datasets import Dataset  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from peft import LoraConfig  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import diffusion_opd  # noqa: E402
from diffusion_opd.base_trainer import DiffusionTrainer  # noqa: E402
from diffusion_opd.student import whole_modules  # noqa: E402
from tests.adapters import save_peft  # noqa: E402
from tests.cpu_engines import Wire, fsdp_on_cpu, leave  # noqa: E402
from tests.editing_pipelines import EDITING, EDITING_CALL, EDITING_INPUTS  # noqa: E402
from tests.launched import serve  # noqa: E402
from tests.quantising import BACKENDS, take  # noqa: E402
from tests.streaming_pipelines import picture  # noqa: E402
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS  # noqa: E402
from tests.two_denoisers import TWO, TWO_CALL, TWO_INPUTS  # noqa: E402

MAKE = BUILDERS | EDITING | TWO
CALLS = CALL | EDITING_CALL | TWO_CALL


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--serve", type=Path, metavar="FOLDER", help="run what comes there instead")
    parser.add_argument("--client", type=int, help="the process that it comes from")
    parser.add_argument("--method", choices=["opd", "nft", "grpo", "ropd"], default="opd")
    parser.add_argument("--engine", choices=["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"], default="none")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--family", default="sd3")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--transition", default="ode")
    parser.add_argument("--teacher_placement", default="device")
    parser.add_argument("--encode_ahead", type=int)
    parser.add_argument("--resume", help="a checkpoint")
    parser.add_argument("--best", action="store_true", help="end with the weights of the best checkpoint, the first")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--quantised", help="a backend, by the names of quantising.py")
    parser.add_argument("--compile", help="a backend of torch.compile")
    parser.add_argument("--sync_each_batch", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--gather_each_time", action="store_true", help="ZeRO-3, as it does with a big model")
    parser.add_argument("--images", action="store_true", help="draw, and evaluate, at the end")
    parser.add_argument("--steps_per_generation", type=int, help="of which two are an optimizer step")
    parser.add_argument("--eval_rewards", action="store_true", help="pictures are judged in evaluation")
    parser.add_argument("--taught", action="store_true", help="by teachers, besides rewards")
    parser.add_argument("--choices", choices=["target", "split", "mixed"], help="what is learnt, and where")
    parser.add_argument("--sizes", type=int, default=1, help="of pictures that samples are made of")
    return parser.parse_args(arguments)


class Count(TrainerCallback):
    """What crosses the wire from the first gradient of a step to its update."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.wire = Wire()
        self.wire.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.wire.__exit__(None, None, None)
        self.steps.append(self.wire.counts)


def whole(parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def num_sharded(denoiser: nn.Module) -> int:
    return sum(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in denoiser.parameters())


def num_parameters(module: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def redness(images, prompts, **kwargs):
    pictures = np.stack([np.asarray(image, dtype=float) for image in images])
    return (pictures[..., 0] - pictures[..., 2]).mean((1, 2)) / 255


def verdict(images, prompts, **kwargs):
    """Between 0 and 1, and another for each picture."""
    return np.clip(0.5 + 2 * redness(images, prompts), 0, 1)


def teachers_of(options: argparse.Namespace) -> dict:
    """One of each kind: an adapter of the student's denoiser (or of a copy of it), and a denoiser of its own."""
    lora = save_peft(options.out / f"teacher-{os.environ.get('RANK', 0)}", MAKE[options.family](0))
    whole = MAKE[options.family](2)
    if options.quantised:  # as what is in files is
        folder = options.out / f"whole-{os.environ.get('RANK', 0)}"
        whole.save_pretrained(folder)
        whole = str(folder)
    return {"a": str(lora), "b": whole}


def make(options: argparse.Namespace, counted: Count) -> DiffusionTrainer:
    student = MAKE[options.family](0)
    if options.bf16 or options.quantised:  # loaded from a folder, its frozen parts are in half precision
        folder = options.out / f"student-{os.environ.get('RANK', 0)}"
        student.save_pretrained(folder)
        student = str(folder)
    settings = dict(
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=5,  # other batches in two processes, and some of their rows padding
        max_steps=3,
        logging_steps=1,
        save_steps=1,
        report_to="none",
        learning_rate=options.learning_rate,
        max_grad_norm=1.0,
        num_inference_steps=4,
        ema_decay=0.9,
        ema_update_every=1,
        disable_tqdm=True,
        activation_checkpointing=options.activation_checkpointing,
        torch_compile=options.compile is not None,
        torch_compile_backend=options.compile,
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": options.sync_each_batch}},
        # Of two denoisers also where a run is resumed: a plain `pipeline(...)` comes first there
        eval_strategy="steps" if options.images else "no",
        eval_steps=3,
        image_steps=(1 if options.family in TWO else 3) if options.images else 0,
        encode_ahead=options.encode_ahead,
        use_cpu=options.engine in ("none", "ddp"),
        ddp_backend="gloo" if options.engine.startswith("zero") else None,
    )
    if options.quantised:
        wanted = BACKENDS[take(options.quantised)] | {"components_to_quantize": ["transformer"]}
        settings |= dict(quantization_config=wanted)
    if options.choices is not None:
        settings |= dict(anchor_data_beta=0.01)
    if options.method == "opd":
        settings |= dict(transition=options.transition, teacher_placement=options.teacher_placement)
        settings |= dict(call_kwargs=CALLS[options.family])
        config_class, trainer_class = diffusion_opd.DiffusionOPDConfig, diffusion_opd.DiffusionOPDTrainer
        judges = teachers_of(options)
        if options.choices == "target":
            settings |= dict(query="random", num_queries=2, target_extrapolation=1.25, task_weights={"b": 2})
        if options.choices == "split":
            settings |= dict(query="window", num_queries=2, guidance_split=0.5, guidance_scale=4.5)
            settings |= dict(task_sampling="random", gradient_accumulation_steps=2)
            settings["call_kwargs"] = {k: v for k, v in CALLS[options.family].items() if k != "guidance_scale"}
        if options.choices == "mixed":
            settings |= dict(
                task_sampling="mixed", per_device_train_batch_size=2 * settings["per_device_train_batch_size"]
            )
        if options.best:
            settings |= dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
            settings |= dict(metric_for_best_model="kl", greater_is_better=True)
    else:
        # Groups of eight over two micro-batches of four; two optimizer steps on each rollout, or twice on each part
        accumulation = 4 if options.steps_per_generation is None else 2
        settings |= dict(num_generations=8, gradient_accumulation_steps=accumulation, num_iterations=2, beta=0.1)
        settings |= dict(steps_per_generation=options.steps_per_generation)
        call = {key: value for key, value in CALLS[options.family].items() if not key.startswith("guidance_scale")}
        settings |= dict(guidance_scale=1.0, call_kwargs=call)
        name = f"Diffusion{options.method.upper()}"
        config_class, trainer_class = (getattr(diffusion_opd, f"{name}{part}") for part in ("Config", "Trainer"))
        judges = dict.fromkeys("ab", verdict if options.method == "ropd" else redness)
    own: dict = {"eval_reward_funcs": {"a": redness}} if options.eval_rewards else {}
    if options.taught:
        own["teachers"] = teachers_of(options)
    if options.choices is not None:
        prompts = [f"real {i}" for i in range(7)]
        real = Dataset.from_dict({"prompt": prompts, "image": [picture(16, i) for i in range(7)]})
        own |= {"anchor": "base", "anchor_dataset": real}
    args = config_class(str(options.out / "run"), **settings)
    if options.bf16:  # transformers refuses it on a CPU unless told `use_cpu`, which DeepSpeed does not take
        args.bf16, args.mixed_precision = True, "bf16"
    if options.gather_each_time:  # by default what is small, or soon used again, stays gathered: all of a small model
        limits = "max_live_parameters max_reuse_distance param_persistence_threshold prefetch_bucket_size".split()
        args.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {f"stage3_{name}": 0 for name in limits}
    columns = {}
    if options.family in EDITING_INPUTS | TWO_INPUTS:
        inputs = (EDITING_INPUTS | TWO_INPUTS)[options.family]
        columns = {name: [values[i % 4] for i in range(12)] for name, values in inputs.items()}
    if options.sizes == 2:
        columns["image"] = [picture(16 * (1 + i % 2), i) for i in range(12)]
    prompts = {
        task: Dataset.from_dict({"prompt": [f"{task} {i}" for i in range(12)], **columns}) for task in ("a", "b")
    }
    return trainer_class(
        student,
        judges,
        args,
        train_dataset=prompts,
        eval_dataset=prompts if options.images or options.best else None,
        callbacks=[] if options.compile else [counted],  # torch compiles nothing under a dispatch mode
        peft_config=LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        if options.mode == "lora"
        else None,
        **own,
    )


def picture_gap(options: argparse.Namespace, trainer: DiffusionTrainer) -> float:
    """How far what `trainer.pipeline` draws, called by every process as anybody calls a pipeline, is from what plain
    diffusers draws with the saved student: of what training has changed, the part."""

    def picture(pipeline: DiffusionPipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call = dict(num_inference_steps=3, generator=generator, output_type="np", **CALL[options.family])
        return pipeline(["a fox"], **call).images

    rank = os.environ.get("RANK", 0)
    drawn, saved = picture(trainer.pipeline), options.out / "saved"
    trainer.save_model(str(saved))
    trainer.accelerator.wait_for_everyone()
    base = options.out / f"student-{rank}"
    with whole_modules():  # as in a process of its own
        plain = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
        untrained = picture(plain)
        if options.mode == "lora":
            plain.load_lora_weights(saved, weight_name="pytorch_lora_weights.safetensors")
        else:
            plain = DiffusionPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    published = picture(plain)
    return float(np.abs(drawn - published).mean() / np.abs(untrained - published).mean())


def report(options: argparse.Namespace, trainer: DiffusionTrainer, counted: Count) -> None:
    gap = picture_gap(options, trainer) if options.bf16 else None
    streamed = []
    if options.images:
        rows = trainer.eval_dataset.shuffle(seed=0).to_iterable_dataset()
        streamed += [trainer.evaluate(rows)["eval_kl" if options.method == "opd" else "eval_reward"]]
    weights = torch.cat([whole(p).float().flatten() for p in trainer.trainable_parameters])
    everyone = trainer.accelerator.gather(weights[None])
    if not trainer.is_world_process_zero():
        return
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    teachers = trainer.teachers.values() if options.method == "opd" else []
    judged = "kl/a" if options.method == "opd" else "reward/a"
    result = {
        "distributed_type": str(trainer.accelerator.distributed_type),
        "num_processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in history],
        "judged": [entry[judged] for entry in history if judged in entry],
        "evaluated": [
            entry[key] for entry in trainer.state.log_history for key in ("eval_kl", "eval_reward") if key in entry
        ],
        "streamed": streamed,
        "grad_norms": [entry["grad_norm"] for entry in history],
        "weights": weights.tolist(),
        "names": [name for name, p in trainer.model.named_parameters() if p.requires_grad],
        "ranks_agree": bool((everyone == everyone[0]).all()),
        "num_parameters": num_parameters(trainer.model),
        "num_parameters_of_blocks": num_parameters(getattr(trainer.model, "transformer_blocks", nn.ModuleList())),
        "num_sharded": num_sharded(trainer.model),
        "num_sharded_of_teachers": [num_sharded(teacher.denoiser) for teacher in teachers],
        "optimizer": type(innermost(trainer.optimizer)).__name__,
        "picture_gap": gap,
        "pictures": len(list((options.out / "run").rglob("*.png"))),
        "wire": counted.steps,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }
    (options.out / "result.json").write_text(json.dumps(result))


def run(options: argparse.Namespace) -> None:
    if options.engine == "fsdp2":
        fsdp_on_cpu()
    if options.bf16:  # as `accelerate launch --mixed_precision bf16`
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    counted = Count()
    trainer = make(options, counted)
    trainer.train(resume_from_checkpoint=options.resume)
    report(options, trainer, counted)
    trainer.end()


if __name__ == "__main__":
    options = parse()
    if options.serve is None:
        run(options)
    else:
        if options.engine.startswith("zero") and is_deepspeed_available():
            import deepspeed  # noqa: F401  (once for all runs)
        serve(options.serve, options.client, lambda arguments: run(parse(arguments)))
    leave()
