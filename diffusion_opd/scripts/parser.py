"""Flags and YAML of the scripts, as TRL's parser reads them; a `--help` of what is ours, and mistakes in one sentence.

This file knows dataclasses and flags, and no model, data or trainer.
"""

import difflib
import inspect
import os
import sys
import time
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Iterable
from typing import Any, NoReturn

from trl import TrlParser
from trl.cli.commands.training import _subtract_subsequence

# Of the fields of other packages, those that `--help` shows
_USUAL = frozenset(
    "output_dir max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps eval_strategy "
    "eval_steps save_steps save_total_limit logging_steps lr_scheduler_type fp16 seed use_cpu report_to push_to_hub "
    "hub_model_id dataset_name dataset_config dataset_train_split dataset_test_split datasets".split()
)


class Parser(TrlParser):
    """
    `TrlParser`: reads flags, and `--config FILE` in YAML, into dataclasses; a flag goes before the file.

    `--help` shows the fields of this package by the class that declares them, and the usual ones of TRL and
    transformers, `--help_all` those besides. What does not fit ends the process with one sentence and exit code 2.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        usage = "%(prog)s [--config FILE] [flags]"
        super().__init__(dataclass_types, allow_abbrev=False, usage=usage, formatter_class=_Flags, **kwargs)
        self._splits = False
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show all flags")

    def parse_args_and_config(self, args: Iterable[str] | None = None, *others: Any, **options: Any) -> tuple[Any, ...]:
        given = _two_words(sys.argv[1:] if args is None else args)
        if given and given[-1] == "--config":
            self.error("`--config` needs a file.")
        try:
            return super().parse_args_and_config(given, *others, **options)
        except FileNotFoundError as error:
            self.error(f"there is no file {error.filename!r}.")
        except Exception as error:  # of YAML, or of a config that refuses its values
            self.error(str(error))

    def parse_args_into_dataclasses(
        self, args: Any = None, return_remaining_strings: bool = False, *others: Any, **options: Any
    ) -> tuple[Any, ...]:
        if self._splits:
            return self.parse_known_args(args)
        *parsed, unknown = super().parse_args_into_dataclasses(args, True, *others, **options)
        if unknown and not return_remaining_strings:
            self.error_of_unknown(unknown[0])
        return (*parsed, unknown) if return_remaining_strings else tuple(parsed)

    def split(self, args: list[str]) -> tuple[list[str], list[str]]:
        """Of the flags those that are its own, and the others, with those that the file adds. Their values are not
        looked at: a config that does may take a GPU."""
        args = _two_words(args)
        self._splits = True
        _, from_file, from_shell = self.parse_args_and_config(args, True, separate_remaining_strings=True)
        self._splits = False
        return _subtract_subsequence(args, from_shell), [*from_file, *from_shell]

    def error_of_unknown(self, flag: str, known: Iterable[str] = ()) -> NoReturn:
        """Ends with a sentence about a flag that nobody takes; `known` are flags besides this parser's own."""
        near = difflib.get_close_matches(flag.partition("=")[0], [*self._option_string_actions, *known], n=1)
        self.error(f"nothing is called {flag!r}{f'; does it mean {near[0]!r}?' if near else '.'}")

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # the first says the same, and its end ends the others
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        left = {action.dest: action for action in reversed(self._actions)}  # of `--x` and `--no_x` the first
        sections: dict[str, list[Action]] = {}
        others = []
        for cls in dict.fromkeys(cls for dataclass in self.dataclass_types for cls in dataclass.__mro__):
            actions = [left.pop(name) for name in inspect.get_annotations(cls) if name in left]
            if cls.__module__.partition(".")[0] == __package__.partition(".")[0]:
                sections[cls.__name__] = actions
            else:
                others += [action for action in actions if everything or action.dest in _USUAL]
        for title, actions in (sections | {"TRL and transformers": others, "help": [*left.values()]}).items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def _two_words(args: Iterable[str]) -> list[str]:
    """`--config=FILE`, which TRL does not know, as `--config FILE`."""
    return [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]


class _HelpAll(Action):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"dest": SUPPRESS, "default": SUPPRESS})

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        print(parser.format_help(everything=True))
        sys.exit(0)


class _Flags(ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action: Action) -> str:
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value if action.nargs != '?' else ''}".rstrip()

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        name = getattr(action.type, "__name__", "value").removeprefix("string_to_")
        return {"str": "text", "int": "number", "float": "number", "DatasetConfig": "dataset"}.get(name, name).upper()

    def _get_help_string(self, action: Action) -> str | None:
        plain = action.default not in (None, SUPPRESS) and not isinstance(action.default, list)
        return super()._get_help_string(action) if plain else action.help
