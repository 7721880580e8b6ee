"""Draws, scores and tabulates.

This file knows the order of it, and neither how pictures are drawn nor how they are scored.
"""

import contextlib
import gc
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import EvalResult, metadata_update
from huggingface_hub.repocard_data import eval_results_to_model_index
from tqdm.auto import tqdm
from transformers.utils import hf_api

from ..attention import check_attention_backend, require_attention_backend
from ..config import computes_in_bf16
from ..disclosure import disclosed, is_repository
from ..errors import one_sentence
from ..inputs import PROMPT
from ..quantization import as_json, check_quantization
from ..rewards import Rewards, load_reward
from ..runs import hash_values
from .drawing import Model, Sample, draw, named, picture, samples_of, settings_of
from .prompts import PRESETS, load_prompts
from .report import grid, normalised_means, summary, table

logger = logging.getLogger(__name__)

DEFAULT = "default"
GRID_ROWS = 6
_DTYPES = ("bfloat16", "float16", "float32")
_PACKAGES = ("diffusion-opd", "diffusers", "transformers", "torch")


def evaluate(
    model: str,
    metrics: Sequence[Any],
    prompts: str | Mapping[str, str],
    output_dir: str,
    lora: Sequence[Any] = (),
    models: Sequence[Any] = (),
    include_base: bool = True,
    num_inference_steps: int = 40,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    images_per_prompt: int | Mapping[str, int] = 1,
    prompt_column: str | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    quantization_config: Any = None,
    attention_backend: str | None = None,
    seed: int = 42,
    push_to_hub: str | Sequence[str] = (),
) -> dict[str, Any]:
    """Draws prompts with several models, scores the pictures, and writes `results.json`, `results.md` and `grid.png`.

    Called on every process, of which each draws and scores a share. What lies in `output_dir` is not drawn, or scored,
    again; every picture has a seed of its own, so it is the same whatever the number of processes.

    Args:
        model (`str`): Hub id or folder of the base pipeline.
        metrics (`Sequence`): Reward functions as [`load_reward`] takes them, on the scale of tables.
        prompts (`str` or `dict[str, str]`):
            What [`load_prompts`] reads; or one such for some of the metrics by name, and under `"default"` for the
            others.
        output_dir (`str`): Where everything is written.
        lora (`Sequence`, *optional*):
            LoRAs of the base, each a row: Hub id, folder or file, `"name=path"`, or a dict of the fields of [`Lora`]
            and `name`, and `call_kwargs` of its own over those of all.
        models (`Sequence`, *optional*): Whole pipelines, likewise.
        include_base (`bool`, *optional*, defaults to `True`): Whether the base is a row.
        num_inference_steps (`int`, *optional*, defaults to `40`): Of the pipelines' calls.
        guidance_scale (`float`, *optional*): Of the pipelines' calls. `None`: each pipeline's own.
        height, width (`int`, *optional*): Likewise, in pixels.
        call_kwargs (`dict`, *optional*): More of the pipelines' calls.
        images_per_prompt (`int` or `dict[str, int]`, *optional*, defaults to `1`):
            Pictures of each prompt; with a dict as `prompts`, by the same names.
        prompt_column (`str`, *optional*): As of [`load_prompts`].
        batch_size (`int`, *optional*, defaults to `8`): Pictures of one call of the pipeline, and of one of a metric.
        dtype (`str`, *optional*):
            `"bfloat16"`, `"float16"` or `"float32"`, of the models. `None`: bfloat16 where the hardware computes in
            it, or float32.
        quantization_config (`dict` or [`~diffusers.PipelineQuantizationConfig`], *optional*):
            Which parts of all models are loaded in fewer bits, as of [`DiffusionConfig`].
        attention_backend (`str`, *optional*): Of all models' denoisers, as of [`DiffusionConfig`].
        seed (`int`, *optional*, defaults to `42`): Of all pictures.
        push_to_hub (`str` or `list[str]`, *optional*):
            Repositories into whose cards (`model-index`) results go: `"name=repository"`, or the repository alone if it
            is that of a row, or there is one row besides the base.

    Returns:
        `dict`: what `results.json` holds: `models` (by name and metric `mean`, `standard_error`, `scored`,
        `without_score`, of GenEval `groups`), `normalised_mean`, `settings`, `versions`.

    Raises:
        ValueError: for what does not fit together, before anything is drawn if that can be known.
    """
    # Processes without an accelerator know of each other only if they are told that there is none
    state = PartialState(cpu=not torch.accelerator.is_available())
    rows = [Model("base", model)] if include_base else []
    rows += [*named(lora, model), *named(models)]
    if not rows:
        raise ValueError("there is nothing to evaluate: give `lora` or `models`, or leave the base in.")
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several models are called {twice}; name them, as in `name=path`.")
    judges = {judge.all_names[0]: judge for judge in (Rewards(load_reward(one, scale="table")) for one in metrics)}
    if len(judges) < len(metrics) or not judges:
        raise ValueError(f"`metrics` needs at least one, each once; got {list(metrics)}.")
    sets = _sets(prompts, images_per_prompt, judges, prompt_column, seed)
    for name, judge in judges.items():
        judge.check_columns(list(sets[_set_of(name, sets)][0].row))
    if quantization_config is not None:
        check_quantization(quantization_config)
    if attention_backend is not None:
        check_attention_backend(attention_backend, trains=False)
        require_attention_backend(attention_backend)
    pushed = [_pushed(one, rows) for one in ([push_to_hub] if isinstance(push_to_hub, str) else push_to_hub)]
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    given |= {"height": height, "width": width, **(call_kwargs or {})}
    call = {name: value for name, value in given.items() if value is not None}
    weights = _dtype(dtype) if dtype else torch.bfloat16 if computes_in_bf16() else torch.float32

    folder = Path(output_dir)
    wanted = list({sample.key: sample for own in sets.values() for sample in own}.values())
    places = {row.name: folder / "pictures" / row.name for row in rows}
    calls = {row.name: {**call, **row.call_kwargs} for row in rows}
    more = (quantization_config, attention_backend)
    settings = {row.name: settings_of(row, places[row.name], calls[row.name], weights, seed, *more) for row in rows}
    for row in rows:
        draw(row, wanted, places[row.name], settings[row.name], calls[row.name], batch_size, quantization_config)
    state.wait_for_everyone()

    results: dict[str, dict[str, Any]] = {row.name: {} for row in rows}
    for name, judge in judges.items():
        samples = sets[_set_of(name, sets)]
        for row in rows:
            scores = _score(judge, name, row, samples, folder, batch_size, settings[row.name])
            tags = [sample.row.get("tag") for sample in samples]
            shown = [sample.row[PROMPT] for sample in samples]
            results[row.name][name] = summary(scores, shown, tags if name == "geneval" else None)
        judges[name] = None  # type: ignore[assignment]  # its model makes room for the next
        del judge
        gc.collect()
    content: dict[str, Any] = {
        "models": results,
        "normalised_mean": normalised_means(results),
        "settings": {
            "model": disclosed(model),
            "prompts": dict(prompts) if isinstance(prompts, Mapping) else prompts,
            "pictures": {name: len(own) for name, own in sets.items()},
            "call_kwargs": call,
            "own_call_kwargs": {row.name: dict(row.call_kwargs) for row in rows if row.call_kwargs},
            "dtype": str(weights),
            "quantization_config": as_json(quantization_config),
            "attention_backend": attention_backend,
            "seed": seed,
        },
        "versions": {name: version(name) for name in _PACKAGES},
    }
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
        (folder / "results.md").write_text(table(results), encoding="utf-8")
        firsts = list({sample.row[PROMPT]: sample for sample in reversed(wanted)}.values())[::-1]
        count = min(GRID_ROWS, len(firsts))  # evenly spaced, from the first to the last
        drawn = [firsts[index * (len(firsts) - 1) // max(1, count - 1)] for index in range(count)]
        columns = {name: [picture(place, one.key) for one in drawn] for name, place in places.items()}
        grid(columns, [one.row[PROMPT] for one in drawn]).save(folder / "grid.png")
        for repo, name in pushed:
            _push(repo, name, results[name], content["settings"])
    state.wait_for_everyone()
    return content


def _sets(
    prompts: str | Mapping[str, str],
    counts: int | Mapping[str, int],
    judges: Mapping[str, Any],
    column: str | None,
    seed: int,
) -> dict[str, list[Sample]]:
    """The samples of each set of prompts, by the metric that it is for."""
    sources = prompts if isinstance(prompts, Mapping) else {DEFAULT: prompts}
    by_name = counts if isinstance(counts, Mapping) else dict.fromkeys(sources, counts)
    for what, found in (("prompts", sources), ("images_per_prompt", by_name)):
        if unknown := sorted(found.keys() - judges.keys() - {DEFAULT}):
            raise ValueError(f"`{what}` names {unknown}; the metrics are {list(judges)}, and the others {DEFAULT!r}.")
    if any(not isinstance(count, int) or count < 1 for count in by_name.values()):
        raise ValueError(f"`images_per_prompt` must be at least 1, got {counts}.")
    if DEFAULT not in sources and (without := [name for name in judges if name not in sources]):
        raise ValueError(f"`prompts` has none for {without}; add them, or {DEFAULT!r}.")
    used = [name for name in sources if name in judges or any(judge not in sources for judge in judges)]
    loaded = {source: load_prompts(source, column) for source in dict.fromkeys(sources[name] for name in used)}
    return {name: samples_of(loaded[sources[name]], by_name.get(name, by_name.get(DEFAULT, 1)), seed) for name in used}


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {list(_DTYPES)}, got {name!r}.")
    return getattr(torch, name)


def _set_of(metric: str, sets: Mapping[str, Any]) -> str:
    return metric if metric in sets else DEFAULT


def _score(
    judge: Rewards,
    name: str,
    row: Model,
    samples: Sequence[Sample],
    folder: Path,
    batch_size: int,
    settings: Mapping[str, Any],
) -> list[float | None]:
    """The scores of a model's pictures, in order; what a killed run has scored is read."""
    state = PartialState()
    place = folder / "scores" / row.name
    place.mkdir(parents=True, exist_ok=True)
    known: dict[str, float | None] = {}
    # The same metric with other arguments has other scores, and so have pictures of other settings
    written = f"{name}.{hash_values([judge.written('all')[name], settings])}"
    for earlier in place.glob(f"{written}.*.jsonl"):
        for line in earlier.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the process was killed as it wrote
                continue
            known[entry["picture"]] = entry["score"]
    state.wait_for_everyone()  # all have read, before one writes
    mine = [sample for sample in samples if sample.key not in known][state.process_index :: state.num_processes]
    own: list[tuple[str, float | None]] = []
    scorer = judge.at_work() if mine else contextlib.nullcontext()
    with (place / f"{written}.{state.process_index}.jsonl").open("a") as file, scorer:
        if file.tell():
            file.write("\n")  # ends a line that a killed process left
        bar = tqdm(range(0, len(mine), batch_size), desc=f"{row.name}: {name}", disable=not state.is_main_process)
        for start in bar:
            batch = mine[start : start + batch_size]
            images = [picture(folder / "pictures" / row.name, sample.key) for sample in batch]
            scores = judge("all", [sample.row for sample in batch], images)[:, 0].tolist()
            for sample, score in zip(batch, scores, strict=True):
                own.append((sample.key, None if score != score else score))
                file.write(json.dumps({"picture": sample.key, "score": own[-1][1], PROMPT: sample.row[PROMPT]}) + "\n")
            file.flush()
    known |= dict(gather_object(own))
    return [known[sample.key] for sample in samples]


def _pushed(entry: str, rows: Sequence[Model]) -> tuple[str, str]:
    """A repository, and the row whose results go into its card."""
    name, separator, repo = entry.rpartition("=")
    if not separator:
        others = [row for row in rows if row.name != "base"]
        same = [row for row in others if str(row.lora.path if row.lora else row.path) == repo] or others
        name = same[0].name if len(same) == 1 else ""
    if name not in (names := [row.name for row in rows]):
        raise ValueError(f"`push_to_hub` needs a row for {repo!r}, as in `name=repository`; the rows are {names}.")
    with one_sentence(f"`push_to_hub`: the repository {repo!r} cannot be had"):
        hf_api().model_info(repo)
    return repo, name


def _push(repo: str, name: str, own: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    prompts = settings["prompts"]
    sources = prompts if isinstance(prompts, Mapping) else {DEFAULT: prompts}
    entries = []
    for metric, result in own.items():
        source = str(sources.get(metric, sources.get(DEFAULT)))
        dataset = PRESETS[source].dataset if source in PRESETS else source if is_repository(source) else None
        if result["mean"] is not None:
            entry = EvalResult(
                task_type="text-to-image",
                dataset_type=dataset or Path(source).stem,
                dataset_name=Path(source).stem,
                metric_type=metric,
                metric_value=round(result["mean"], 6),
                metric_name=metric,
                metric_args={**settings["call_kwargs"], **settings["own_call_kwargs"].get(name, {})},
            )
            entries.append(entry)
    metadata_update(repo, {"model-index": eval_results_to_model_index(name, entries)}, overwrite=True)
    logger.warning(f"The results are in the card of https://huggingface.co/{repo}.")
