"""What an installed wheel must be good for: `python -m tests.wheel_run`, in a folder that holds no more of the checkout
than this file and `tiny_pipelines.py`, in `tests`. Prints where the package was found, and leaves `run.yaml` with the
models and prompts that it names, for a run without Python."""

from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model

import diffusion_opd
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from tests.tiny_pipelines import CALL, LORA_TARGETS, sd3

YAML = f"""
model_name_or_path: base
teachers:
  - {{ path: teachers, subfolder: ocr/lora, id: text, guidance_scale: 2.0 }}
  - {{ path: teachers/style, scale: 0.5 }}
train_files: {{ text: text.txt, style: style.csv }}
lora_r: 4
lora_target_modules: {LORA_TARGETS}
num_inference_steps: 2
call_kwargs: {dict(CALL["sd3"])}
per_device_train_batch_size: 1
max_steps: 2
save_steps: 2
logging_steps: 1
image_steps: 2
use_cpu: true
report_to: none
output_dir: student
accelerate_config: single_gpu
num_processes: 1
"""


def main() -> None:
    folder = Path(diffusion_opd.__file__).parent
    assert not folder.is_relative_to(Path.cwd()), f"{folder} is not installed"
    assert version("diffusion-opd") == diffusion_opd.__version__

    args = DiffusionOPDConfig(
        "run",
        per_device_train_batch_size=2,
        max_steps=1,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        num_inference_steps=2,
        call_kwargs=dict(CALL["sd3"]),
        image_steps=1,
        disable_tqdm=True,
    )
    trainer = DiffusionOPDTrainer(
        sd3(0),
        sd3(1),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a fox", "an owl"]}),
        peft_config=LoraConfig(r=4, target_modules=LORA_TARGETS),
    )
    before = [parameter.detach().clone() for parameter in trainer.trainable_parameters]
    trainer.train()
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.trainable_parameters, strict=True))
    assert "diffusers" in Path("run", "README.md").read_text()
    StableDiffusion3Pipeline.lora_state_dict("run/checkpoint-1")
    leave_models_and_prompts()
    print(folder)


def leave_models_and_prompts() -> None:
    sd3(0).save_pretrained("base")
    for place in ("ocr/lora", "style"):
        lora = LoraConfig(r=4, init_lora_weights=False, target_modules=LORA_TARGETS)
        get_peft_model(sd3(0).transformer, lora).save_pretrained(f"teachers/{place}")
    Path("text.txt").write_text('a sign that says "1"\na sign that says "2"\n')
    Path("style.csv").write_text("prompt\na hill\na tree\n")
    Path("run.yaml").write_text(YAML)


if __name__ == "__main__":
    main()
