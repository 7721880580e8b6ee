"""Lets mkdocstrings read docstrings in Hugging Face's style, which is Google's with Markdown where Google's has types.

a, b (`dict` or `{id: teacher}`, *optional*, defaults to `1`):    two parameters of that type, with that default
[`~transformers.TrainingArguments`]                               `TrainingArguments`, with a link if it is ours
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import griffe

SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: .*)?\n?)+", re.MULTILINE)
# `names (type):`, `names (type), names (type):` or `name, name:`; a type may hold colons and parentheses
ENTRY = re.compile(r"^    ([*\w][\w*, ]* \(.+?\)|[*\w]+(?:, [*\w]+)+):(?= |$)", re.MULTILINE)
PARTY = re.compile(r"([*\w][\w*, ]*?) \((.+?)\)(?:, (?=[*\w]+ \()|$)")
REFERENCE = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?![(\[])")
OPTIONAL = re.compile(r"(?:, |^)\*?optional\*?")
DEFAULT = re.compile(r", defaults? to (.+)$")


@dataclass(eq=False)
class Prose(griffe.Expr):
    """A type in words, `str or Teacher`: text, and names that link."""

    parts: list[str | griffe.Expr]

    def iterate(self, *, flat: bool = True) -> Iterator[str | griffe.Expr]:
        yield from self.parts


class HuggingFaceDocstring(griffe.Docstring):
    """A docstring whose types are read here, and everything else by Google's parser."""

    def parse(self, *args: Any, **options: Any) -> list[griffe.DocstringSection]:
        kinds: dict[str, str] = {}

        def without_types(entry: re.Match[str]) -> str:
            parties = PARTY.findall(entry[1]) or [(entry[1], None)]
            kinds.update((name, kind) for names, kind in parties for name in names.split(", ") if kind)
            return f"    {','.join(names.replace(' ', '') for names, _ in parties)}:"

        text = SECTION.sub(lambda section: ENTRY.sub(without_types, section[0]), self.value)
        plain = griffe.Docstring(text, parent=self.parent, parser=self.parser, parser_options=self.parser_options)
        sections = plain.parse(*args, **options)
        for section in sections:
            if isinstance(section, griffe.DocstringSectionText):
                section.value = self.linked(section.value)
            elif isinstance(section.value, list):
                section.value = [one for entry in section.value for one in self.entries(entry, kinds)]
        return sections

    def entries(self, entry: Any, kinds: dict[str, str]) -> Iterator[Any]:
        """An entry of a section for each name that it begins with."""
        entry.description = self.linked(entry.description)
        if isinstance(entry, (griffe.DocstringReturn, griffe.DocstringRaise)):
            if entry.annotation is not None:
                entry.annotation = self.prose(str(entry.annotation).strip("()"))
            yield entry
            return
        for name in entry.name.split(","):
            one = type(entry)(name=name, description=entry.description, annotation=entry.annotation)
            one.value = entry.value
            if name != entry.name:
                declared = getattr(self.parent, "parameters", {})
                found = declared[name] if name in declared else self.parent.members.get(name)
                one.annotation, one.value = getattr(found, "annotation", None), getattr(found, "default", None)
            if (kind := kinds.get(name)) is not None:
                is_optional, default = OPTIONAL.search(kind), DEFAULT.search(kind)
                if words := OPTIONAL.sub("", DEFAULT.sub("", kind)):
                    one.annotation = self.prose(words)
                if is_optional and one.value is None:
                    one.value = default[1].replace("`", "") if default else "None"
            yield one

    def prose(self, words: str) -> Prose:
        pieces = re.split(r"\[`~?([\w.]+)`\]", words)
        names = [self.name(piece.rpartition(".")[2]) for piece in pieces[1::2]]
        parts = [piece.replace("`", "") for piece in pieces]
        parts[1::2] = names
        return Prose([part for part in parts if part])

    def name(self, name: str) -> str | griffe.Expr:
        path = classes(self.parent.package).get(name)
        return griffe.ExprName(name, parent=path.rpartition(".")[0]) if path else name

    def linked(self, text: str) -> str:
        def link(match: re.Match[str]) -> str:
            path = classes(self.parent.package).get(match[1])
            return f"[`{match[1]}`][{path}]" if path and path != self.parent.path else f"`{match[1]}`"

        return REFERENCE.sub(link, text)


@cache
def classes(package: griffe.Module) -> dict[str, str]:
    """The classes of the package by their names."""
    found: dict[str, str] = {}

    def look(module: griffe.Module) -> None:
        found.update((name, one.path) for name, one in module.classes.items() if not one.is_alias)
        for inner in module.modules.values():
            if not inner.is_alias:
                look(inner)

    look(package)
    return {name: path for name, path in found.items() if not name.startswith("_")}


class HuggingFaceStyle(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if (read := obj.docstring) is not None:
            obj.docstring = HuggingFaceDocstring(
                read.value,
                lineno=read.lineno,
                endlineno=read.endlineno,
                parent=obj,
                parser=read.parser,
                parser_options=read.parser_options,
            )
