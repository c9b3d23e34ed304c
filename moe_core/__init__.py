"""moe_core: Mixture-of-Experts in plain PyTorch, one idea a file.

    x (B, N, D) --Router--> Routing --DispatchPlan--> rows (A, D) + counts (E,)
                --Experts--> rows (A, D) --combine--> y (B, N, D)

Dimension letters, everywhere: B batch, N tokens per sequence, T = B*N, D d_model, F d_ff, E
experts, K slots per token, C capacity, A kept slots, R ranks. A local tensor carries its dims as a
suffix: ``scores_BNE``, ``rows_AD``.

Read in this order: routing · capacity, losses, dispatch, parallel, metrics · routers, experts ·
config · layer · lm. What is made of it is the package ``moe_tools``.
"""

from . import capacity, losses, metrics, routers
from .capacity import CapacityRule
from .config import MoEConfig
from .dispatch import DispatchPlan
from .experts import Experts, FeedForward, SoftMoE, ZeroComputationExperts
from .layer import MixtureOfExperts
from .lm import LanguageModel, LMConfig
from .routers import *  # noqa: F403  (the classes of every file there)
from .routing import DropReason, Routing

__version__ = "0.1.0"
__all__ = [
    *("CapacityRule", "DispatchPlan", "DropReason", "Experts", "FeedForward", "LMConfig"),
    *("LanguageModel", "MixtureOfExperts", "MoEConfig", "Routing", "SoftMoE"),
    *("ZeroComputationExperts", "capacity", "losses", "metrics"),
    *(name for name in routers.__all__ if name != "ROUTERS"),
]


def __getattr__(name: str):
    """``moe_core.published`` and ``moe_core.interop`` are tools, loaded when somebody asks."""
    if name in ("published", "interop"):
        from importlib import import_module

        return import_module(f"moe_core.{name}")
    raise AttributeError(f"module 'moe_core' has no attribute {name!r}")
