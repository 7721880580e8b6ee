"""Transition kernels: how the student moves from one noise level to the next.

A kernel is a pure function `(x, prediction, schedule, index, noise_level) -> Transition`: the Gaussian that carries the
state `x` at noise level `schedule.levels[index]` to `schedule.levels[index + 1]`, given what the model predicts there.
All arithmetic is float32 (coefficients: Python's float64). What else there is to know about a kernel stands in
`TRANSITIONS`, and only there. This file knows no pipeline, no model and no trainer.

Flow matching (paper, Sec. 3): `x_s = (1 - s) x_0 + s eps`, the model predicts the velocity `v = eps - x_0`.
VP diffusion: `x_t = sqrt(a) x_0 + sqrt(1 - a) eps` with `a` the cumulative alpha, the model predicts `eps` or
`v = sqrt(a) eps - sqrt(1 - a) x_0`.

Models whose time rises, and those of variance exploding (`x = x_0 + sigma eps`), are flow matching in other coordinates
(`s = sigma / (1 + sigma)`, `x_s = x / (1 + sigma)`): a [`Schedule`] holds how to go there and back.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from torch import Tensor

F = TypeVar("F", bound=Callable[..., "Transition"])


class Schedule(NamedTuple):
    """The noise levels of one rollout.

    Attributes:
        levels (`tuple[float, ...]`):
            `N + 1` noise levels. Flow matching: sigmas in [0, 1], strictly decreasing. VP: cumulative alphas in [0, 1],
            strictly increasing.
        prediction_type (`str`):
            What the model predicts: `"flow"`, `"epsilon"` or `"v_prediction"`.
        scales (`tuple[float, ...]`):
            For models of other coordinates than flow matching's, which are moved in these: by level, how many times
            larger their states are. None: 1.
        velocities (`tuple[tuple[float, float], ...]`):
            For these by level `(a, b)`, with which the velocity at a state `x` (in flow matching's coordinates) is
            `a x + b prediction`. None: `(0, 1)`.
    """

    levels: tuple[float, ...]
    prediction_type: str = "flow"
    scales: tuple[float, ...] = ()
    velocities: tuple[tuple[float, float], ...] = ()

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow"


class Transition(NamedTuple):
    """`N(mean, std^2 I)`: one step of a sampler. `std` is the std of the STEP (`sqrt(-dt)` included), 0 if
    deterministic."""

    mean: Tensor
    std: float

    def sample(self, noise: Tensor) -> Tensor:
        """The next state for standard normal `noise` of the shape of `mean`."""
        return self.mean + self.std * noise


def denoised(x: Tensor, prediction: Tensor, schedule: Schedule, index: int) -> Tensor:
    """The clean latent `x_0` that a prediction at `schedule.levels[index]` stands for, float32."""
    level, x, prediction = schedule.levels[index], x.float(), prediction.float()
    if schedule.is_flow:
        x, velocity = _as_flow(x, prediction, schedule, index)
        return x - level * velocity
    if schedule.prediction_type == "epsilon":
        return (x - math.sqrt(1 - level) * prediction) / math.sqrt(level)
    return math.sqrt(level) * x - math.sqrt(1 - level) * prediction


def noised(x_0: Tensor, noise: Tensor, schedule: Schedule, index: int) -> Tensor:
    """The forward process: the clean latent `x_0` with standard normal `noise` at `schedule.levels[index]`, float32."""
    level = schedule.levels[index]
    clean, dirty = (1 - level, level) if schedule.is_flow else (math.sqrt(level), math.sqrt(1 - level))
    state = clean * x_0.float() + dirty * noise
    return schedule.scales[index] * state if schedule.scales else state


def velocity_gap(x: Tensor, prediction: Tensor, x_0: Tensor, noise: Tensor, schedule: Schedule, index: int) -> Tensor:
    """What a prediction at the state `x`, [`noised`] from `x_0`, is off, float32: in velocity, `v - (eps - x_0)`, for
    flow matching (arXiv 2210.02747), in what the model predicts for VP models."""
    if schedule.is_flow:
        return _as_flow(x, prediction.float(), schedule, index)[1] - (noise - x_0.float())
    if schedule.prediction_type == "epsilon":
        return prediction.float() - noise
    level = schedule.levels[index]
    return prediction.float() - (math.sqrt(level) * noise - math.sqrt(1 - level) * x_0.float())


def _as_flow(x: Tensor, prediction: Tensor, schedule: Schedule, index: int) -> tuple[Tensor, Tensor]:
    """A state and a prediction there in flow matching's coordinates: `x_s` and its velocity."""
    if schedule.scales:
        x = x.float() / schedule.scales[index]
    if schedule.velocities:
        of_x, of_prediction = schedule.velocities[index]
        prediction = of_x * x.float() + of_prediction * prediction.float()
    return x, prediction


def _in_flow(step: F) -> F:
    """A kernel of flow matching for models of other coordinates too: they are moved in its own."""

    @functools.wraps(step)
    def kernel(x: Tensor, prediction: Tensor, schedule: Schedule, index: int, *args: Any, **kwargs: Any) -> Transition:
        x, velocity = _as_flow(x, prediction, schedule, index)
        transition = step(x, velocity, schedule, index, *args, **kwargs)
        if not schedule.scales:
            return transition
        scale = schedule.scales[index + 1]
        return Transition(scale * transition.mean, scale * transition.std)

    return cast(F, kernel)


@_in_flow
def ode(x: Tensor, velocity: Tensor, schedule: Schedule, index: int, noise_level: float = 0.0) -> Transition:
    """Euler step of the probability-flow ODE (paper, Eq. 7 with zero noise): `x + dt v`. `noise_level` is not used."""
    sigma, sigma_next = schedule.levels[index], schedule.levels[index + 1]
    return Transition(x.float() + (sigma_next - sigma) * velocity.float(), 0.0)


def _sde(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, g: float) -> Transition:
    """Euler-Maruyama step of the SDE with the ODE's marginals and diffusion `g`; the two SDEs differ in `g(s)` only:
    `mean = x + dt (v + g^2 / (2 s) (x + (1 - s) v))`, `std = g sqrt(-dt)`."""
    x, velocity, dt = x.float(), velocity.float(), sigma_next - sigma
    drift = velocity + g**2 / (2 * sigma) * (x + (1 - sigma) * velocity)
    return Transition(x + dt * drift, g * math.sqrt(-dt))


@_in_flow
def flow_sde(x: Tensor, velocity: Tensor, schedule: Schedule, index: int, noise_level: float) -> Transition:
    """SDE of Flow-GRPO (arXiv 2505.05470, Eq. 9): `g(s) = a sqrt(s / (1 - s))`.

    `1 - s` is bounded below by `1 - sigma_1`, the second level of the schedule: schedules that start just below 1
    (Wan's UniPC at 0.999999) would explode if only `s = 1` were special.
    """
    sigma, sigma_next = schedule.levels[index], schedule.levels[index + 1]
    g = noise_level * math.sqrt(sigma / max(1 - sigma, 1 - schedule.levels[1]))
    return _sde(x, velocity, sigma, sigma_next, g)


@_in_flow
def dance_sde(x: Tensor, velocity: Tensor, schedule: Schedule, index: int, noise_level: float) -> Transition:
    """SDE of DanceGRPO (arXiv 2505.07818): constant diffusion `g(s) = a`."""
    return _sde(x, velocity, schedule.levels[index], schedule.levels[index + 1], noise_level)


@_in_flow
def cps(x: Tensor, velocity: Tensor, schedule: Schedule, index: int, noise_level: float) -> Transition:
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): DDIM's form with `rho = s' sin(a pi / 2)`,
    `mean = (1 - s') x_0 + sqrt(s'^2 - rho^2) eps`, `a` in [0, 1]. The step to `s' = 0` is deterministic."""
    sigma, sigma_next = schedule.levels[index], schedule.levels[index + 1]
    x_0, eps = x.float() - sigma * velocity.float(), x.float() + (1 - sigma) * velocity.float()
    rho = sigma_next * math.sin(noise_level * math.pi / 2)
    return Transition((1 - sigma_next) * x_0 + math.sqrt(sigma_next**2 - rho**2) * eps, rho)


