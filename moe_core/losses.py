"""Auxiliary losses of a router.

Each is a pure function of a Routing and returns a float32 scalar without any coefficient: the router multiplies.
"""

import torch
from torch import Tensor

from .routing import Routing


def load_balance(routing: Routing, *, scope: str = "batch") -> Tensor:
    r"""Switch Transformer load-balancing loss, generalised to K slots.

    .. math:: L = E \sum_e f_e P_e, \quad f_e = \text{share of slots sent to } e, \quad P_e = \text{mean score of } e

    f is a count and carries no gradient; only P does. Padding tokens are excluded from both. Slots count where the router
    asked for them, before capacity.

    Args:
        routing: what any router returned; scores (B, N, E), expert_indices (B, N, K).
        scope: "batch" pools all tokens, "sequence" averages the loss of each sequence that has a real token.

    Returns:
        Scalar, 1 at perfect balance, E when K = 1 and every token goes to one expert with certainty, 0 when there is no real token.

    Raises:
        ValueError: scope is unknown.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4-6 for top-1; counting slots makes the value independent of K.
    """
    share = routing.slot_share(scope)
    score = routing.mean_score(scope)
    loss = routing.n_experts * (share * score).sum(-1)
    if scope == "batch":
        return loss
    return loss.sum() / routing.real_tokens.any(-1).sum().clamp(min=1)


def z_loss(routing: Routing) -> Tensor:
    r"""Router z-loss: keeps the logits small, so that the softmax stays in the range where it is accurate.

    .. math:: L_z = \frac{1}{T} \sum_t \Big(\log \sum_e e^{h_{t,e}}\Big)^2

    Args:
        routing: what any router returned; logits (B, N, E). Padding tokens are excluded.

    Returns:
        Scalar, (ln E)^2 for zero logits, 0 when there is no real token.

    Source: Zoph et al. 2022 (arXiv 2202.08906), eq. 5.
    """
    squared_BN = torch.logsumexp(routing.logits, dim=-1).square()
    real_BN = routing.real_tokens
    return squared_BN.masked_fill(~real_BN, 0).sum() / real_BN.sum().clamp(min=1)
