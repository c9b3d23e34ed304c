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

    .. math:: L = E \sum_e f_e P_e, \quad f_e = \text{share of slots sent to } e,
        \quad P_e = \text{mean score of } e

    Slots count where the router asked for them, before capacity; padding does not count. At perfect
    balance it is 1, and E / K when all tokens go to the same K experts with certainty.

    Args:
        routing: of one layer: pooled, two that collapse in opposite ways would look balanced.
        scope: "batch" pools all tokens, "sequence" averages over sequences with a real token.
        share: (E,) f in place of this routing's own, say ``global_share`` of the global batch.
        relative_scores: take s_e / sum(s) for scores that do not sum to 1 (sigmoid).

    Raises ValueError where scope is unknown, or share is not (E,) or given for each sequence.
    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4-6 for top-1; counting slots, not tokens,
    makes the value independent of K.
    """
    if share is None:
        share = routing.slot_share(scope)
    elif share.shape != (routing.n_experts,) or scope != "batch":
        found, wanted = tuple(share.shape), f"(E,) = ({routing.n_experts},)"
        raise ValueError(f"share has shape {found}, must be {wanted}, with scope='batch'")
    score = mean_score(routing, scope, relative_scores)
    # A count has no gradient: only the mean score is pushed.
    loss = share.shape[-1] * (share.detach() * score).sum(-1)
    return loss if scope == "batch" else _mean_over_sequences(loss, routing)


def first_choice_balance(routing: Routing) -> Tensor:
    r"""GShard's auxiliary loss, scaled to 1 at perfect balance: only first choices are counted.

    .. math:: L = E \sum_e \frac{c_e}{T} P_e, \quad c_e = \text{tokens whose first slot goes to } e

    The paper's :math:`\frac{1}{E} \sum_e \frac{c_e}{S} m_e` is this divided by E^2:
    ``convert_loss``. Slots must be ordered by preference, as TopKRouter's and GShardRouter's are.
    Source: Lepikhin et al. 2020 (arXiv 2006.16668), algorithm 1; fairscale.
    """
    of_slots = ("expert_indices", "expert_weights", "capacity_mask", "drop_reason")
    first = replace(routing, **{name: getattr(routing, name)[..., :1] for name in of_slots})
    return load_balance(routing, share=first.slot_share())


def sequence_balance(routing: Routing, *, top_k: int | None = None) -> Tensor:
    r"""DeepSeek-V3's complementary loss: balance within each sequence, 1 where it is perfect.

    .. math:: L = \sum_e f_e P_e,
        \quad f_e = \frac{E}{K N} \sum_t 1[s_{t,e} \in \mathrm{topk}(s_t)],
        \quad P_e = \frac{1}{N} \sum_t \frac{s_{t,e}}{\sum_j s_{t,j}}

    The mean over sequences with a real token. Raises ValueError where top_k is not between 1 and E;
    None takes the routing's own (routers with K = E slots have no K).
    Source: DeepSeek-AI 2024 (arXiv 2412.19437), eq. 17-20.
    """
    if top_k is None:
        top_k = routing.top_k
    top_k_fits(top_k, routing.n_experts)
    # Not what was routed but what scores alone would choose: a bias must not hide the imbalance.
    indices_BNK = routing.scores.detach().topk(top_k, dim=-1).indices
    chosen_BNE = torch.zeros_like(routing.scores).scatter(-1, indices_BNK, 1)
    count_BE = (chosen_BNE * routing.real_tokens.unsqueeze(-1)).sum(1)
    share_BE = count_BE / count_BE.sum(-1, keepdim=True).clamp(min=1)
    score_BE = mean_score(routing, "sequence", relative_scores=True)
    loss_B = routing.n_experts * (share_BE * score_BE).sum(-1)
    return _mean_over_sequences(loss_B, routing)


def mean_score(routing: Routing, scope: str, relative_scores: bool) -> Tensor:
    """P, from scores as they are or divided by their sum over experts; (E,) or (B, E)."""
    if relative_scores:
        total_BN1 = routing.scores.sum(-1, keepdim=True) + 1e-20  # DeepSeek-V3's: 0 / 0 is 0
        routing = replace(routing, scores=routing.scores / total_BN1)
    return routing.mean_score(scope)


def _mean_over_sequences(loss_B: Tensor, routing: Routing) -> Tensor:
    return loss_B.sum() / routing.real_tokens.any(-1).sum().clamp(min=1)
