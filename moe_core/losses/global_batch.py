"""Balance over the global batch: all micro-batches of all ranks, as if they were one.

A micro-batch of one or two sequences is never balanced by a router that knows its subjects; asking
for it forbids specialisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ranks import n_ranks, sum_over_ranks
from ..routing import Routing
from .balance import mean_score


def global_share(routings: Sequence[Routing]) -> Tensor:
    """f_e (E,) over one layer's micro-batches and all ranks, to be given to ``load_balance``.

        # routings[micro_batch][layer]
        shares = [losses.global_share(layer) for layer in zip(*routings)]
        loss_m = sum(losses.load_balance(r, share=f) for r, f in zip(routings[m], shares))

    The loss is linear in P: the mean of loss_m over micro-batches and ranks is that of the one big
    batch if all have as many real tokens. Every rank must call this. ValueError without a routing.
    Source: Qiu et al. 2025 (Qwen, arXiv 2501.11873).
    """
    if not routings:
        raise ValueError("routings must hold at least one Routing")
    # Integers until the end: the shares are then those of the one big batch, bit for bit.
    counts_E = sum_over_ranks(torch.stack([r.slots_per_expert() for r in routings]).sum(0))
    return (counts_E.double() / counts_E.sum().clamp(min=1)).to(routings[0].scores.dtype)


def global_balance(routings: Sequence[Routing], *, relative_scores: bool = False) -> Tensor:
    r"""``load_balance`` of the global batch, with any padding: a token weighs the same anywhere.

    .. math:: L = E \sum_e f_e \frac{\sum_{r,m,t} s_{r,m,t,e}}{T},
        \quad f, T \text{ over all ranks } r \text{ and micro-batches } m

    Takes one layer's routings of this rank, with their graphs; every rank must call this. Raises
    ValueError where there are none. Source: as ``global_share``.
    """
    share_E = global_share(routings)
    n_tokens = torch.stack([r.real_tokens.sum() for r in routings])
    mean_ME = torch.stack([mean_score(r, "batch", relative_scores) for r in routings])
    score_E = (mean_ME * n_tokens.unsqueeze(-1)).sum(0)
    score_E = score_E / sum_over_ranks(n_tokens.sum()).clamp(min=1)
    # This rank's part times R: data parallelism averages gradients, and their mean is then right.
    return n_ranks() * routings[0].n_experts * (share_E * score_E).sum()
