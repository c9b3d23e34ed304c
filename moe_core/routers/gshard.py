"""GShardRouter: two experts per token, the second by lot (Lepikhin et al. 2020)."""

import torch
from torch import Tensor

from .. import losses
from ..capacity import CapacityRule
from ..routing import Routing
from ..validate import boolean
from .topk import TopKRouter


class GShardRouter(TopKRouter):
    r"""Top-2, renormalised; in training the second expert is asked only as often as it matters.

    .. math:: g_1 = \frac{p_{e_1}}{p_{e_1} + p_{e_2}}, \quad g_2 = \frac{p_{e_2}}{p_{e_1} + p_{e_2}}, \quad
              \Pr[e_2 \text{ is asked}] = 2 g_2

    g_2 is at most 1/2, so 2 g_2 is a probability. A second slot that is not asked has the reason NOT_SELECTED, takes no place, and
    the first keeps g_1: the weights are not renormalised again. In eval both experts are asked, always.

    All first choices queue before all second ones, and the balance loss counts first choices only (``losses.first_choice_balance``,
    which is E^2 times what the paper writes).

    Args:
        d_model, n_experts: D and E, at least 2. K is 2.
        random_second_expert: False asks the second expert in training too.
        capacity_factor: 1 unless told otherwise (2T / E places). A number stands for
            ``CapacityRule(factor=..., drop_policy="slot_position")``.
        aux_loss_weight, z_loss_weight: see ``Router``.

    Raises:
        ValueError: an argument is out of range.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 2.2 and algorithm 1; lingvo's Top2GatingOnLogits, where as here a second
    slot that is not asked takes no place (in algorithm 1 it still raises the counter).
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        random_second_expert: bool = True,
        capacity_factor: float | CapacityRule | None = 1.0,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
    ):
        boolean(random_second_expert=random_second_expert)
        if capacity_factor is not None and not isinstance(capacity_factor, CapacityRule):
            capacity_factor = CapacityRule(factor=capacity_factor, drop_policy="slot_position")
        super().__init__(
            d_model,
            n_experts,
            2,
            capacity_factor=capacity_factor,
            aux_loss_weight=aux_loss_weight,
            z_loss_weight=z_loss_weight,
        )
        self.random_second_expert = random_second_expert

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); slot 0 is the first choice, slot 1 the second.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        scores_BNE = torch.softmax(logits_BNE, dim=-1)
        indices_BN2 = self.select(scores_BNE)
        gates_BN2 = self.weigh(logits_BNE, scores_BNE, indices_BN2)
        asked_BN2 = None
        if self.training and self.random_second_expert:
            first_BN, second_BN = gates_BN2.detach().unbind(-1)
            asked_BN2 = torch.stack(
                [
                    torch.ones_like(first_BN, dtype=torch.bool),
                    torch.rand_like(second_BN) < 2 * second_BN,
                ],
                dim=-1,
            )
        return self.route(
            indices_BN2,
            gates_BN2,
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
            selected_BNK=asked_BN2,
            normalized=True,
        )

    def balance_loss(self, routing: Routing) -> Tensor:
        """What ``aux_loss_weight`` multiplies: the balance of first choices."""
        return losses.first_choice_balance(routing)
