"""Who is turned away when an expert is full: the order in which slots join the queues.

The first C of each queue stay, so every policy drops equally many; they differ in whom.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..routing import Routing


def position(routing: Routing) -> Tensor:
    """Token after token in the order of the batch and, within a token, slot after slot."""
    # A slot's fate depends only on slots before it.
    return torch.arange(routing.expert_indices.numel(), device=routing.expert_indices.device)


def slot_position(routing: Routing) -> Tensor:
    """All first choices in the order of the batch, then all second choices, and so on.

    Source: Lepikhin et al. 2020 (GShard, arXiv 2006.16668), algorithm 1.
    """
    # Not causal: a second choice may lose its place to the first choice of a later token.
    return position(routing).view(-1, routing.expert_indices.shape[-1]).T.flatten()


def score(routing: Routing) -> Tensor:
    """The highest combine weight first; ties in the order of the batch. Looks at later tokens.

    Source: "probs" in Megatron-LM and DeepSpeed; V-MoE (arXiv 2106.05974), section 4, ranks tokens.
    """
    # With one renormalised expert per token all weights are 1, and position decides.
    return torch.argsort(routing.expert_weights.detach().flatten(), descending=True, stable=True)


def random(routing: Routing) -> Tensor:
    """An order drawn from torch's default generator; for training."""
    return torch.randperm(routing.expert_indices.numel(), device=routing.expert_indices.device)


DROP_POLICIES: dict[str, Callable[[Routing], Tensor]] = {
    policy.__name__: policy for policy in (position, slot_position, score, random)
}


def queue_places(routing: Routing, drop_policy: str = "position", scope: str = "batch") -> Tensor:
    """(B, N, K) int64: how many kept slots stand before this one in its expert's queue.

    ``drop_policy`` is a name in ``DROP_POLICIES``; scope "batch": one queue per expert, "sequence":
    one per expert and sequence. Slots that are not kept do not queue.
    """
    B, E, mask = len(routing.expert_indices), routing.scores.shape[-1], routing.capacity_mask
    queue_BNK = torch.where(mask, routing.expert_indices, E)  # slots already out have their own
    if scope == "sequence":
        queue_BNK = queue_BNK + (E + 1) * torch.arange(B, device=mask.device).view(B, 1, 1)
    queue, joins = queue_BNK.flatten(), DROP_POLICIES[drop_policy](routing)
    # A stable sort lines the queues up one after the other; the place is the distance to the
    # queue's start. That needs (T*K,) memory, the textbooks' one-hot running count (T*K, E).
    lined_up = joins[torch.argsort(queue[joins], stable=True)]
    length = queue.new_zeros((E + 1) * (B if scope == "sequence" else 1))
    length.scatter_add_(0, queue, torch.ones_like(queue))
    start = length.cumsum(0) - length
    place = torch.empty_like(queue)
    place[lined_up] = torch.arange(len(queue), device=mask.device) - start[queue[lined_up]]
    return place.view(routing.expert_indices.shape)
