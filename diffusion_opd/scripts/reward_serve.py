"""
A server of reward functions, for scorers in an environment or on a GPU of their own.

    diffusion-opd reward-serve --reward_funcs geneval ocr --port 8000

Trainers ask it through `{name: remote, url: http://localhost:8000, reward: geneval}`. It asks for no password: keep it
on a network that you trust.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusion_opd.rewards import Scorer, load_reward
from diffusion_opd.scripts.parser import Parser


@dataclass
class RewardServeArguments:
    """
    What to serve and where.

    Args:
        reward_funcs (`list[str]`):
            Names of [`REWARDS`] or dotted paths of functions; in YAML also dicts with `name` and arguments. Models stay
            on the device, unless their `placement` says otherwise.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at; `0.0.0.0`: all of them.
        port (`int`, *optional*, defaults to `8000`):
            Where clients ask.
        max_batch_size (`int`, *optional*, defaults to `256`):
            Samples of a request.
        max_pixels (`int`, *optional*, defaults to `16777216`):
            Of a picture, or of a frame.
    """

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Names of rewards, or dotted paths of functions."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0: all of them."})
    port: int = field(default=8000, metadata={"help": "Where clients ask."})
    max_batch_size: int = field(default=256, metadata={"help": "Samples of a request."})
    max_pixels: int = field(default=4096 * 4096, metadata={"help": "Of a picture, or of a frame."})


def main(script_args: RewardServeArguments) -> None:
    from diffusion_opd.rewards.server import make_app, uvicorn

    if not script_args.reward_funcs:
        raise ValueError("`reward_funcs` is empty; name at least one reward.")
    served = {}
    for reward in script_args.reward_funcs:
        func = load_reward(reward, placement="device")
        if isinstance(func, Scorer):
            func.prepare()
        name = reward["name"] if isinstance(reward, Mapping) else reward
        name = str(getattr(func, "__name__", name))
        if name in served:
            raise ValueError(f"two rewards are called {name!r}; serve one of them on another port.")
        served[name] = func
    app = make_app(served, script_args.max_batch_size, script_args.max_pixels)
    uvicorn.run(app, host=script_args.host, port=script_args.port, access_log=False)


def make_parser(prog: str | None = None) -> Parser:
    return Parser(RewardServeArguments, prog=prog, description=__doc__.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
