"""Train the language model, in one process or in many: ``python -m moe_tools.pretrain --steps 20 --out runs/first``."""

from .config import PretrainConfig
from .run import pretrain
from .trainer import Trainer

__all__ = ["PretrainConfig", "Trainer", "pretrain"]
