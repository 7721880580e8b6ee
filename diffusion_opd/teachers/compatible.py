"""Whether a teacher pipeline fits the student, and which of its parts are the student's own."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..denoisers import denoisers_of
from ..files import name_or_path
from ..scheduler_proxy import is_flow, own_scheduler
from .manifest import plain_tensors
from .spec import Teacher


def check_compatible(teacher: Teacher, pipeline: DiffusionPipeline, student: DiffusionPipeline) -> None:
    """Refuses a teacher pipeline of another latent space or another time than the student's."""

    def refuse(what: str, theirs: Any, ours: Any) -> None:
        raise ValueError(
            f"teacher {teacher.id!r} ({teacher.source}) has {what} {theirs}, but the student has {ours}; they must be "
            "the same."
        )

    firsts: list[Any] = [next(iter(denoisers_of(party).values())) for party in (pipeline, student)]
    theirs, ours = (first.config for first in firsts)
    if theirs.get("in_channels") != ours.get("in_channels"):
        refuse("in_channels", theirs.get("in_channels"), ours.get("in_channels"))
    vae, own_vae = getattr(pipeline, "vae", None), getattr(student, "vae", None)
    if vae is not None and own_vae is not None:
        for key in ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            if vae.config.get(key) != own_vae.config.get(key):
                refuse(f"a VAE of {key}", vae.config.get(key), own_vae.config.get(key))
        # What encodes defines the latent space; decoders are fine-tuned without changing it
        if not same_weights(vae, own_vae, besides=("decoder.", "post_quant_conv.")):
            raise ValueError(
                f"teacher {teacher.id!r} ({teacher.source}) has a VAE that encodes with other weights than that of the "
                f"student ({name_or_path(student) or type(student).__name__}), so its latents mean something else; if "
                f"they do not, give its {next(iter(denoisers_of(pipeline)))} alone."
            )
    a, b = pipeline.scheduler, student.scheduler
    kinds = ["flow matching" if is_flow(s) else "VP diffusion" for s in (a, b)]
    if kinds[0] != kinds[1]:
        refuse("the time parametrisation of", *kinds)
    times = [scheduler.config.get("num_train_timesteps") for scheduler in (a, b)]
    if times[0] != times[1]:
        refuse("num_train_timesteps", *times)
    if not is_flow(a):
        kinds = [scheduler.config.get("prediction_type") for scheduler in (a, b)]
        if kinds[0] != kinds[1]:
            refuse("prediction_type", *kinds)
        if not torch.allclose(own_scheduler(a).alphas_cumprod.float(), own_scheduler(b).alphas_cumprod.float()):
            betas = [f"{s.config.beta_schedule} {s.config.beta_start}-{s.config.beta_end}" for s in (a, b)]
            refuse("betas", *betas)


def same_weights(a: nn.Module, b: nn.Module, besides: tuple[str, ...] = ()) -> bool:
    """Whether two modules hold the same tensors, up to the precision of the coarser dtype; `besides` the keys that
    start so."""
    if a is b:
        return True
    mine, theirs = (
        {key: value for key, value in plain_tensors(module.state_dict()).items() if not key.startswith(besides)}
        for module in (a, b)
    )
    if mine.keys() != theirs.keys():
        return False
    return all(mine[key].shape == theirs[key].shape and _same_values(mine[key], theirs[key]) for key in mine)


def _same_values(a: Tensor, b: Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    if {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}:  # one number, rounded in two ways
        return torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6)
    dtype = min(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).bits if dtype.is_floating_point else 0)
    return torch.equal(a.to(dtype), b.to(dtype))


def share_parts(pipeline: DiffusionPipeline, student: DiffusionPipeline) -> None:
    """Replaces what the teacher has in common with the student (config and weights) by the student's own."""
    for key, part in pipeline.components.items():
        own = getattr(student, key, None)
        if key not in denoisers_of(pipeline) and part is not own and same_part(part, own):
            vars(pipeline)[key] = own  # past `DiffusionPipeline.__setattr__`, which writes into the config


def same_part(mine: Any, theirs: Any) -> bool:
    """Whether two parts of pipelines, modules or tokenizers, do the same."""
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, nn.Module):
        configs = [_plain(getattr(part, "config", None)) for part in (mine, theirs)]  # a guard of prompts has none
        return configs[0] == configs[1] and same_weights(mine, theirs)
    if isinstance(mine, PreTrainedTokenizerBase):
        names = "model_max_length padding_side special_tokens_map chat_template".split()
        return mine.get_vocab() == theirs.get_vocab() and all(getattr(mine, n) == getattr(theirs, n) for n in names)
    return False


def _plain(config: Any) -> Any:
    """A config without what saving and loading change: names, dtypes, tuples that become lists."""
    if isinstance(config, PreTrainedConfig):
        config = config.to_dict()
    if isinstance(config, Mapping):
        ignored = ("architectures", "dtype", "torch_dtype", "transformers_version")
        return {k: _plain(v) for k, v in config.items() if k not in ignored and not str(k).startswith("_")}
    return [_plain(value) for value in config] if isinstance(config, (list, tuple)) else config
