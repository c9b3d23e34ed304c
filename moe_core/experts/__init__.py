"""Experts: a bank of E MLPs, what every token visits besides, and experts without a matmul."""

from .activations import ACTIVATIONS, Activation
from .bank import BACKENDS, Experts, FeedForward, MLPOptions
from .shared import SharedExperts
from .soft import SoftMoE
from .zero_computation import ZeroComputationExperts
