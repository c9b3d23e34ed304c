"""Capacity: how many slots an expert may keep, and who is turned away."""

import math
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from ._validate import at_least, one_of, whole
from .routing import DropReason, Routing

DROP_POLICIES = ("position",)


def expert_capacity(n_tokens: int, top_k: int, n_experts: int, capacity_factor: float) -> int:
    r"""The number of places in front of each expert.

    .. math:: C = \Big\lceil \frac{T K}{E}\, c_f \Big\rceil

    Args:
        n_tokens: T = B*N, padding included: shapes alone decide C, no tensor is read.
        capacity_factor: c_f; at 1 there are as many places as slots. The decimal you write is taken exactly, so that
            10 slots at 1.1 are 11 places and not 12 (1.1 as a float is a little more than 1.1).

    Raises:
        ValueError: a count is not a whole number, or capacity_factor is negative or not finite.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 3, with K as in Megatron-LM.
    """
    whole(0, n_tokens=n_tokens)
    whole(1, top_k=top_k, n_experts=n_experts)
    at_least(0, capacity_factor=capacity_factor)
    return math.ceil(Fraction(n_tokens * top_k, n_experts) * Fraction(str(capacity_factor)))


def apply(routing: Routing, *, capacity_factor: float, drop_policy: str = "position") -> Routing:
    """Drop the slots for which there is no room; they keep their index and weight, with the reason OVER_CAPACITY.

    Args:
        routing: as a router made it; slots that are not kept already do not queue.
        capacity_factor: see ``expert_capacity``.
        drop_policy: who is turned away. "position": first come, first served, token after token in the order of the
            batch and, within a token, slot after slot. A slot's fate depends only on slots before it.

    Raises:
        ValueError: drop_policy is unknown or capacity_factor negative.
    """
    one_of(DROP_POLICIES, drop_policy=drop_policy)
    B, N, K = routing.expert_indices.shape
    capacity = expert_capacity(B * N, K, routing.n_experts, capacity_factor)
    place_BNK = queue_places(routing)
    over_BNK = routing.capacity_mask & (place_BNK >= capacity)
    return replace(
        routing,
        capacity=capacity,
        dropless=False,
        capacity_mask=routing.capacity_mask & ~over_BNK,
        drop_reason=routing.drop_reason.masked_fill(over_BNK, DropReason.OVER_CAPACITY),
    )


def queue_places(routing: Routing) -> Tensor:
    """(B, N, K) int64: how many kept slots stand before this one in its expert's queue, first come first served.

    A stable sort by expert lines the queues up one after the other; the place is the distance to the queue's start.
    It needs (T*K,) memory, where the one-hot running count of the textbooks needs (T*K, E).
    """
    E, mask = routing.n_experts, routing.capacity_mask.flatten()
    queue = torch.where(mask, routing.expert_indices.flatten(), E)  # slots already out wait in a queue of their own
    order = torch.argsort(queue, stable=True)
    length = torch.zeros(E + 1, dtype=torch.int64, device=queue.device).scatter_add_(0, queue, torch.ones_like(queue))
    start = length.cumsum(0) - length
    place = torch.empty_like(queue)
    place[order] = torch.arange(len(queue), device=queue.device) - start[queue[order]]
    return place.view(routing.expert_indices.shape)
