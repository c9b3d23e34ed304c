"""Sums and means over the ranks of a data-parallel run; with one process, the number itself."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .routing import Routing


def n_ranks() -> int:
    """R, the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks, the same on each, in a new tensor without gradient.

    Every rank must call it with the same shape and dtype.
    """
    total = x.detach().clone()
    if n_ranks() > 1:
        dist.all_reduce(total)  # exact for int64 counts, in any order of the ranks
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over all ranks; raises ValueError for integers, whose mean is no integer."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}, must be floating point: use sum_over_ranks")
    return sum_over_ranks(x) / n_ranks()


def load_over_ranks(routings: Sequence[Routing], like_E: Tensor) -> Tensor:
    """(E,) int64: the load over these micro-batches and all ranks."""
    # like_E gives E and the device to a rank that has no micro-batch: it must still call the sum.
    counts_E = torch.zeros_like(like_E, dtype=torch.int64)
    for routing in routings:
        counts_E += routing.slots_per_expert()
    return sum_over_ranks(counts_E)
