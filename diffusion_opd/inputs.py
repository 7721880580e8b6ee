"""What a pipeline's `__call__` takes for each sample, told by its signature.

This file knows pipelines, and no policy or trainer.
"""

import inspect
import re

from diffusers import DiffusionPipeline

# Arguments of `__call__`; an IP adapter is an option of any pipeline
PICTURE = re.compile(r"^(?!.*ip_adapter)(\w+_)?(images?|video|audio)$")


def sample_arguments(pipeline_class: type[DiffusionPipeline]) -> set[str]:
    """The arguments of a pipeline's `__call__` that say what a sample is made of besides its prompt: further texts,
    pictures, videos, embeddings. Told by their annotations, which for one value a sample allow a list of texts, a
    picture or a tensor."""
    annotations = {name: str(p.annotation) for name, p in inspect.signature(pipeline_class.__call__).parameters.items()}
    return {
        name
        for name, annotation in annotations.items()
        if re.search(r"[Ll]ist\[str\]|Image|Tensor|Condition", annotation)
        and "callback" not in name
        and name not in ("prompt", "latents", "sigmas")
    }
