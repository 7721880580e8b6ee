"""One diffusion student learns from many specialists by on-policy distillation, as a TRL trainer; and the specialists
from rewards."""

from .config import DiffusionOPDConfig
from .rl import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionROPDConfig,
    DiffusionROPDTrainer,
)
from .teachers import Lora, Teacher
from .trainer import DiffusionOPDTrainer

__all__ = [
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "DiffusionOPDConfig",
    "DiffusionOPDTrainer",
    "DiffusionROPDConfig",
    "DiffusionROPDTrainer",
    "Lora",
    "Teacher",
]
__version__ = "0.1.0.dev0"
