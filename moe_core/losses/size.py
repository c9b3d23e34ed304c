"""Losses on how large logits and weights are."""

import torch
from torch import Tensor

from ..routing import Routing
from ..validate import expansion_fits
from .spread import weight_per_expert


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


def l1(routing: Routing, *, expansion: float | None = None) -> Tensor:
    r"""The mean over tokens of the sum of their weights: pushes weights, and with ReLU the number of experts, towards zero.

    .. math:: L = \frac{1}{T} \sum_t \sum_e f_e |w_{t,e}|, \quad f_e = \frac{E}{k T} \sum_t 1[e \text{ selected}]

    Args:
        routing: what any router returned. Slots count where the router asked for them, before capacity; padding does not.
        expansion: k, the number of experts per token aimed at: a busy expert then pays more. None sets every f_e to 1.

    Returns:
        Scalar, without the coefficient, which ReMoE adapts step by step.

    Raises:
        ValueError: expansion is not above 0 and at most E.

    Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711), the L1 regularisation with load balancing.
    """
    weight_E = weight_per_expert(routing).abs()
    n_tokens = routing.real_tokens.sum().clamp(min=1)
    if expansion is not None:
        expansion_fits(expansion, routing.n_experts)
        weight_E = (
            weight_E * routing.slots_per_expert() * (routing.n_experts / expansion) / n_tokens
        )
    return weight_E.sum() / n_tokens
