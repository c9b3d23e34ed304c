"""ExpertChoiceRouter: each expert takes the tokens it likes best. Perfectly balanced, and not causal."""

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from ..routing import Routing
from ..validate import expansion_fits, one_of
from .base import Router, require_padding_mask

SCORES = ("softmax", "sigmoid")
SCOPES = ("batch", "sequence")


class ExpertChoiceRouter(Router):
    r"""Expert choice: the experts choose, each of them exactly c tokens.

    .. math:: S = \mathrm{softmax}(h), \quad I_e = \mathrm{topc}_t\,(S_{t,e}), \quad c = \Big\lceil \frac{T G}{E} \Big\rceil,
              \quad w_{t,e} = S_{t,e} \text{ for } t \in I_e

    A token may be taken by any number of experts, G on average, also by none. The load is 1/E each by construction, with no
    auxiliary loss.

    **Not causal.** Whether a token is taken depends on all tokens it competes with: the later ones of its own sequence, and with
    scope="batch" those of other sequences; in eval too. A language model that trains so reads the future, and cannot be
    sampled from. ``ExpertThresholdRouter`` is the causal relative.

    Args:
        d_model, n_experts: D and E.
        expansion: G, the mean number of experts per token, a fraction if you like; the paper's capacity factor. 0 < G <= E.
        score_func: "softmax" over the experts of a token, as published, or "sigmoid" of each logit.
        scope: "batch": an expert chooses among all B*N tokens. "sequence": c of N tokens in every sequence, so that a
            token's route does not depend on other sequences.
        z_loss_weight, jitter_noise: see ``Router``. There is no balance loss: nothing is left to balance.

    c counts real tokens only and padding is never chosen. Ties go to the earlier token. ``Routing.capacity`` is the largest an
    expert could keep by shapes alone.

    Raises:
        ValueError: an argument is out of range.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expansion: float = 1.0,
        *,
        score_func: str = "softmax",
        scope: str = "batch",
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        expansion_fits(expansion, n_experts)
        one_of(SCORES, score_func=score_func)
        one_of(SCOPES, scope=scope)
        super().__init__(d_model, n_experts, z_loss_weight=z_loss_weight, jitter_noise=jitter_noise)
        self.expansion, self.score_func, self.scope = expansion, score_func, scope
        self.share = as_fraction(expansion) / n_experts  # of the tokens, for each expert

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K = E slots per token, ``selected_mask`` says who was chosen.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        scores_BNE = (
            logits_BNE.softmax(-1) if self.score_func == "softmax" else logits_BNE.sigmoid()
        )
        B, N, E = logits_BNE.shape
        pools, size = (1, B * N) if self.scope == "batch" else (B, N)
        real_PS = count_real(x, padding_mask).view(pools, size)
        chosen_BNE = take_best(
            scores_BNE.view(pools, size, E),
            real_PS,
            ceil_share(real_PS.sum(-1, keepdim=True), self.share).expand(-1, E),
        ).view(B, N, E)
        routing = self.route(
            self.every_expert(x),
            scores_BNE,
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
            selected_BNK=chosen_BNE,
            apply_capacity=False,
        )
        return replace(routing, capacity=ceil_share(size, self.share), capacity_scope=self.scope)


def as_fraction(value: float) -> Fraction:
    """The decimal as written, to six digits: 0.1 is a tenth, so that shares of token counts are exact."""
    return Fraction(str(value)).limit_denominator(10**6)


def ceil_share(count, share: Fraction):
    """ceil(count * share), exactly, for an int or an int64 tensor."""
    return (count * share.numerator + share.denominator - 1) // share.denominator


def count_real(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """(B, N) bool, True for real tokens; raises ValueError for a mask of another shape or type."""
    if padding_mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    require_padding_mask(padding_mask, x.shape[:2])
    return padding_mask


def take_best(ranked_by_PSE: Tensor, real_PS: Tensor, count_PE: Tensor) -> Tensor:
    """Each expert's best tokens in each pool: (P, S, E) bool, ``count_PE`` of them, or all real tokens if there are fewer.

    A stable sort: ties go to the earlier token, and to the same one when a checkpointed forward runs again. No tensor is read.
    """
    with torch.no_grad():
        count_PE = torch.minimum(count_PE, real_PS.sum(-1, keepdim=True))
        order_PSE = ranked_by_PSE.masked_fill(~real_PS.unsqueeze(-1), -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        place_S11 = torch.arange(ranked_by_PSE.shape[1], device=ranked_by_PSE.device).view(1, -1, 1)
        taken_PSE = place_S11 < count_PE.unsqueeze(1)
        return torch.zeros_like(taken_PSE).scatter(1, order_PSE, taken_PSE)
