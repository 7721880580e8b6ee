"""Pipelines that somebody has written for themselves, around the parts of a tiny SD3."""

import itertools

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tests.tiny_pipelines import BUILDERS


class Plain(StableDiffusion3Pipeline):
    """A pipeline of somebody's own, with habits that are seen in the wild: it sets an attribute of its scheduler, asks
    for its class and reads `prev_sample`."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        embeds, pooled = self.embed(prompt)
        x = self.begin(len(prompt), embeds.dtype, generator)
        self.scheduler.sigma_min = 0.2
        assert isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.advance(x, t, encoder_hidden_states=embeds, pooled_projections=pooled)
        return (x,)

    def embed(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=32
        )
        return embeds, pooled

    def begin(self, count: int, dtype: torch.dtype, generator: list[torch.Generator]) -> Tensor:
        return self.prepare_latents(count, 4, 16, 16, dtype, self._execution_device, generator)

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


class Detached(Momentum):
    """The same, with no gradient from step to step."""

    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        x = super().advance(x, t, **embeds)
        self.memory = self.memory.detach()
        return x


class Guided(Plain):
    """Classifier-free guidance against the empty prompt, and a memory of the guided predictions from step `since` on,
    with no gradient from step to step."""

    since = 1

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        num_inference_steps=4,
        generator=None,
        output_type="pil",
        return_dict=True,
        guidance_scale=3.0,
    ):
        (embeds, pooled), (nothing, none) = self.embed(prompt), self.embed([""] * len(prompt))
        x = self.begin(len(prompt), embeds.dtype, generator)
        self.scheduler.set_timesteps(num_inference_steps)
        memory = torch.zeros_like(x)
        for index, t in enumerate(self.scheduler.timesteps):
            v = self.predict(x, t, encoder_hidden_states=embeds, pooled_projections=pooled)
            if guidance_scale > 1:
                u = self.predict(x, t, encoder_hidden_states=nothing, pooled_projections=none)
                v = u + guidance_scale * (v - u)
            guided = v + 0.5 * memory if index >= self.since and self.remembers(guidance_scale) else v
            memory = guided.detach()
            x = self.scheduler.step(guided, t, x).prev_sample
        return (x,)

    def remembers(self, guidance_scale):
        return True


class Late(Guided):
    """It remembers from its fourth step on."""

    since = 3


class Unmindful(Guided):
    """It remembers under guidance alone."""

    def remembers(self, guidance_scale):
        return guidance_scale > 1


class Broken(Plain):
    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().predict(x, t, **embeds) * float("nan")


class Mixing(Plain):
    """Its samples see each other."""

    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        prediction = super().predict(x, t, **embeds)
        return prediction - prediction.mean(0)


class Restless(Plain):
    """Each of its predictions is another, whatever it is asked."""

    numbers = itertools.count()

    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().predict(x, t, **embeds) + next(self.numbers)


class InPairs(Plain):
    """Its state has two rows a sample."""

    def begin(self, count: int, dtype: torch.dtype, generator: list[torch.Generator]) -> Tensor:
        return super().begin(count, dtype, generator).repeat_interleave(2, dim=0)

    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().predict(x, t, **{name: part.repeat_interleave(2, dim=0) for name, part in embeds.items()})


class Twice(Plain):
    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().advance(super().advance(x, t, **embeds), t, **embeds)


class AtOnce(Plain):
    """Steps twice with one prediction."""

    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        prediction = self.predict(x, t, **embeds)
        return self.scheduler.step(prediction, t, self.scheduler.step(prediction, t, x).prev_sample).prev_sample


class Skips(Plain):
    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().advance(x, t, **embeds) if t != self.scheduler.timesteps[1] else x


class Tracked(Plain):
    """Its `__call__` keeps the graph itself."""

    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        return super().__call__(prompt, num_inference_steps, generator)


class WithoutLatents(Plain):
    """Draws its first state in its own way."""

    prepare_latents = None

    def begin(self, count: int, dtype: torch.dtype, generator: list[torch.Generator]) -> Tensor:
        return randn_tensor((count, 4, 8, 8), generator, self._execution_device, dtype)


class WithoutPrompts(Plain):
    """Reads prompts in its own way."""

    encode_prompt = None

    def embed(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = super().encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=32
        )
        return embeds, pooled


class Shown(Plain):
    """Decodes, and its tail is the next thing that it does to its last state."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        x = super().__call__(prompt, num_inference_steps, generator)[0]
        return self.vae.decode(self.tail(x, generator), return_dict=False)

    def tail(self, x: Tensor, generator: list[torch.Generator]) -> Tensor:
        return x.flip(1) * 2 - 1


class Clips(Shown):
    def tail(self, x: Tensor, generator: list[torch.Generator]) -> Tensor:
        return x.clamp(-8, 8)


class Blurs(Shown):
    def tail(self, x: Tensor, generator: list[torch.Generator]) -> Tensor:
        return x + 0.5 * x.roll(1, dims=-1)


class Draws(Shown):
    """Adds noise before it decodes, as LTX-Video does with a `decode_noise_scale`."""

    def tail(self, x: Tensor, generator: list[torch.Generator]) -> Tensor:
        return 0.9 * x + 0.1 * randn_tensor(x.shape, generator, x.device, x.dtype)


class Repeats(Shown):
    """Shows the first of its channels twice, and the last one not at all."""

    def tail(self, x: Tensor, generator: list[torch.Generator]) -> Tensor:
        return x[:, [0, 0, 1, 2]]


def of(cls: type) -> DiffusionPipeline:
    pipe = cls(**BUILDERS["sd3"](0).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe
