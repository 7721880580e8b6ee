"""What `diffusion-opd` can be told to do: scripts that accelerate launches, and scripts that run in this process.

This file knows accelerate's flags, and nothing of what the scripts do.
"""

import signal
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.commands.base import Command, CommandContext

from . import worker

_CONFIGS = {path.stem: path for path in (Path(__file__).parents[1] / "accelerate_configs").glob("*.yaml")}
_EPILOG = (
    "launching: --num_processes N, --accelerate_config NAME or FILE, and what else `accelerate launch` takes; this "
    f"package has the configs {', '.join(sorted(_CONFIGS))}."
)


class ScriptCommand(Command):
    """Runs a script in this process."""

    def register(self, subparsers: Any) -> None:
        subparsers.add_parser(self.name, help=self.help_text, add_help=False)

    def run(self, args: Namespace, context: CommandContext) -> int:
        sys.path.insert(0, "")  # dotted paths of the current folder, as in a process that was launched
        worker.run_script(self.name, context.argv_after(self.name))
        return 0


class LaunchedCommand(ScriptCommand):
    """Hands a script to `accelerate launch`, with the flags and the keys of the YAML file that are not the script's."""

    def run(self, args: Namespace, context: CommandContext) -> int:
        launched = self.launched(context.argv_after(self.name))
        before = signal.signal(signal.SIGTERM, _pass_on)
        try:
            launch_command(launched)
        except subprocess.CalledProcessError as error:  # which the process has told about
            return error.returncode
        except ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
        finally:
            signal.signal(signal.SIGTERM, before)
        return 0

    def launched(self, given: list[str]) -> Namespace:
        """What `accelerate launch` is told; `training_script_args` is the script's name with its own flags."""
        _, parser = worker.script(self.name)
        parser.epilog = _EPILOG
        own, others = parser.split(given)
        launcher = launch_command_parser()
        launcher.error = parser.error
        launcher.add_argument("--accelerate_config", dest="config_file", type=_config)
        for flag in others:
            if flag.startswith("--") and flag.partition("=")[0] not in launcher._option_string_actions:
                parser.error_of_unknown(flag, launcher._option_string_actions)
        launched = launcher.parse_args([*others, "--module", worker.__name__, self.name, *own])
        if launched.training_script != worker.__name__:
            parser.error(f"{launched.training_script!r} belongs to no flag.")
        return launched


def _pass_on(number: int, frame: Any) -> None:
    """As torchrun does; accelerate's launcher of one process does not."""
    for child in psutil.Process().children():
        child.send_signal(number)


def _config(name: str) -> str:
    if Path(name).is_file():
        return name
    if name not in _CONFIGS:
        raise ArgumentTypeError(f"{name!r} is no file, and none of {sorted(_CONFIGS)}")
    return str(_CONFIGS[name])


def commands() -> list[Command]:
    return [
        LaunchedCommand("opd", "distil specialists into one student"),
        LaunchedCommand("nft", "train a specialist from rewards by DiffusionNFT"),
        LaunchedCommand("grpo", "train a specialist from rewards by Flow-GRPO or GRPO-Guard"),
        LaunchedCommand("ropd", "distil experts as far as a verifier is not content with the student"),
        LaunchedCommand("evaluate", "draw prompts with models, score the pictures, and tabulate"),
        ScriptCommand("reward-serve", "serve rewards over HTTP, from an environment or a GPU of their own"),
    ]
