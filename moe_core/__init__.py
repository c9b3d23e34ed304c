"""moe_core: Mixture-of-Experts in plain PyTorch, one idea a file.

    x (B, N, D) --Router--> Routing --DispatchPlan--> rows (A, D) + counts (E,) --Experts--> rows --combine--> y (B, N, D)

Dimension letters, everywhere: B batch, N tokens per sequence, T = B*N, D d_model, F d_ff, E experts, K slots per token,
C capacity, A kept assignments. A local tensor carries its dims as a suffix: ``scores_BNE``, ``rows_AD``.
"""

from . import capacity, losses, metrics
from .capacity import CapacityRule
from .config import MoEConfig
from .dispatch import DispatchPlan
from .experts import Experts, FeedForward, ZeroComputationExperts
from .experts.soft import SoftMoE
from .layer import MixtureOfExperts
from .lm import LanguageModel, LMConfig
from .routers import (
    BalancedAssignmentRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    GShardRouter,
    HashRouter,
    LossFreeRouter,
    NoisyTopKRouter,
    QuantileBalancingRouter,
    ReLURouter,
    Router,
    SinkhornRouter,
    SwitchRouter,
    TopKRouter,
    ZeroComputationRouter,
)
from .routing import DropReason, Routing

__version__ = "0.1.0"
__all__ = [
    "BalancedAssignmentRouter",
    "CapacityRule",
    "DispatchPlan",
    "DropReason",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "Experts",
    "FeedForward",
    "GShardRouter",
    "HashRouter",
    "LMConfig",
    "LanguageModel",
    "LossFreeRouter",
    "MixtureOfExperts",
    "MoEConfig",
    "NoisyTopKRouter",
    "QuantileBalancingRouter",
    "ReLURouter",
    "Router",
    "Routing",
    "SinkhornRouter",
    "SoftMoE",
    "SwitchRouter",
    "TopKRouter",
    "ZeroComputationExperts",
    "ZeroComputationRouter",
    "capacity",
    "losses",
    "metrics",
]


def __getattr__(name: str):
    """``moe_core.published`` and ``moe_core.interop`` are tools: loaded when somebody asks."""
    if name in ("published", "interop"):
        from importlib import import_module

        return import_module(f"moe_core.{name}")
    raise AttributeError(f"module 'moe_core' has no attribute {name!r}")
