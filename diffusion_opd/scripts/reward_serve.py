"""
A server of reward functions, for scorers in an environment or on a GPU of their own.

    diffusion-opd reward-serve --reward_funcs geneval ocr --port 8000

Trainers ask it through `{name: remote, url: http://localhost:8000, reward: geneval}`. It asks for no password: keep it
on a network that you trust.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusion_opd.rewards import Scorer, load_reward
from diffusion_opd.rewards.scorer import SCALES
from diffusion_opd.scripts.parser import Parser


@dataclass
class RewardServeArguments:
    """
    What to serve and where.

    Args:
        reward_funcs (`list[str]`):
            Names of [`REWARDS`] or dotted paths of functions; in YAML also dicts with `name` and arguments, without
            `scale`: whoever asks chooses it. Models stay on the device, unless their `placement` says otherwise.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at; `0.0.0.0`: all of them.
        port (`int`, *optional*, defaults to `8000`):
            Where clients ask.
        max_batch_size (`int`, *optional*, defaults to `256`):
            Samples of a request.
        max_pixels (`int`, *optional*, defaults to `16777216`):
            Of a picture, or of a frame.
        max_bytes (`int`, *optional*, defaults to `268435456`):
            Of a request.
    """

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Names of rewards, or dotted paths of functions."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0: all of them."})
    port: int = field(default=8000, metadata={"help": "Where clients ask."})
    max_batch_size: int = field(default=256, metadata={"help": "Samples of a request."})
    max_pixels: int = field(default=4096 * 4096, metadata={"help": "Of a picture, or of a frame."})
    max_bytes: int = field(default=256 * 2**20, metadata={"help": "Of a request."})


def main(script_args: RewardServeArguments) -> None:
    from diffusion_opd.rewards.server import make_app, serve

    if not script_args.reward_funcs:
        raise ValueError("`reward_funcs` is empty; name at least one reward.")
    for reward in script_args.reward_funcs:
        if isinstance(reward, Mapping) and reward.get("scale") in SCALES:
            raise ValueError(f"`scale` of {reward['name']!r} is chosen by whoever asks; leave it out.")
    funcs = [load_reward(reward, placement="device") for reward in script_args.reward_funcs]
    app = make_app(funcs, script_args.max_batch_size, script_args.max_pixels, script_args.max_bytes)
    for func in funcs:
        if isinstance(func, Scorer):
            func.prepare()
    serve(app, script_args.host, script_args.port)


def make_parser(prog: str | None = None) -> Parser:
    return Parser(RewardServeArguments, prog=prog, description=__doc__.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
