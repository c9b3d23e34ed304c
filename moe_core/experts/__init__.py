"""Experts: a bank of E MLPs with interchangeable backends, what every token visits besides, and what experts without a matmul compute."""

from .activations import ACTIVATIONS, Activation
from .bank import BACKENDS, Experts, FeedForward
from .shared import SharedExperts
from .zero_computation import ZeroComputationExperts

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Activation",
    "Experts",
    "FeedForward",
    "SharedExperts",
    "ZeroComputationExperts",
]
