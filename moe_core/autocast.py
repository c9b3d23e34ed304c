"""Autocast, handled by hand: what a router computes and what is summed up stays in float32 at least."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Off for x's device; nothing to do on a device that has none (meta)."""
    kind = x.device.type
    return (
        torch.autocast(kind, enabled=False)
        if torch.amp.is_autocast_available(kind)
        else nullcontext()
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of matrix products on x's device, None when it is off, or where x is float64."""
    kind = x.device.type
    if (
        x.dtype == torch.float64
        or not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
    ):
        return None
    return torch.get_autocast_dtype(kind)
