"""Losses on how large logits and weights are."""

import torch
from torch import Tensor

from ..routing import Routing
from ..validate import expansion_fits
from .spread import weight_per_expert


def z_loss(routing: Routing) -> Tensor:
    r"""Router z-loss: keeps the logits small, where the softmax is accurate.

    .. math:: L_z = \frac{1}{T} \sum_t \Big(\log \sum_e e^{h_{t,e}}\Big)^2

    (ln E)^2 for zero logits. Padding does not count.
    Source: Zoph et al. 2022 (arXiv 2202.08906), eq. 5.
    """
    squared_BN = torch.logsumexp(routing.logits, dim=-1).square()
    real_BN = routing.real_tokens
    return squared_BN.masked_fill(~real_BN, 0).sum() / real_BN.sum().clamp(min=1)


def l1(routing: Routing, *, expansion: float | None = None) -> Tensor:
    r"""The mean over tokens of the sum of their weights: pushes weights towards zero.

    .. math:: L = \frac{1}{T} \sum_t \sum_e f_e |w_{t,e}|,
        \quad f_e = \frac{E}{k T} \sum_t 1[e \text{ selected}]

    ``expansion`` is k, the number of experts per token aimed at: a busy expert then pays more; None
    sets every f_e to 1. Slots count before capacity. Raises ValueError for k outside (0, E].
    Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711), the L1 regularisation with load balancing.
    """
    weight_E = weight_per_expert(routing).abs()
    n_tokens = routing.real_tokens.sum().clamp(min=1)
    if expansion is not None:
        expansion_fits(expansion, routing.n_experts)
        busy_E = routing.slots_per_expert() * (routing.n_experts / expansion) / n_tokens
        weight_E = weight_E * busy_E
    return weight_E.sum() / n_tokens
