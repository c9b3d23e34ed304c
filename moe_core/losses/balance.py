"""Load-balancing losses: the share of slots an expert gets, times the mean score it gets."""

from dataclasses import replace

import torch
from torch import Tensor

from ..routing import Routing
from ..validate import top_k_fits


def load_balance(
    routing: Routing,
    *,
    scope: str = "batch",
    share: Tensor | None = None,
    relative_scores: bool = False,
) -> Tensor:
    r"""Switch Transformer load-balancing loss, generalised to K slots.

    .. math:: L = E \sum_e f_e P_e, \quad f_e = \text{share of slots sent to } e, \quad P_e = \text{mean score of } e

    f is a count and carries no gradient; only P does. Padding tokens are excluded from both. Slots count where the router
    asked for them, before capacity.

    Args:
        routing: what any router returned; scores (B, N, E), expert_indices (B, N, K). One layer's: pooled over layers, two that
            collapse in opposite ways would look balanced.
        scope: "batch" pools all tokens, "sequence" averages the loss of each sequence that has a real token.
        share: (E,) to be used as f instead of this routing's own, say that of the global batch: see ``global_share``.
        relative_scores: P_e is the mean of s_e / sum(s) instead of s_e, for scores that do not sum to 1 (sigmoid).

    Returns:
        Scalar, 1 at perfect balance (if a token's scores sum to 1), E / K when all tokens go to the same K experts with certainty
        (a token gives an expert at most one of its K slots), 0 when there is no real token.

    Raises:
        ValueError: scope is unknown, or share is not (E,) or given for each sequence.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4-6 for top-1; counting slots makes the value independent of K.
    """
    if share is None:
        share = routing.slot_share(scope)
    elif share.shape != (routing.n_experts,) or scope != "batch":
        raise ValueError(
            f"share has shape {tuple(share.shape)}, must be (E,) = ({routing.n_experts},), with scope='batch'"
        )
    loss = share.shape[-1] * (share.detach() * mean_score(routing, scope, relative_scores)).sum(-1)
    return loss if scope == "batch" else _mean_over_sequences(loss, routing)


def first_choice_balance(routing: Routing) -> Tensor:
    r"""GShard's auxiliary loss, scaled to 1 at perfect balance: as ``load_balance``, but only first choices are counted.

    .. math:: L = E \sum_e \frac{c_e}{T} P_e, \quad c_e = \text{tokens whose first slot goes to } e

    The paper writes :math:`\frac{1}{E} \sum_e \frac{c_e}{S} m_e`, which is this divided by E^2: see ``convert_loss``.

    Args:
        routing: slots ordered by preference, as TopKRouter's and GShardRouter's are.

    Returns:
        Scalar, 1 at perfect balance, E when all first choices fall on one expert with certainty.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), algorithm 1; fairscale, and DeepSpeed for top-2, count like this.
    """
    first = replace(
        routing,
        **{
            name: getattr(routing, name)[..., :1]
            for name in ("expert_indices", "expert_weights", "capacity_mask", "drop_reason")
        },
    )
    return load_balance(routing, share=first.slot_share())


def sequence_balance(routing: Routing, *, top_k: int | None = None) -> Tensor:
    r"""DeepSeek-V3's complementary loss: balance within each sequence, as the scores without any bias would have it.

    .. math:: L = \sum_e f_e P_e, \quad f_e = \frac{E}{K N} \sum_t 1[s_{t,e} \in \mathrm{topk}(s_t)], \quad
              P_e = \frac{1}{N} \sum_t \frac{s_{t,e}}{\sum_j s_{t,j}}

    f is not what was routed but what the unbiased scores would choose: the bias must not hide the imbalance. For a softmax router
    without bias it is ``load_balance(routing, scope="sequence")``.

    Args:
        routing: what any router returned; scores (B, N, E).
        top_k: K, the routing's own unless given (routers with K = E slots have no K).

    Returns:
        Scalar, the mean over sequences that have a real token; 1 at perfect balance.

    Raises:
        ValueError: top_k is not between 1 and E.

    Source: DeepSeek-AI 2024 (arXiv 2412.19437), eq. 17-20.
    """
    if top_k is None:
        top_k = routing.top_k
    top_k_fits(top_k, routing.n_experts)
    indices_BNK = routing.scores.detach().topk(top_k, dim=-1).indices
    chosen_BNE = torch.zeros_like(routing.scores).scatter(
        -1, indices_BNK, 1
    ) * routing.real_tokens.unsqueeze(-1)
    count_BE = chosen_BNE.sum(1)
    share_BE = count_BE / count_BE.sum(-1, keepdim=True).clamp(min=1)
    loss_B = routing.n_experts * (
        share_BE * mean_score(routing, "sequence", relative_scores=True)
    ).sum(-1)
    return _mean_over_sequences(loss_B, routing)


def mean_score(routing: Routing, scope: str, relative_scores: bool) -> Tensor:
    """P, from scores as they are or divided by their sum over experts; (E,) or (B, E). The 1e-20 is DeepSeek-V3's: 0 / 0 is 0."""
    if relative_scores:
        routing = replace(
            routing, scores=routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)
        )
    return routing.mean_score(scope)


def _mean_over_sequences(loss_B: Tensor, routing: Routing) -> Tensor:
    return loss_B.sum() / routing.real_tokens.any(-1).sum().clamp(min=1)
