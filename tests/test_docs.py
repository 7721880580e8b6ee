"""The documentation says what is true: its snippets run on a tiny SD3, its commands parse, the sentences that it quotes
are the code's, and its table of weights is worked out again.

A page's `<!-- run -->` marks a snippet that is run, after those before it on the page; the models and prompts that it
names are folders and files of a temporary directory. `<!-- sentences -->` marks a list of quoted refusals, in which
`<...>` stands for what the code fills in.
"""

import ast
import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from diffusion_opd.cli.commands import LaunchedCommand
from diffusion_opd.cli.worker import run_script, script
from diffusion_opd.config import DiffusionConfig
from diffusion_opd.rl.config import DiffusionRLConfig
from diffusion_opd.transitions import Schedule, cps, dance_sde, flow_sde, ode
from tests.grids import SHIFT_3, kl_weights, sigmas
from tests.tiny_pipelines import LORA_TARGETS, sd3

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BASE = "stabilityai/stable-diffusion-3.5-medium"
TASKS = {"aesthetic": "AesTeacher", "ocr": "OCRTeacher", "geneval": "GenEvalTeacher"}

# What a snippet hands to a pipeline itself, and the checkpoint that a run of two steps leaves
SMALLER = {
    r'("(?:height|width)": )\d+': r"\g<1>16",
    r"(pipe\(.*)num_inference_steps=\d+": r"\1num_inference_steps=2, max_sequence_length=32",
    "checkpoint-500": "checkpoint-1",
}


