"""What a user can set about reinforcement learning; every meaningless combination is refused here, before any model is
loaded."""

from dataclasses import dataclass, field
from typing import Any

from ..config import DiffusionConfig, check_noise, kernel_named, parse_json

SCALES = ("group", "batch", "none")
LOSS_TYPES = ("grpo", "grpo_guard")


@dataclass
class DiffusionRLConfig(DiffusionConfig):
    r"""
    What the trainers that learn from rewards share. The fields of [`DiffusionConfig`] and of
    [`~transformers.TrainingArguments`] apply too; names that TRL's `GRPOConfig` has mean the same.

    As in TRL, `per_device_train_batch_size` counts samples, not prompts. A rollout has
    `per_device_train_batch_size * num_processes * steps_per_generation` samples, whole groups of `num_generations` for
    each task; all of them are drawn and judged before the first is learnt from.

    Args:
        num_generations (`int`, *optional*, defaults to `8`):
            Samples of one prompt, at least 2. The samples of a task in one rollout are a multiple of it.
        num_iterations (`int`, *optional*, defaults to `1`):
            How often a rollout is learnt from.
        steps_per_generation (`int`, *optional*):
            Micro-batches of one rollout, a multiple of `gradient_accumulation_steps`: each window of so many is an
            optimizer step of its own. Advantages are those of the whole rollout. `None`: `gradient_accumulation_steps`,
            so that a rollout is one optimizer step's.
        reward_weights (`list[float]`, or `{task: float or list}`, *optional*):
            One a reward function, in the form of `reward_funcs`. `None`: 1 each.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"group"`):
            Advantages are divided by the std of the `"group"`, of the `"batch"` (all samples of the task in a rollout),
            or by nothing (`"none"`, `False`).
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Bound of the advantages' absolute values.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the distance to the base model. 0: the base is not asked.
        distill_beta (`float`, *optional*):
            Weight of the distance to the trainer's `teachers`, measured as `beta`'s is. `None`: 1.

    Defaults that differ from [`DiffusionConfig`]'s: `remove_unused_columns` (off: reward functions are given them),
    `metric_for_best_model` (`"reward"`).
    """

    num_generations: int = field(default=8, metadata={"help": "Samples of one prompt."})
    num_iterations: int = field(default=1, metadata={"help": "How often a rollout is learnt from."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches of one rollout. None: those of one optimizer step."}
    )
    reward_weights: list | str | dict | None = field(  # a flag is read as the second of these: JSON
        default=None, metadata={"help": "Weights of the reward functions, in their form. None: 1 each."}
    )
    scale_rewards: str = field(
        default="group", metadata={"help": "Whose std divides the advantages.", "choices": list(SCALES)}
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Bound of the advantages' absolute values."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the distance to the base model. 0: not asked."})

    distill_beta: float | None = field(
        default=None, metadata={"help": "Weight of the distance to the teachers. None: 1."}
    )

    remove_unused_columns: bool | None = field(  # type: ignore[assignment]  # None as in TRL's `GRPOConfig`
        default=False, metadata={"help": "Hide the dataset's other columns from the reward functions."}
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # transformers: "loss", which an evaluation by rewards has not
        self.reward_weights = parse_json("reward_weights", self.reward_weights)
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()
        if self.scale_rewards not in SCALES:
            raise ValueError(f"`scale_rewards` must be one of {list(SCALES)}, got {self.scale_rewards!r}.")
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be at least 2, got {self.num_generations}: a sample is judged against the "
                "others of its prompt."
            )
        for name in ("num_iterations", "steps_per_generation"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not self.advantage_clip > 0:
            raise ValueError(f"`advantage_clip` must be above 0, got {self.advantage_clip}.")
        if not self.beta >= 0:
            raise ValueError(f"`beta` must be at least 0, got {self.beta}.")
        if self.distill_beta is not None and not self.distill_beta > 0:
            raise ValueError(f"`distill_beta` must be above 0, got {self.distill_beta}; leave the teachers out.")


@dataclass
class DiffusionNFTConfig(DiffusionRLConfig):
    r"""
    Configuration of [`DiffusionNFTTrainer`] (DiffusionNFT, arXiv 2509.16117). The fields of [`DiffusionRLConfig`],
    [`DiffusionConfig`] and [`~transformers.TrainingArguments`] apply too.

    Samples are drawn by the `old` policy with the deterministic sampler, then noised again to each of the first `K`
    noise levels of the schedule (`timestep_fraction`).

    Args:
        nft_beta (`float`, *optional*, defaults to `1.0`):
            How far the implicit policies reach beyond the old one (the paper's beta), above 0.
        old_decay_start, old_decay_rate, old_decay_max (*optional*, default to `0`, `0.001`, `0.5`):
            After the optimizer steps of rollout `i` the old policy becomes `d old + (1 - d) trained`, with
            `d = min(old_decay_rate * max(i - old_decay_start, 0), old_decay_max)`.

    Defaults that differ from [`DiffusionRLConfig`]'s: `guidance_scale` (1.0: the method does without), `beta` (1e-4,
    the weight of `|v - v_base|^2`).
    """

    nft_beta: float = field(default=1.0, metadata={"help": "How far the implicit policies reach beyond the old one."})
    old_decay_start: int = field(default=0, metadata={"help": "Rollouts before the old policy's decay rises from 0."})
    old_decay_rate: float = field(default=0.001, metadata={"help": "By how much the decay rises a rollout."})
    old_decay_max: float = field(default=0.5, metadata={"help": "Where the decay stops."})

    guidance_scale: float | None = field(default=1.0, metadata={"help": "Guidance scale of the pipeline call."})
    beta: float = field(default=1e-4, metadata={"help": "Weight of the distance to the base model. 0: not asked."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.nft_beta > 0:
            raise ValueError(f"`nft_beta` must be above 0, got {self.nft_beta}.")
        if self.old_decay_start < 0 or self.old_decay_rate < 0 or not 0 <= self.old_decay_max < 1:
            raise ValueError(
                "`old_decay_start` and `old_decay_rate` must be at least 0 and `old_decay_max` in [0, 1); got "
                f"{self.old_decay_start}, {self.old_decay_rate} and {self.old_decay_max}."
            )


@dataclass
class DiffusionGRPOConfig(DiffusionRLConfig):
    r"""
    Configuration of [`DiffusionGRPOTrainer`] (Flow-GRPO, arXiv 2505.05470; GRPO-Guard, arXiv 2510.22319). The fields of
    [`DiffusionRLConfig`], [`DiffusionConfig`] and [`~transformers.TrainingArguments`] apply too.

    The learnt steps of a rollout are stochastic, the others deterministic.

    Args:
        transition (`str`, *optional*):
            `"flow_sde"`, `"dance_sde"` or `"cps"` for flow matching, `"ddim"` for VP models. `None`: `"flow_sde"`, or
            `"ddim"`.
        noise_level (`float`, *optional*, defaults to `0.7`):
            The `a` of the SDEs and of CPS, DDIM's eta; above 0.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            `"grpo"`: Flow-GRPO. `"grpo_guard"`: log-ratios whose mean is zero at every step, and each step's loss over
            `|dt|` (on VP models over how much the step's mean moves with the prediction), so that under `"flow_sde"`
            and `"ddim"` all steps weigh alike. Its log-ratios are smaller by about the step's std.
        epsilon (`float`, *optional*):
            Clip range of the ratio, which is that of log-densities averaged over the latent's elements. `None`: 1e-4,
            or 2e-6 for `"grpo_guard"`. At the first optimizer step on a rollout all ratios are 1, so it matters where
            there are several (`num_iterations`, `steps_per_generation`).
        epsilon_high (`float`, *optional*):
            Its upper bound. `None`: `epsilon`.
        sde_window_size (`int`, *optional*):
            Only so many steps in succession are stochastic and learnt, at a place drawn anew for each rollout. `None`:
            all of the first `K` (`timestep_fraction`).
        sde_window_range (`list[int]`, *optional*):
            First step that a window may begin with and step that it ends before. `None`: the first `K`.

    `beta` weighs the exact KL of each step to the base, `|mu - mu_base|^2 / (2 std^2)`.
    """

    transition: str | None = field(default=None, metadata={"help": "How the policy moves. None: flow_sde, or ddim."})
    noise_level: float = field(default=0.7, metadata={"help": "Noise of the transition."})
    loss_type: str = field(default="grpo", metadata={"help": "Flow-GRPO or GRPO-Guard.", "choices": list(LOSS_TYPES)})
    epsilon: float | None = field(
        default=None, metadata={"help": "Clip range of the ratio. None: 1e-4, or 2e-6 for 'grpo_guard'."}
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Its upper bound. None: `epsilon`."})
    sde_window_size: int | None = field(
        default=None, metadata={"help": "How many steps are stochastic and learnt. None: all of the first K."}
    )
    sde_window_range: list[int] | None = field(
        default=None, metadata={"help": "Where a window may begin, and what it ends before. None: the first K."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        transition = "flow_sde" if self.transition is None else self.transition
        if kernel_named(transition).max_noise_level == 0 or self.noise_level == 0:
            raise ValueError(
                "the likelihood of a sample needs a stochastic transition; got "
                f"`transition={self.transition!r}` with `noise_level={self.noise_level}`. `DiffusionNFTTrainer` does "
                "without."
            )
        check_noise(transition, self.noise_level)
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"`loss_type` must be one of {list(LOSS_TYPES)}, got {self.loss_type!r}.")
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if self.sde_window_range is not None and self.sde_window_size is None:
            raise ValueError("`sde_window_range` needs `sde_window_size`.")
        if self.sde_window_range is not None and len(self.sde_window_range) != 2:
            raise ValueError(f"`sde_window_range` must hold two numbers, got {self.sde_window_range}.")
        low, high, size = self._window
        if not 0 <= low < high <= self.num_learnt_steps or not 1 <= size <= high - low:
            raise ValueError(
                f"a window of {size} steps (`sde_window_size`) does not fit between the steps {low} and {high}; "
                f"{self.num_learnt_steps} of {self.num_inference_steps} steps are learnt (`timestep_fraction`)."
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may fall below 1 and rise above it."""
        low = self.epsilon or (2e-6 if self.loss_type == "grpo_guard" else 1e-4)
        return low, self.epsilon_high or low

    @property
    def _window(self) -> tuple[int, int, int]:
        """First step that it may begin with, step that it ends before, steps."""
        low, high = self.sde_window_range or (0, self.num_learnt_steps)
        return low, high, high - low if self.sde_window_size is None else self.sde_window_size

    def sde_window(self, draw: Any) -> range:
        """The steps of a rollout that are stochastic and learnt; `draw(n)` gives a number in [0, n)."""
        low, high, size = self._window
        start = low + draw(high - low - size + 1)
        return range(start, start + size)


@dataclass
class DiffusionROPDConfig(DiffusionRLConfig):
    r"""
    Configuration of [`DiffusionROPDTrainer`] (ROPD, MaineCoon's distillation). The fields of [`DiffusionRLConfig`],
    [`DiffusionConfig`] and [`~transformers.TrainingArguments`] apply too, but for those of advantages and
    `distill_beta`, which have no part in it.

    Args:
        ropd_alpha (`float`, *optional*, defaults to `1.0`):
            How much of the expert is in the target of a sample where all samples of its prompt fail, in (0, 1].
    """

    ropd_alpha: float = field(
        default=1.0, metadata={"help": "How much of the expert is in the target where all samples of a prompt fail."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ropd_alpha <= 1:
            raise ValueError(f"`ropd_alpha` must be in (0, 1], got {self.ropd_alpha}.")
        if self.distill_beta is not None:
            raise ValueError(
                f"`distill_beta={self.distill_beta}` has no part in ROPD, whose loss is the distance to a mixture of "
                "expert and student; `ropd_alpha` says how much of the expert."
            )
