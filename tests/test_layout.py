"""Which module may know which: kernels and objectives are pure, and the trainer is known to nobody."""

import ast
from pathlib import Path

import diffusion_opd

FOLDER = Path(diffusion_opd.__file__).parent
MAY_IMPORT = {
    "transitions": set(),
    "objectives": {"transitions"},
    "sampling": set(),
    "config": {"transitions"},
    "policy": {"transitions"},
    "teachers": {"policy"},
    "base_trainer": {"config", "policy", "sampling", "teachers"},
    "trainer": {"base_trainer", "config", "objectives", "policy", "sampling", "teachers", "transitions"},
    "__init__": {"config", "teachers", "trainer"},
}


def imported(source: str) -> set[str]:
    """The modules of the package that a module of it imports, in whatever way and wherever."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = f"{FOLDER.name}.{node.module or ''}".rstrip(".") if node.level else node.module
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith(f"{FOLDER.name}.")}
    return found


def test_imports_point_one_way():
    modules = {path.stem: imported(path.read_text()) for path in FOLDER.glob("*.py")}
    assert modules.keys() == MAY_IMPORT.keys()
    for name, found in modules.items():
        assert found <= MAY_IMPORT[name], name


def test_every_way_to_import_is_seen():
    for line in ("import {0}.a", "from {0} import a", "from {0}.a import b", "from . import a", "from .a import b"):
        assert imported(f"def f():\n    {line.format(FOLDER.name)}") == {"a"}, line
