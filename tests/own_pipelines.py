"""Pipelines that somebody has written for themselves, around the parts of a tiny SD3."""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from tests.tiny_pipelines import BUILDERS


class Plain(StableDiffusion3Pipeline):
    """A pipeline of somebody's own, with habits that are seen in the wild: it sets an attribute of its scheduler, asks
    for its class and reads `prev_sample`."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        embeds, _, pooled, _ = self.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=32
        )
        x = self.prepare_latents(len(prompt), 4, 16, 16, embeds.dtype, self._execution_device, generator)
        self.scheduler.sigma_min = 0.2
        assert isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.advance(x, t, encoder_hidden_states=embeds, pooled_projections=pooled)
        return (x,)

    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return self.scheduler.step(self.predict(x, t, **embeds), t, x).prev_sample

    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return self.transformer(x, timestep=t.expand(len(x)), return_dict=False, **embeds)[0]


class Momentum(Plain):
    """Its prediction depends on the steps before."""

    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        if t == self.scheduler.timesteps[0]:
            self.memory = 0
        self.memory = 0.5 * self.memory + self.predict(x, t, **embeds)
        return self.scheduler.step(self.memory, t, x).prev_sample


def of(cls: type) -> DiffusionPipeline:
    pipe = cls(**BUILDERS["sd3"](0).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe
