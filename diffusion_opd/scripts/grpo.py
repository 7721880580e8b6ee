"""
Flow-GRPO and GRPO-Guard from YAML or flags: a specialist learns from rewards through a stochastic sampler (arXiv
2505.05470, 2510.22319).

The paper's text specialist, on 8 GPUs:

    diffusion-opd grpo --config examples/configs/sd35/guard_ocr.yaml --accelerate_config multi_gpu --num_processes 8

Two rewards, of which one counts half:

    diffusion-opd grpo --reward_funcs pickscore clipscore --reward_weights "[1, 0.5]" --train_files prompts.txt \
        --output_dir pretty --height 512 --width 512
"""

from diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer
from diffusion_opd.scripts.arguments import RLScriptArguments, make_rl_trainer, train
from diffusion_opd.scripts.parser import Parser


def main(script_args: RLScriptArguments, training_args: DiffusionGRPOConfig) -> None:
    train(make_rl_trainer(DiffusionGRPOTrainer, script_args, training_args), script_args.dataset_name)


def make_parser(prog: str | None = None) -> Parser:
    return Parser((RLScriptArguments, DiffusionGRPOConfig), prog=prog, description=__doc__.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
