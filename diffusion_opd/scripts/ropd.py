"""
ROPD from YAML or flags: a student learns from experts as far as a verifier is not content with it.

Two tasks, each with its expert and its verifier, a function of `verify.py` in the current folder:

    diffusion-opd ropd --config ropd.yaml --accelerate_config multi_gpu --num_processes 8

    # ropd.yaml
    model_name_or_path: stabilityai/stable-diffusion-3.5-medium
    reward_funcs: { ocr: ocr, people: verify.hands }
    teachers: { ocr: me/ocr-lora, people: me/hands-lora }
    train_files: { ocr: ocr.txt, people: people.txt }

    diffusion-opd ropd --reward_funcs verify.hands --teachers me/hands-lora --train_files people.txt \
        --output_dir hands --height 512 --width 512
"""

from diffusion_opd import DiffusionROPDConfig, DiffusionROPDTrainer
from diffusion_opd.scripts.arguments import RLScriptArguments, make_rl_trainer, train
from diffusion_opd.scripts.parser import Parser


def main(script_args: RLScriptArguments, training_args: DiffusionROPDConfig) -> None:
    train(make_rl_trainer(DiffusionROPDTrainer, script_args, training_args), script_args.dataset_name)


def make_parser(prog: str | None = None) -> Parser:
    return Parser((RLScriptArguments, DiffusionROPDConfig), prog=prog, description=__doc__.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
