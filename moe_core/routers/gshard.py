"""GShardRouter: two experts per token, the second by lot (Lepikhin et al. 2020)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import losses
from ..capacity import CapacityRule
from ..routing import Routing
from ..validate import boolean
from .topk import SCORING, TopKOptions, TopKRouter


@dataclass(frozen=True)
class GShardOptions(TopKOptions, fixed=("top_k", "jitter_noise", *SCORING)):
    """The arguments of ``GShardRouter``."""

    top_k: int = 2
    random_second_expert: bool = True
    capacity_factor: float | CapacityRule | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        boolean(random_second_expert=self.random_second_expert)


class GShardRouter(TopKRouter):
    r"""Top-2, renormalised; in training the second expert is asked only as often as it matters.

    .. math:: g_1 = \frac{p_{e_1}}{p_{e_1} + p_{e_2}}, \quad g_2 = 1 - g_1,
              \quad \Pr[e_2 \text{ is asked}] = 2 g_2

    A second slot that is not asked has the reason NOT_SELECTED and takes no place; the first keeps
    g_1. In eval, or with random_second_expert=False, both experts are always asked. A number as
    capacity_factor (1, so 2T / E places) means ``CapacityRule(factor=...,
    drop_policy="slot_position")``.
    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 2.2 and algorithm 1 (where a second
    slot that is not asked still raises the counter); lingvo's Top2GatingOnLogits.
    """

    Options = GShardOptions

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if isinstance(self.capacity_factor, int | float):
            # All first choices queue before all second ones.
            self.capacity_rule = replace(self.capacity_rule, drop_policy="slot_position")

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D); slot 0 is the first choice, slot 1 the second."""
        logits_BNE = self.logits(x)
        scores_BNE = torch.softmax(logits_BNE, dim=-1)
        indices_BN2 = self.select(scores_BNE)
        weights_BN2 = self.weigh(logits_BNE, scores_BNE, indices_BN2)
        asked_BN2 = None
        if self.training and self.random_second_expert:
            first_BN, second_BN = weights_BN2.detach().unbind(-1)
            by_lot_BN = torch.rand_like(second_BN) < 2 * second_BN  # g_2 is at most 1/2
            asked_BN2 = torch.stack([torch.ones_like(first_BN, dtype=torch.bool), by_lot_BN], -1)
        choice = indices_BN2, weights_BN2, logits_BNE, scores_BNE, padding_mask
        routing = self.routing(*choice, selected_BNK=asked_BN2, normalized=True)
        routing = self.limit_capacity(routing)
        return self.add_losses(routing)

    def balance_loss(self, routing: Routing) -> Tensor:
        """The balance of first choices; E^2 times what the paper writes."""
        return losses.first_choice_balance(routing)
