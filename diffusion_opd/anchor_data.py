"""Real pictures that hold a student near to what pictures look like: which rows a step sees, and what of them its
pipeline is asked about.

This file knows datasets and policies, and no loss or trainer.
"""

from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from .data import column_of, holds_pictures, undecoded
from .inputs import PROMPT, columns_read, inputs_of, is_prompt, read_picture, sample_arguments, size_of
from .latents import Latents, find_latents
from .policy import Policy, Visit
from .sampling import SEED_ANCHOR, noise_generators, normal, seed_of
from .scheduler_proxy import Step
from .transitions import noised

TARGET = "target_image"


class Noised(NamedTuple):
    """Pictures at a noise level: the visit at which the student is asked, what it was made of, and the inputs and the
    generators of the call."""

    visit: Visit
    x_0: Tensor
    noise: Tensor
    inputs: dict[str, list[Any]]
    generators: list[torch.Generator]


class AnchorData:
    """
    A dataset of prompts and pictures.

    Args:
        dataset (`Dataset`):
            With the columns `prompt` and `target_image`, or `image` where that is nothing that the pipeline takes; and
            whatever else the pipeline takes for each sample.
        pipeline ([`~diffusers.DiffusionPipeline`]): The student's.
        asked (`Sequence[str]`, *optional*): As `input_columns`.
        seed (`int`): Of the order of its rows, and of their noise.

    Raises:
        TypeError: if it is no `Dataset`.
        ValueError: if it lacks a column, or is empty.
    """

    def __init__(self, dataset: Any, pipeline: DiffusionPipeline, asked: Sequence[str] | None, seed: int):
        cls: Any = type(pipeline)
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`anchor_dataset` must be a `Dataset`, got {type(dataset).__name__}.")
        names = dataset.column_names
        self.picture = TARGET if TARGET in names or "image" in sample_arguments(cls) else "image"
        if lacking := [name for name in (PROMPT, self.picture) if name not in names]:
            raise ValueError(f"`anchor_dataset` has no column {lacking}, only {names}.")
        if not len(dataset):
            raise ValueError("`anchor_dataset` is empty.")
        for row, prompt in enumerate(column_of(dataset, PROMPT).to_pylist()):
            if not is_prompt(prompt):
                raise ValueError(
                    f"`anchor_dataset`: the prompt of row {row} must be text of whole characters that is not empty, "
                    f"got {prompt!r}."
                )
        self.columns = columns_read(cls, [name for name in names if name != self.picture], asked)
        self._texts = {name for name, is_text in sample_arguments(cls).items() if is_text}
        self.dataset, self._seed = dataset, seed
        for column in self._pictures.values():
            if holds_pictures(feature := dataset.features[column]):
                self.dataset = self.dataset.cast_column(column, undecoded(feature))
        self._look()
        self._known: dict[Hashable, tuple[Latents, list[Visit]]] = {}

    @property
    def _pictures(self) -> dict[str, str]:
        """Columns of pictures, by what they are to the pipeline."""
        own = {name: column for name, column in self.columns.items() if name not in self._texts}
        return {"": self.picture, **own}

    def _look(self) -> None:
        """Refuses a picture whose header cannot be read."""
        for column in self._pictures.values():
            with ThreadPoolExecutor() as pool:  # files may lie on a network
                for row, error in enumerate(pool.map(_why_not, self.dataset[column])):
                    if error is not None:
                        raise ValueError(f"`anchor_dataset`: the `{column}` of row {row} {error}.") from error

    def row(self, place: int) -> dict[str, Any]:
        """The row that comes at a place of the run: every row once, then all of them in another order."""
        epoch, number = divmod(place, len(self.dataset))
        order = np.random.default_rng(seed_of(self._seed, SEED_ANCHOR, epoch)).permutation(len(self.dataset))
        row = int(order[number])
        return self._read(self.dataset[row], row)

    def _read(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        read = dict(row)
        for name, column in self._pictures.items():
            if row.get(column) is not None:
                try:
                    read[column] = read_picture(row[column], "mask" in name)
                except ValueError as error:
                    raise ValueError(f"`anchor_dataset`: the `{column}` of row {number} {error}.") from error
        return read

    def calls(self, places: Sequence[int], together: int | None) -> list[list[int]]:
        """Which places of the run go through the pipeline together."""
        alone = together == 1 or any(name not in self._texts for name in self.columns)
        return [[place] for place in places] if alone else [list(places)]

    @torch.no_grad()
    def noised(self, policy: Policy, places: Sequence[int], visit: int) -> Noised:
        """Pictures that are as noisy as the states of a visit.

        Args:
            policy ([`Policy`]): The student.
            places (`Sequence[int]`): Of the run, of one call.
            visit (`int`): Its index.
        """
        rows = [self.row(place) for place in places]
        inputs = inputs_of(rows, self.columns)
        seeds = [seed_of(self._seed, SEED_ANCHOR, place, 1) for place in places]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents, plan = self._of(policy, inputs)
        (step,) = plan[visit].steps
        x_0 = latents.encode([row[self.picture] for row in rows])  # float32, on the device of the VAE
        noise = normal(x_0.shape, noise_generators(generators), x_0.device)
        nothing: Any = None
        state = noised(x_0, noise, step.schedule, step.index).to(step.sample.dtype)
        asked = Step(0, 0, step.index, nothing, state, nothing, step.schedule)
        return Noised(Visit(visit, (asked,)), x_0, noise, inputs, generators)

    def _of(self, policy: Policy, inputs: Mapping[str, Sequence[Any]]) -> tuple[Latents, list[Visit]]:
        """Of what size the states are, and at which noise levels, goes by the pictures that the pipeline is given."""
        sizes = tuple(size_of(v[0]) for name, v in sorted(inputs.items()) if name not in self._texts)
        if sizes not in self._known:
            one = {name: list(values[:1]) for name, values in inputs.items()}
            with policy.walk(one, [torch.Generator().manual_seed(0)], _stays) as dry:
                plan = [visit.detach() for visit in dry.plan()]
            self._known[sizes] = find_latents(policy, one), plan
        return self._known[sizes]


def _why_not(picture: Any) -> ValueError | None:
    try:
        size_of(picture)
    except ValueError as error:
        return error
    return None


def _stays(step: Step) -> Tensor:
    return step.sample
