"""
Models side by side: draws prompts, scores the pictures, and writes a table, a grid and `results.json`.

    diffusion-opd evaluate --model stabilityai/stable-diffusion-3.5-medium --lora sd35m-opd --metrics pickscore hpsv2 \
        --prompts drawbench --output_dir table

What was drawn and scored already is not done again.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate import PartialState

from diffusion_opd.config import parse_json
from diffusion_opd.evaluation import evaluate
from diffusion_opd.evaluation.report import table
from diffusion_opd.scripts.parser import Parser


@dataclass
class EvaluateArguments:
    """
    What to draw with, what to score, and where to write; see [`diffusion_opd.evaluation.evaluate`].

    Args:
        model (`str`): The base pipeline.
        lora (`list[str]`, *optional*): LoRAs of it, each a row: `PATH` or `NAME=PATH`; in YAML also dicts, with
            `call_kwargs` of its own.
        models (`list[str]`, *optional*): Whole pipelines, likewise.
        include_base (`bool`, *optional*, defaults to `True`): Whether the base is a row.
        metrics (`list[str]`): Names of rewards or dotted paths; in YAML also dicts with `name` and arguments.
        prompts (`list[str]`):
            A file (`.txt`, `.jsonl`, `.csv`), the Hub id of a dataset or a preset (`drawbench`, `parti`); of some of
            the metrics `METRIC=FILE`; in YAML also a dict.
        prompt_column (`str`, *optional*): Column of the prompts.
        images_per_prompt (`str`, *optional*, defaults to `1`): A number; in YAML also a dict as of `prompts`.
        output_dir (`str`): Where everything is written.
        num_inference_steps, guidance_scale, height, width, call_kwargs: Of the pipelines' calls.
        batch_size (`int`, *optional*, defaults to `8`): Pictures of one call.
        dtype (`str`, *optional*): Of the models.
        quantization_config (`str`, *optional*): Parts of the models in fewer bits, as JSON; in YAML a dict.
        attention_backend (`str`, *optional*): Of the models' denoisers.
        seed (`int`, *optional*, defaults to `42`): Of all pictures.
        push_to_hub (`list[str]`, *optional*): Repositories whose cards get results: `REPOSITORY` or `NAME=REPOSITORY`.
    """

    model: str = field(default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "The base pipeline."})
    lora: list[str] = field(default_factory=list, metadata={"help": "LoRAs of it: PATH or NAME=PATH."})
    models: list[str] = field(default_factory=list, metadata={"help": "Whole pipelines: PATH or NAME=PATH."})
    include_base: bool = field(default=True, metadata={"help": "Whether the base is a row."})
    metrics: list[str] = field(default_factory=list, metadata={"help": "Names of rewards, or dotted paths."})
    prompts: list[str] = field(
        default_factory=list, metadata={"help": "A file, a dataset or a preset; METRIC=FILE for one of the metrics."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts. Default: `prompt`, or another usual name."}
    )
    images_per_prompt: str = field(default="1", metadata={"help": "Pictures of each prompt."})
    output_dir: str = field(default="evaluation", metadata={"help": "Where everything is written."})
    num_inference_steps: int = field(default=40, metadata={"help": "Denoising steps."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Default: the pipeline's own."})
    height: int | None = field(default=None, metadata={"help": "Default: the pipeline's own."})
    width: int | None = field(default=None, metadata={"help": "Default: the pipeline's own."})
    call_kwargs: str | None = field(default=None, metadata={"help": "More of the pipeline's call, as JSON."})
    batch_size: int = field(default=8, metadata={"help": "Pictures of one call."})
    dtype: str | None = field(
        default=None, metadata={"help": "bfloat16, float16 or float32. Default: bfloat16 where the hardware has it."}
    )
    quantization_config: str | None = field(
        default=None, metadata={"help": "Parts that are loaded in fewer bits: a `PipelineQuantizationConfig` as JSON."}
    )
    attention_backend: str | None = field(default=None, metadata={"help": "Attention kernel, by diffusers' name."})
    seed: int = field(default=42, metadata={"help": "Of all pictures."})
    push_to_hub: list[str] = field(
        default_factory=list, metadata={"help": "Put results into cards: REPOSITORY, or NAME=REPOSITORY for a row."}
    )

    def __post_init__(self) -> None:
        self.prompts = _by_metric(self.prompts)
        self.call_kwargs = parse_json("call_kwargs", self.call_kwargs)
        self.quantization_config = parse_json("quantization_config", self.quantization_config)
        counts: Any = self.images_per_prompt
        if isinstance(counts, str):
            if not counts.isdecimal():
                raise ValueError(f"`images_per_prompt` must be a whole number, got {counts!r}.")
            counts = int(counts)
        self.images_per_prompt = counts


def _by_metric(entries: Any) -> Any:
    """`FILE`, `METRIC=FILE ...` or both, as a text or a dict."""
    if isinstance(entries, (str, dict)):
        return entries
    if not entries:
        raise ValueError("`prompts` is empty; give a file, a dataset or a preset.")
    pairs = [entry.rpartition("=") for entry in entries]
    if len(pairs) == 1 and not pairs[0][1]:
        return pairs[0][2]
    by_metric = {name or "default": source for name, _, source in pairs}
    if len(by_metric) < len(pairs):
        raise ValueError(f"`prompts` gives one set for each metric, and one for the others; got {entries}.")
    return by_metric


def main(script_args: EvaluateArguments) -> None:
    results = evaluate(**asdict(script_args))
    if PartialState().is_main_process:
        print(table(results["models"]))


def make_parser(prog: str | None = None) -> Parser:
    return Parser(EvaluateArguments, prog=prog, description=__doc__.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
