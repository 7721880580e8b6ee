"""Stage 1: one specialist (or several tasks at once) from rewards, with the same models, data and face as stage 2."""

from .config import DiffusionGRPOConfig, DiffusionNFTConfig, DiffusionROPDConfig
from .grpo_trainer import DiffusionGRPOTrainer
from .nft_trainer import DiffusionNFTTrainer
from .ropd_trainer import DiffusionROPDTrainer

__all__ = [
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "DiffusionROPDConfig",
    "DiffusionROPDTrainer",
]
