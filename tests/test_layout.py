"""Which module may know which: imports point down a list of layers, pure maths stays pure, and tests share helpers."""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import diffusion_opd

FOLDER = Path(diffusion_opd.__file__).parent
TESTS = Path(__file__).parent

# Lowest first; a module imports modules of lower layers only. Names are patterns, the first that fits counts.
LAYERS = [
    [
        "errors",
        "disclosure",
        "transitions",
        "checkpoints",
        "stopwatch",
        "files",
        "paused",
        "placement",
        "queries",
        "targets",
        "denoisers",
        "decoding",
        "callbacks.sounds",
        "rewards.statistics",
    ],
    ["objectives", "shards", "inputs", "modular", "attention", "quantization"],
    ["config", "sampling"],
    ["data"],
    ["scheduler_proxy", "encode_cache", "runs"],
    ["ahead"],
    ["rewards.functions", "rewards.scorer"],
    ["rewards.clip", "rewards.registry"],
    ["rewards.[!_]*"],
    ["rewards.__init__"],
    ["policy"],
    ["startup", "adapters", "fingerprint", "latents"],
    ["anchor_data"],
    ["teachers.spec"],
    ["teachers.locating", "teachers.manifest"],
    ["teachers.compatible"],
    ["teachers.plain"],
    ["teachers.lora"],
    ["teachers.loading", "teachers.teachers"],
    ["teachers.__init__"],
    ["student"],
    ["checks", "engines", "callbacks.[!_]*"],
    ["callbacks.__init__"],
    ["publishing"],
    ["resuming"],
    ["guidance"],
    ["parties"],
    ["losses"],
    ["base_trainer"],
    ["taught"],
    ["rl.objectives", "rl.config"],
    ["rl.trainer"],
    ["trainer", "rl.*_trainer"],
    ["rl.__init__"],
    ["evaluation.prompts", "evaluation.drawing", "evaluation.report"],
    ["evaluation.evaluate"],
    ["evaluation.__init__"],
    ["__init__"],
    ["scripts.parser", "scripts.arguments", "scripts.__init__"],
    ["scripts.[!_]*"],
    ["cli.worker", "cli.__init__"],
    ["cli.commands"],
    ["cli.main"],
]
# Torch and nothing else: equations that are read, and tested, without a model
PURE = {"transitions", "objectives", "queries", "targets", "rewards.statistics", "rl.objectives"}


def imports(source: str, package: str = "") -> Iterator[str]:
    """What is imported, in whatever way and wherever, by its dotted name: of `from a import b` it is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str:
    """Of `diffusion_opd.a.b` or of `b` in it, the module that it is or stands in."""
    for dotted in (name, name.rpartition(".")[0]):
        path = FOLDER.parent.joinpath(*dotted.split("."))
        if path.with_suffix(".py").is_file():
            return dotted.partition(".")[2]
        if (path / "__init__.py").is_file():
            return f"{dotted}.__init__".partition(".")[2]
    raise AssertionError(f"{name} is nowhere in the package")


def of_the_package(source: str, module: str = "a") -> set[str]:
    """The modules of the package that `module` of it imports."""
    found = imports(source, f"{FOLDER.name}.{module}".rpartition(".")[0])
    return {module_of(name) for name in found if name.startswith(f"{FOLDER.name}.")}


def rank(module: str) -> int:
    for number, patterns in enumerate(LAYERS):
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"{module} is in no layer: give it a place in LAYERS, above all that it imports")


SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path.read_text() for path in sorted(FOLDER.rglob("*.py"))
}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str):
    for other in of_the_package(SOURCES[module], module):
        assert rank(other) < rank(module), f"{module} imports {other}, which is not of a lower layer"


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_maths_imports_torch_alone(module: str):
    assert of_the_package(SOURCES[module], module) <= PURE
    found = imports(SOURCES[module], f"{FOLDER.name}.{module}".rpartition(".")[0])
    assert {name.partition(".")[0] for name in found} <= {"torch", FOLDER.name, *sys.stdlib_module_names}


def test_the_first_stage_is_known_to_the_top_alone():
    """Who distils needs no line of what learns from rewards."""
    for module, source in SOURCES.items():
        if not module.startswith(("rl.", "scripts.")) and module != "__init__":
            assert not any(other.startswith("rl.") for other in of_the_package(source, module)), module


def test_no_test_imports_another():
    """What two of them need is a module of its own, so that each can be read, moved and run alone."""
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    for path in TESTS.rglob("*.py"):
        names = imports(path.read_text(), ".".join(path.relative_to(TESTS.parent).parent.parts))
        of_ours = {part for name in names if name.startswith(f"{TESTS.name}.") for part in name.split(".")}
        assert not tests & of_ours, path


def test_every_way_to_import_is_seen():
    lines = ["import {0}.config", "from {0} import config", "from {0}.config import check_noise"]
    for line in [*lines, "from . import config", "from .config import check_noise"]:
        assert of_the_package(f"def f():\n    {line.format(FOLDER.name)}") == {"config"}, line
    for line in (*lines, "from .. import config", "from ..config import check_noise"):
        assert of_the_package(line.format(FOLDER.name), "rl.trainer") == {"config"}, line
    for line in ("from . import config", "from .config import SCALES", "from {0}.rl import config"):
        assert of_the_package(line.format(FOLDER.name), "rl.trainer") == {"rl.config"}, line
    assert of_the_package("from .rl import DiffusionNFTConfig") == {"rl.__init__"}


def test_a_module_without_a_layer_is_told_so():
    with pytest.raises(AssertionError, match="new is in no layer"):
        rank("new")
