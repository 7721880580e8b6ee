"""Which module may know which: kernels and objectives are pure, and the trainers are known to nobody."""

import ast
from pathlib import Path

import diffusion_opd

FOLDER = Path(diffusion_opd.__file__).parent
MAY_IMPORT = {
    "transitions": set(),
    "objectives": {"transitions"},
    "sampling": set(),
    "config": {"transitions"},
    "policy": {"errors", "transitions"},
    "errors": set(),
    "teachers": {"config", "errors", "policy"},
    "student": {"config", "errors", "policy", "shards", "teachers"},
    "checkpoints": set(),
    "shards": set(),
    "engines": {"config"},
    "stopwatch": set(),
    "base_trainer": {
        *("checkpoints", "config", "engines", "errors", "policy", "sampling", "shards", "stopwatch", "teachers"),
        "transitions",
    },
    "trainer": {
        *("base_trainer", "config", "errors", "objectives", "policy", "sampling", "student", "teachers"),
        "transitions",
    },
    "rl.objectives": {"objectives"},
    "rl.rewards": {"errors", "sampling"},
    "rl.config": {"config"},
    "rl.trainer": {
        *("base_trainer", "checkpoints", "policy", "sampling", "student", "teachers", "transitions"),
        *("rl.config", "rl.objectives", "rl.rewards"),
    },
    "rl.grpo_trainer": {
        *("objectives", "policy", "sampling", "transitions"),
        *("rl.config", "rl.objectives", "rl.trainer"),
    },
    "rl.nft_trainer": {
        *("objectives", "policy", "shards", "teachers", "transitions"),
        *("rl.config", "rl.objectives", "rl.trainer"),
    },
    "rl.__init__": {"rl.config", "rl.grpo_trainer", "rl.nft_trainer"},
    "__init__": {"config", "rl.__init__", "teachers", "trainer"},
}


def imported(source: str, module: str = "a") -> set[str]:
    """The modules of the package that `module` of it imports, in whatever way and wherever."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = [FOLDER.name, *module.split(".")][: -node.level] if node.level else []
            start = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {module_of(name) for name in names if name.startswith(f"{FOLDER.name}.")}
    return found


def module_of(name: str) -> str:
    """Of `diffusion_opd.a.b` or of `b` in it, the module that it is or stands in."""
    for dotted in (name, name.rpartition(".")[0]):
        path = FOLDER.parent.joinpath(*dotted.split("."))
        if path.with_suffix(".py").is_file():
            return dotted.partition(".")[2]
        if (path / "__init__.py").is_file():
            return f"{dotted}.__init__".partition(".")[2]
    raise AssertionError(f"{name} is nowhere in the package")


def test_imports_point_one_way():
    paths = {".".join(path.relative_to(FOLDER).with_suffix("").parts): path for path in FOLDER.rglob("*.py")}
    modules = {name: imported(path.read_text(), name) for name, path in paths.items()}
    assert modules.keys() == MAY_IMPORT.keys()
    for name, found in modules.items():
        assert found <= MAY_IMPORT[name], name


def test_every_way_to_import_is_seen():
    lines = ["import {0}.config", "from {0} import config", "from {0}.config import check_noise"]
    for line in [*lines, "from . import config", "from .config import check_noise"]:
        assert imported(f"def f():\n    {line.format(FOLDER.name)}") == {"config"}, line
    for line in (*lines, "from .. import config", "from ..config import check_noise"):
        assert imported(line.format(FOLDER.name), "rl.trainer") == {"config"}, line
    for line in ("from . import config", "from .config import SCALES", "from {0}.rl import config"):
        assert imported(line.format(FOLDER.name), "rl.trainer") == {"rl.config"}, line
    assert imported("from .rl import DiffusionNFTConfig") == {"rl.__init__"}
