"""``python -m moe_tools.pretrain --steps 20 --out runs/first``, alone or under torchrun."""

from .pretrain_config import PretrainConfig
from .trainer import Trainer
from .training_run import pretrain

__all__ = ["PretrainConfig", "Trainer", "pretrain"]
