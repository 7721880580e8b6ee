"""A script of this package by its name, as a process of it runs: `python -m diffusion_opd.cli.worker opd --config ...`.

This file knows how scripts are found and how their mistakes are told, and nothing of what they do.
"""

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from ..scripts.parser import Parser

_PACKAGE = Path(__file__).parents[1]


def script(name: str) -> tuple[Any, Parser]:
    """The module of a script and its parser."""
    module = importlib.import_module(f"diffusion_opd.scripts.{name.replace('-', '_')}")
    return module, module.make_parser(prog=f"diffusion-opd {name}")


def run_script(name: str, args: list[str], fail_with_unknown_args: bool = True) -> None:
    """Runs a script. What this package refuses ends the process with one sentence and exit code 2; every other error
    is raised."""
    module, parser = script(name)
    parsed = parser.parse_args_and_config(args, fail_with_unknown_args=fail_with_unknown_args)
    try:
        module.main(*parsed)
    except (ValueError, TypeError, ImportError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if Path(last.filename).is_relative_to(_PACKAGE) and (last.line or "").startswith("raise "):
            parser.error(str(error))
        raise


if __name__ == "__main__":
    run_script(sys.argv[1], sys.argv[2:], fail_with_unknown_args=False)  # those in YAML are accelerate's
