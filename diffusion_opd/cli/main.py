"""`diffusion-opd COMMAND ...`.

This file knows the names of the commands, and nothing of what they take.
"""

import sys
from argparse import ArgumentParser
from typing import NoReturn

from trl.cli.commands.base import CommandContext

from .. import __version__
from .commands import commands


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        "diffusion-opd",
        description="Distils specialist diffusion models into one student, trains specialists, and evaluates both.",
        epilog="`diffusion-opd COMMAND --help` shows the flags of a command; `--config FILE` reads them from YAML.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=ArgumentParser)
    by_name = {command.name: command for command in commands()}
    for command in by_name.values():
        command.register(subparsers)
    args, unknown = parser.parse_known_args(argv)
    if args.command is None and unknown:
        parser.error(f"{unknown[0]!r} is no command and no flag.")
    if args.command is None:
        parser.print_help()
        return 0
    return by_name[args.command].run(args, CommandContext(argv))


if __name__ == "__main__":
    sys.exit(main())
