"""What the API pages say of each parameter: its type, whether it is required, its default."""

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

griffe = pytest.importorskip("griffe")
ROOT = Path(__file__).parents[1]

SOURCE = '''
class Teacher: ...

def distil(teachers, args=None, *, a=1, b=None, steps=10, frames=None):
    """
    Distils a [`Teacher`], as a [`~transformers.Trainer`] does.

    Args:
        teachers (`str`, [`Teacher`], or a `{id: teacher}` dict of `list[Teacher | None]` (not empty)):
            The specialists: one, or (several): each by its id.
        args ([`~transformers.TrainingArguments`], *optional*): In one line, of a [`Teacher`].
        a, b (`int`, *optional*):
            Two of one type.
        steps (`int`, *optional*, defaults to `10`), frames (`Callable[[int], dict]`, *optional*):
            Two of their own types.

    Returns:
        `Teacher`: of shape: `[batch]`.

    Raises:
        ValueError, TypeError: if anything: all of it.
    """
'''


@pytest.fixture(scope="module")
def extension() -> Any:
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HuggingFaceStyle()


def sections(thing: Any) -> dict[str, Any]:
    options = {"warn_unknown_params": False, "warn_missing_types": False}
    options |= {"returns_named_value": False, "returns_multiple_items": False}  # as mkdocs.yml has them
    return {section.kind.value: section.value for section in thing.docstring.parse("google", **options)}


def test_types_defaults_and_links(extension):
    extensions = griffe.load_extensions(extension)
    with griffe.temporary_visited_package("field", {"__init__.py": SOURCE}, extensions=extensions) as package:
        found = sections(package["distil"])
    assert found["text"] == "Distils a [`Teacher`][field.Teacher], as a `Trainer` does."
    entries = [
        (one.name, str(one.annotation), one.value and str(one.value), one.description.strip())
        for one in found["parameters"]
    ]
    of_teachers = "str, Teacher, or a {id: teacher} dict of list[Teacher | None] (not empty)"
    assert entries == [
        ("teachers", of_teachers, None, "The specialists: one, or (several): each by its id."),
        ("args", "TrainingArguments", "None", "In one line, of a [`Teacher`][field.Teacher]."),
        ("a", "int", "1", "Two of one type."),
        ("b", "int", "None", "Two of one type."),
        ("steps", "int", "10", "Two of their own types."),
        ("frames", "Callable[[int], dict]", "None", "Two of their own types."),
    ]
    links = [part for part in found["parameters"][0].annotation if not isinstance(part, str)]
    assert [link.canonical_path for link in links] == ["field.Teacher"]
    assert [(str(one.annotation), one.description) for one in found["returns"]] == [("Teacher", "of shape: `[batch]`.")]
    assert [(str(one.annotation), one.description) for one in found["raises"]] == [
        ("ValueError, TypeError", "if anything: all of it.")
    ]


def documented(package: Any) -> Iterator[Any]:
    for member in package.members.values():
        if not member.is_alias:
            if member.docstring is not None:
                yield member
            if member.is_module or member.is_class:
                yield from documented(member)


def fields_of(thing: Any) -> set[str]:
    """What can be given to a function or a class, as Python itself has it."""
    module: Any = importlib.import_module(thing.module.path)
    for name in thing.path.removeprefix(thing.module.path).strip(".").split("."):
        module = getattr(module, name)
    return set() if isinstance(module, ModuleType) else set(inspect.signature(module).parameters)


def test_docstrings_of_the_package(extension):
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)], extensions=griffe.load_extensions(extension))
    package = loader.load("diffusion_opd")
    seen = 0
    for thing in documented(package):
        source = inspect.cleandoc(thing.docstring.value)
        for kind, value in sections(thing).items():
            if kind == "text":
                assert not re.search(r"\[`~|\[~|(?m:^(Args|Raises|Returns|Attributes):)", value), thing.path
                continue
            for one in value:
                seen += 1
                assert not re.search(r"\[`?~", one.description), thing.path
                assert not re.search(r"[`*]|\[~|optional", str(one.annotation)), (thing.path, str(one.annotation))
                if kind == "parameters":
                    assert one.name.isidentifier(), (thing.path, one.name)
                    assert re.search(rf"\b{one.name}\b", source)
                    assert one.name in fields_of(thing), (thing.path, one.name)
                    header = re.search(rf"(?m)^    .*\b{one.name}\b[^:]* \((.*)\):", source)
                    if header and "optional" in header[1]:
                        assert one.value is not None, (thing.path, one.name)
    assert seen > 300


def test_every_module_is_on_a_page():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    shown = re.findall(r"^::: diffusion_opd\.([\w.]+)", pages, re.MULTILINE)
    for path in (ROOT / "diffusion_opd").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "diffusion_opd").with_suffix("").parts)
        # What is in a package is on the pages of its modules, and what a command takes is in its own `--help`
        if path.stem not in ("__init__", "main") and not module.startswith("scripts."):
            assert any(name == module or name.startswith(f"{module}.") for name in shown), module