@pytest.fixture
def small_runs(monkeypatch):
    """Configs as the snippets write them, but of a size for a CPU."""
    post_init = DiffusionConfig.__post_init__

    def shrink(config: DiffusionConfig) -> None:
        config.use_cpu = config.disable_tqdm = True
        config.fp16 = False
        config.num_train_epochs, config.per_device_train_batch_size = 1, 2
        config.num_inference_steps = min(config.num_inference_steps, 3)
        config.height = config.width = 16
        config.call_kwargs = {**(config.call_kwargs or {}), "max_sequence_length": 32}
        if config.max_steps > 0:
            config.max_steps, config.save_steps = 2, 1
        if isinstance(config, DiffusionRLConfig):
            config.num_generations, config.gradient_accumulation_steps = 2, 1
        post_init(config)

    monkeypatch.setattr(DiffusionConfig, "__post_init__", shrink)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def snippets(page: Path) -> list[str]:
    return re.findall(r"^<!-- run -->\n```python[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def named_in_the_docs(tmp_path_factory) -> Path:
    """A tiny SD3 and its teachers, where the snippets look for them."""
    root = tmp_path_factory.mktemp("docs")
    base = sd3()
    base.save_pretrained(root / BASE)
    sd3(1).save_pretrained(root / "me/sd35-finetuned")
    with torch.random.fork_rng():
        for seed, folder in enumerate(TASKS.values()):
            torch.manual_seed(seed)
            lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=LORA_TARGETS)
            teacher = get_peft_model(copy.deepcopy(base.transformer), lora)
            teacher.save_pretrained(root / "quanhaol/DiffusionOPD" / folder / "lora")
    layers = get_peft_model_state_dict(teacher)
    layers = {key.removeprefix("base_model.model."): value for key, value in layers.items()}
    base.save_lora_weights(root / "me/style-lora", transformer_lora_layers=layers)
    prompts = [f"a hill and {count} trees" for count in range(2)]
    rows = [json.dumps({"prompt": prompt, "teacher_id": task}) for task in TASKS for prompt in prompts]
    (root / "me/opd-prompts").mkdir()
    (root / "me/opd-prompts/train.jsonl").write_text("\n".join(rows))
    for task in TASKS:
        (root / f"{task}.txt").write_text("\n".join(prompts))
        (root / f"{task}.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    return root


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name)
def test_snippets_run(page: Path, named_in_the_docs: Path, small_runs, tmp_path, monkeypatch):
    shutil.copytree(named_in_the_docs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    namespace: dict = {}
    for snippet in snippets(page):
        for pattern, replacement in SMALLER.items():
            snippet = re.sub(pattern, replacement, snippet)
        exec(compile(snippet, f"<{name(page)}>", "exec"), namespace)  # a name that no source is looked up by


def test_every_page_with_the_trainer_is_run():
    for page in PAGES:
        if re.search(r"Diffusion(OPD|NFT|GRPO)Trainer\(", page.read_text()):
            assert snippets(page), page


def test_code_fits_the_page():
    """96 columns are what a window of 1300 pixels shows between the sidebars."""
    for page in PAGES:
        for block in re.findall(r"^```\w+[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            assert max(map(len, block.splitlines()), default=0) <= 96, (page, block)


# Commands


def commands() -> list[str]:
    shell = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    return [line for block in shell for line in joined(block).splitlines()]


def joined(text: str) -> str:
    return text.replace("\\\n", " ")


def test_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    trainers = ("opd", "nft", "grpo")
    scripts = [ROOT / "diffusion_opd" / "scripts" / f"{name}.py" for name in trainers]
    written = [
        line for path in scripts for line in re.findall(r"^    (diffusion-opd .*)", joined(path.read_text()), re.M)
    ]
    ours = [
        shlex.split(command)
        for command in [*commands(), *written]
        if re.match(f"diffusion-opd ({'|'.join(trainers)}) ", command)
    ]
    assert len(ours) > 20 and len(written) == 8
    for _, name, *flags in ours:
        if "opd.yaml" in flags:  # of the page
            flags[flags.index("opd.yaml")] = "examples/configs/sd35/opd.yaml"
        told = LaunchedCommand(name, "").launched(flags)
        assert told.config_file is None or Path(told.config_file).is_file()
        _, parser = script(name)
        parser.parse_args_and_config([*told.training_script_args[1:], "--fp16", "false", "--use_cpu", "true"])


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- run: diffusion-opd" in page.read_text()], ids=name)
def test_yaml_runs(page: Path, named_in_the_docs: Path, small_runs, tmp_path, monkeypatch):
    shutil.copytree(named_in_the_docs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for command, text in re.findall(
        r"<!-- run: diffusion-opd (\w+) -->\n```yaml[^\n]*\n(.*?)```", page.read_text(), re.DOTALL
    ):
        Path("run.yaml").write_text(text)
        run_script(command, ["--config", "run.yaml", "--max_steps", "1"])
        assert Path("sd35m-opd", "pytorch_lora_weights.safetensors").is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for command in commands() for word in re.findall(r"^make ([\w-]+)", command)}
    workflows = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    targets |= set(re.findall(r"\btest-\w+", workflows))
    assert {"demo", "test-unit", "test-nightly"} <= targets
    for target in targets:
        assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.MULTILINE), target


# Sentences


def template(node: ast.expr) -> str:
    """The text of an expression, with `<>` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    return "<>"


def quoted(page: Path) -> list[str]:
    found = []
    for part in page.read_text().split("<!-- sentences -->")[1:]:
        items = re.findall(r"^- (.*?)(?=\n\n|\n- |\Z)", part.split("\n## ")[0].strip(), re.MULTILINE | re.DOTALL)
        for item in items:
            sentence = max(re.findall(r"(`+)(.+?)(?<!`)\1(?!`)", item, re.DOTALL), key=lambda match: len(match[1]))[1]
            found.append(" ".join(sentence.split()))
    return found


def test_quoted_sentences_are_the_codes():
    sentences = set()
    for file in (ROOT / "diffusion_opd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                sentences |= {" ".join(template(argument).split()) for argument in node.exc.args}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "one_sentence":
                sentences.add(f"{' '.join(template(node.args[0]).split())}: <>")
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("warning", "warning_once"):
                sentences.add(" ".join(template(node.args[0]).split()))
    ours = [(name(page), sentence) for page in PAGES for sentence in quoted(page)]
    assert len(ours) > 40
    unknown = [entry for entry in ours if re.sub(r"<[^<>]+>", "<>", entry[1]) not in sentences]
    assert not unknown


# Numbers, links


def test_table_of_shares():
    text = (ROOT / "docs/concepts.md").read_text().split("<!-- shares -->")[1]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| \d.*$", text, re.MULTILINE)]
    assert [row[0] for row in rows[:9]] == [str(step) for step in range(1, 10)]
    levels = sigmas(SHIFT_3)
    for column, kernel in enumerate((ode, flow_sde, dance_sde, cps), start=2):
        weights = kl_weights(kernel, levels, 0.7)[:9]
        for row, weight, level in zip(rows, weights, levels, strict=False):
            assert float(row[1]) == pytest.approx(level, abs=5e-4)
            assert float(row[column]) == pytest.approx(100 * weight / sum(weights), abs=0.06)


def test_table_of_policy_gradient_weights():
    text = (ROOT / "docs/concepts.md").read_text().split("<!-- policy-gradient weights -->")[1]
    rows = [[float(cell) for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| \d.*$", text, re.MULTILINE)]
    assert len(rows) == 5
    schedule = Schedule(sigmas(SHIFT_3))
    x, v = torch.zeros(1, 1), torch.ones(1, 1)
    for step, level, *weights in rows:
        index = int(step) - 1
        assert level == pytest.approx(schedule.levels[index], abs=5e-4)
        dt = schedule.levels[index] - schedule.levels[index + 1]
        slopes = {k: abs(k(x, v, schedule, index, 0.7).mean.item()) for k in (flow_sde, dance_sde, cps)}
        std = flow_sde(x, v, schedule, index, 0.7).std
        expected = [slopes[flow_sde] / std, *(slope / dt for slope in slopes.values())]
        assert weights == pytest.approx(expected, abs=6e-3)


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)", (ROOT / "README.md").read_text())
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
