"""Scores of the field as reward functions: `(prompts, images, **columns) -> list[float | None]`."""

from .functions import RewardFunc, Rewards
from .registry import REWARDS, load_reward
from .scorer import Scorer

__all__ = ["REWARDS", "RewardFunc", "Rewards", "Scorer", "load_reward"]