def ddim(x: Tensor, prediction: Tensor, schedule: Schedule, index: int, noise_level: float = 0.0) -> Transition:
    """DDIM for VP models (arXiv 2010.02502, Eq. 12 and 16); `noise_level` is its eta, in [0, 1]."""
    alpha, alpha_next = schedule.levels[index], schedule.levels[index + 1]
    x_0 = denoised(x, prediction, schedule, index)
    x, eps = x.float(), prediction.float()
    if schedule.prediction_type == "v_prediction":
        eps = math.sqrt(alpha) * eps + math.sqrt(1 - alpha) * x
    std = noise_level * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
    rest = max(1 - alpha_next - std**2, 0.0)  # from alpha 0 with eta 1 it is 0, and may round below
    return Transition(math.sqrt(alpha_next) * x_0 + math.sqrt(rest) * eps, std)


class KernelFunction(Protocol):
    """What a kernel is called with: four arguments by position, `noise_level` by name too."""

    def __call__(
        self, x: Tensor, prediction: Tensor, schedule: Schedule, index: int, /, noise_level: float
    ) -> Transition: ...


@dataclass(frozen=True)
class Kernel:
    """
    A kernel and what there is to know about it.

    Args:
        name (`str`): What a user calls it.
        function ([`KernelFunction`]): Its step.
        is_flow (`bool`): Whether it moves flow-matching models, or VP models.
        max_noise_level (`float`, *optional*, defaults to infinity): Upper bound of `noise_level`; 0: it has no noise.
        default_noise_level (`float`, *optional*, defaults to `0.0`): Where the user gives none.
        is_exact_at_the_end (`bool`, *optional*, defaults to `False`):
            Whether the step to level 0 has std 0 at every `noise_level`.
        on_vp (`str`, *optional*): Name of the kernel that takes its place on VP models.
    """

    name: str
    function: KernelFunction
    is_flow: bool
    max_noise_level: float = math.inf
    default_noise_level: float = 0.0
    is_exact_at_the_end: bool = False
    on_vp: str | None = None

    def __call__(
        self, x: Tensor, prediction: Tensor, schedule: Schedule, index: int, /, noise_level: float
    ) -> Transition:
        return self.function(x, prediction, schedule, index, noise_level)


@dataclass(frozen=True)
class BoundKernel:
    """A kernel with its `noise_level`."""

    func: Kernel
    noise_level: float

    def __call__(self, x: Tensor, prediction: Tensor, schedule: Schedule, index: int) -> Transition:
        return self.func(x, prediction, schedule, index, self.noise_level)


TRANSITIONS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("ode", ode, is_flow=True, max_noise_level=0.0, on_vp="ddim"),
        Kernel("flow_sde", flow_sde, is_flow=True, default_noise_level=0.7),
        Kernel("dance_sde", dance_sde, is_flow=True, default_noise_level=0.7),
        Kernel("cps", cps, is_flow=True, max_noise_level=1.0, default_noise_level=0.7, is_exact_at_the_end=True),
        Kernel("ddim", ddim, is_flow=False, max_noise_level=1.0),
    )
}
