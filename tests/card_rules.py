"""What the Hub asks of a model card's metadata, as far as it is published.

- Types of the fields: `ApiModelMetadata` of the npm package @huggingface/hub, src/types/api/api-model.ts
- Licences: `License` there, src/types/public.ts, and huggingface/hub-docs, docs/hub/repositories-licenses.md
- Tasks and widgets: `PIPELINE_DATA` and `WidgetExample` of the npm package @huggingface/tasks, src/pipelines.ts and
  src/widget-example.ts
- `base_model_relation`: huggingface/hub-docs, docs/hub/model-cards.md

An unknown task is a warning of the Hub's, a wrong type, licence or id an error. This file knows YAML only.
"""

import re
from typing import Any

import yaml

TASKS = set(
    """text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
    text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification
    reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
    multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
    image-text-to-image image-text-to-video visual-question-answering document-question-answering
    zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
    image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any video-to-video
    other""".split()
)
LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 gemma apple-ascl apple-amlr unknown
    other""".split()
)
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
TEXTS = ("pipeline_tag", "library_name", "license_name", "license_link", "model_name", "base_model_relation")
LISTS = ("tags", "metrics")
TEXTS_OR_LISTS = ("base_model", "datasets", "license", "language")
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
METADATA = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def check_card(content: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings for a model card, a sentence each."""
    found = METADATA.match(content)
    data = yaml.safe_load(found[1]) if found else None
    if not isinstance(data, dict):
        return [], ["empty or missing yaml metadata in repo card"]
    errors, warnings = [], []
    for name in data.keys() & {*TEXTS, *LISTS, *TEXTS_OR_LISTS}:
        texts = data[name] if isinstance(data[name], list) and name not in TEXTS else [data[name]]
        if name in LISTS and not isinstance(data[name], list):
            errors.append(f'"{name}" must be an array')
        elif not all(isinstance(text, str) for text in texts):
            errors.append(f'"{name}" must be a string')
        elif name in ("base_model", "datasets"):
            errors += [f'"{name}" with value "{text}" is not valid' for text in texts if not REPOSITORY.fullmatch(text)]
        elif name == "license":
            errors += [f'"license" must be one of the published ones, not "{text}"' for text in {*texts} - LICENSES]
            if "other" in texts and "license_name" not in data:
                warnings.append('"license_name" is missing beside "other"')
        elif name == "base_model_relation" and data[name] not in RELATIONS:
            errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
        elif name == "pipeline_tag" and data[name] not in TASKS:
            warnings.append(f'the pipeline tag "{data[name]}" is not in the official list')
    return errors + _check_widget(data.get("widget", [])), warnings


def _check_widget(examples: Any) -> list[str]:
    """Of a model that is given text and whose outputs are files."""
    if not isinstance(examples, list):
        return ['"widget" must be an array']
    errors = []
    for index, example in enumerate(examples):
        example = example if isinstance(example, dict) else {}
        output = example.get("output")
        for name, value in {
            "text": example.get("text"),
            "output.url": output.get("url") if isinstance(output, dict) else None,
        }.items():
            if not isinstance(value, str):
                errors.append(f'"widget[{index}].{name}" must be a string')
    return errors
