"""Sums and means over the ranks of a data-parallel run; with one process they are the number itself."""

import torch.distributed as dist
from torch import Tensor


def n_ranks() -> int:
    """R, the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of this tensor over all ranks, the same on each, in a tensor of its own and without gradient.

    Every rank must call it, in the same order, with the same shape and dtype. int64 counts are summed as integers, so exactly.
    """
    total = x.detach().clone()
    if n_ranks() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of this floating-point tensor over all ranks; otherwise as ``sum_over_ranks``.

    Raises:
        ValueError: x holds integers, which have no mean of their own type.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"x has dtype {x.dtype}, must be floating point: sum_over_ranks is for counts"
        )
    return sum_over_ranks(x) / n_ranks()
