"""One diffusion student learns from many specialists by on-policy distillation, as a TRL trainer."""

from .config import DiffusionOPDConfig
from .teachers import Teacher
from .trainer import DiffusionOPDTrainer

__all__ = ["DiffusionOPDConfig", "DiffusionOPDTrainer", "Teacher"]
__version__ = "0.1.0.dev0"
