"""What is released is whole, and says of itself what is true."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import diffusion_opd

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusion_opd"
WORLD = ROOT / "examples" / "toy_world"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

NAMED = {"PIL": "pillow"}  # what is imported under another name than it is installed
# What the package asks for and does not import itself
FOR_OTHERS = {
    "protobuf": "T5 tokenizers, within transformers",
    "sentencepiece": "T5 tokenizers, within transformers",
}
BROUGHT = {"tqdm"}  # by transformers and datasets, which show their progress with it
TRACKERS = {"trackio", "wandb"}  # imported by who names them in `report_to`, and has them


def imported(folder: Path) -> set[str]:
    """What is installed for the modules in a folder."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return {NAMED.get(name, name) for name in found - sys.stdlib_module_names - {PACKAGE.name}}


def declared(lines: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line).group() for line in lines}


def test_what_the_package_imports_is_what_it_depends_on():
    found, needed = imported(PACKAGE), declared(PROJECT["dependencies"])
    of_extras = {name for extra in ("rewards", "torchao") for name in declared(PROJECT["optional-dependencies"][extra])}
    assert found - TRACKERS - of_extras == needed - FOR_OTHERS.keys()
    assert needed >= FOR_OTHERS.keys() and found >= TRACKERS  # no entry of a table outlives its use


def test_what_the_examples_import_beside_it_is_in_their_extra():
    found = imported(ROOT / "examples") - {"examples", *declared(PROJECT["dependencies"])}
    assert found - BROUGHT == declared(PROJECT["optional-dependencies"]["examples"])


def test_every_extra_that_is_named_is_there():
    extras, named = PROJECT["optional-dependencies"].keys(), set()
    for path in (ROOT / "Makefile", *(ROOT / ".ci").iterdir(), *ROOT.rglob("docs/**/*.md"), ROOT / "README.md"):
        named |= {
            one
            for found in re.findall(r"(?:\.|diffusion-opd)\[([a-z,]+)\]", path.read_text())
            for one in found.split(",")
        }
    for path in (ROOT / ".github").rglob("*.yml"):
        named |= {one for found in re.findall(r"\.\[([a-z,]+)\]", path.read_text()) for one in found.split(",")}
    assert {"dev", "rewards", "deepspeed"} <= named <= extras
    table = (ROOT / "docs" / "installation.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == extras


def test_every_dependency_has_a_lower_bound():
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    assert [line for line in lines if not re.search(r"[>=]=|^diffusion-opd\[", line)] == []


def test_the_workflow_of_the_docs_installs_what_the_extra_names():
    workflow = (ROOT / ".github" / "workflows" / "docs.yml").read_text()
    listed = " ".join(f'"{line}"' for line in PROJECT["optional-dependencies"]["docs"])
    assert f"pip install {listed}\n" in workflow


def test_the_lowest_torch_is_the_declared_one():
    (lowest,) = (line.partition(">=")[2] for line in PROJECT["dependencies"] if line.startswith("torch>="))
    for path in (ROOT / "Makefile", ROOT / ".github" / "workflows" / "tests.yml"):
        assert set(re.findall(r"^[^#\n]*\bTORCH\b.*==([\d.]+)", path.read_text(), re.MULTILINE)) == {lowest}, path


def test_the_version_is_one():
    assert (
        re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M).group(1) == diffusion_opd.__version__
    )


def run(folder: Path, *command: str | Path, **environment: str) -> str:
    """What a command prints; raises with that if it fails."""
    process = subprocess.run(
        command, cwd=folder, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.mark.slow
def test_the_wheel_trains_where_the_checkout_is_not(tmp_path):
    """Built from a copy, without a network; what it runs on is the environment of the tests."""
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(tmp_path, *pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert held == {path.relative_to(ROOT).as_posix() for path in files}
    for name in ("model_card.md", "py.typed", "accelerate_configs/zero2.yaml"):
        assert f"{PACKAGE.name}/{name}" in held

    run(tmp_path, *pip, "install", "--no-index", "--no-deps", "--no-compile", "--target", site, wheel)
    (elsewhere / "tests").mkdir(parents=True)
    for name in ("__init__.py", "wheel_run.py", "tiny_pipelines.py"):
        shutil.copy(ROOT / "tests" / name, elsewhere / "tests")
    # An editable install puts the checkout on the path of every process
    leave = f"import sys; sys.path[:] = [entry for entry in sys.path if entry != {str(ROOT)!r}]"
    start = "from tests.wheel_run import main; main()"
    printed = run(elsewhere, sys.executable, "-c", f"{leave}; {start}", PYTHONPATH=str(site))
    assert printed.splitlines()[-1] == str(site / PACKAGE.name)

    # From YAML alone, on the toy world
    for path in ("opd.yaml", "assets/base", "assets/teachers", "prompts"):
        copy = shutil.copytree if (WORLD / path).is_dir() else shutil.copy
        (elsewhere / "examples" / "toy_world" / path).parent.mkdir(parents=True, exist_ok=True)
        copy(WORLD / path, elsewhere / "examples" / "toy_world" / path)
    command, environment = site / "bin" / "diffusion-opd", {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": ""}
    settings = (
        "--config examples/toy_world/opd.yaml --max_steps 2 --save_strategy steps --save_steps 2 --logging_steps 1"
    )
    printed = run(elsewhere, command, "opd", *settings.split(), **environment)
    assert "Student saved to runs/toy_world_opd." in printed
    student = elsewhere / "runs" / "toy_world_opd"
    history = json.loads((student / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(history[0][f"kl/{task}"] > 0 for task in ("compose", "text", "style"))
    assert (student / "pytorch_lora_weights.safetensors").is_file()
    assert list((site / PACKAGE.name / "scripts" / "__pycache__").glob("opd.*"))  # it was not the checkout's
