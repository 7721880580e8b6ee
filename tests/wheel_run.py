"""What an installed wheel must be good for: `python -m tests.wheel_run`, in a folder that holds no more of the checkout
than this file and `tiny_pipelines.py`, in `tests`. Prints where the package was found."""

from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

import diffusion_opd
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from tests.tiny_pipelines import CALL, LORA_TARGETS, sd3


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
    print(folder)


if __name__ == "__main__":
    main()
