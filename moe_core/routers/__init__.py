"""Routers: one file, one idea. Each maps tokens (B, N, D) to a ``Routing``."""

from .balanced_assignment import BalancedAssignmentRouter
from .base import Router
from .expert_choice import ExpertChoiceRouter
from .expert_threshold import ExpertThresholdRouter
from .gshard import GShardRouter
from .hash import HashRouter
from .loss_free import LossFreeRouter
from .noisy_topk import NoisyTopKRouter
from .quantile_balancing import QuantileBalancingRouter
from .relu import ReLURouter
from .sinkhorn import SinkhornRouter
from .switch import SwitchRouter
from .topk import TopKRouter
from .zero_computation import ZeroComputationRouter

# The names that MoEConfig.router may have.
ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "noisy_topk": NoisyTopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "loss_free": LossFreeRouter,
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
    "expert_threshold": ExpertThresholdRouter,
    "sinkhorn": SinkhornRouter,
    "base": BalancedAssignmentRouter,
    "quantile_balancing": QuantileBalancingRouter,
    "relu": ReLURouter,
    "zero_computation": ZeroComputationRouter,
}

__all__ = ["ROUTERS", "Router", *sorted(cls.__name__ for cls in ROUTERS.values())]
