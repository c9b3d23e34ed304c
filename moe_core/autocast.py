"""Autocast, handled by hand: what a router computes, and every sum, stays in float32 at least."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Off for x's device; nothing to do on a device that has none (meta)."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast asks of matrix products on x's device; None when it is off, or x is float64."""
    kind = x.device.type
    available = x.dtype != torch.float64 and torch.amp.is_autocast_available(kind)
    on = available and torch.is_autocast_enabled(kind)  # raises for a device that has no autocast
    return torch.get_autocast_dtype(kind) if on else None
