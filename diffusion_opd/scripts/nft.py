"""
DiffusionNFT from YAML or flags: a specialist learns from rewards, without a stochastic sampler (arXiv 2509.16117).

The paper's composition specialist, on 8 GPUs:

    diffusion-opd nft --config examples/configs/sd35/nft_geneval.yaml --accelerate_config multi_gpu --num_processes 8

A reward of your own, the function `colour` of `my_rewards.py` in the current folder:

    diffusion-opd nft --reward_funcs my_rewards.colour --train_files prompts.txt --output_dir colour --height 512 \
        --width 512
"""

from diffusion_opd import DiffusionNFTConfig, DiffusionNFTTrainer
from diffusion_opd.scripts.arguments import RLScriptArguments, make_rl_trainer, train
from diffusion_opd.scripts.parser import Parser


def main(script_args: RLScriptArguments, training_args: DiffusionNFTConfig) -> None:
    train(make_rl_trainer(DiffusionNFTTrainer, script_args, training_args), script_args.dataset_name)


def make_parser(prog: str | None = None) -> Parser:
    return Parser((RLScriptArguments, DiffusionNFTConfig), prog=prog, description=__doc__.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
