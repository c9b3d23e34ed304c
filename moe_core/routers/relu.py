"""ReLURouter: a token takes every expert with a positive logit; an adaptive L1 keeps them few."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .. import losses
from ..ranks import sum_over_ranks
from ..routing import Routing
from ..validate import at_least, expansion_fits
from .base import Router, RouterOptions


@dataclass(frozen=True)
class ReLUOptions(RouterOptions, fixed=("capacity_factor", "aux_loss_weight")):
    """The arguments of ``ReLURouter``."""

    expansion: float = 1.0
    _: KW_ONLY
    l1_weight: float = 1e-8
    l1_multiplier: float = 1.2

    def __post_init__(self):
        super().__post_init__()
        expansion_fits(self.expansion, self.n_experts)
        at_least(0, l1_weight=self.l1_weight)
        at_least(1, l1_multiplier=self.l1_multiplier)


class ReLURouter(Router):
    r"""ReMoE: the weight itself is sparse, so nothing is selected and everything differentiable.

    .. math:: w_e = \mathrm{ReLU}(h_e), \quad L = \lambda \frac{E}{k T^2} \sum_e c_e \sum_t w_{t,e},
        \quad c_e = \sum_t 1[w_{t,e} > 0]

    .. math:: \lambda \leftarrow 1.2 \lambda
        \text{ if } 1 - \frac{\sum_e c_e}{T E} < 1 - \frac{k}{E},
        \quad \lambda \leftarrow \lambda / 1.2 \text{ otherwise}

    c_e is a count without gradient that makes a busy expert pay more, which balances the load. A
    token may take no expert: its output is then 0. There is no capacity: a token takes about E/2
    experts at the start, which needs memory for that many, and k once lambda has grown.

    Args, besides ``Router``'s:
        expansion: k, the mean number of experts per token to steer to, above 0 and at most E.
        l1_weight: lambda at the start; ``l1_coefficient``, a float32 buffer, is lambda now.
        l1_multiplier: the factor 1.2 by which lambda changes in each ``update``.

    Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711); lambda's rule as in the authors' code.
    """

    Options = ReLUOptions
    top_k_is_a_mean = True

    def initial_state(self) -> dict[str, Tensor]:
        """Lambda."""
        return {"l1_coefficient": torch.tensor(self.l1_weight, dtype=torch.float32)}

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D); K = E slots, selected where the logit is positive."""
        logits_BNE = self.logits(x)
        weights_BNE = torch.relu(logits_BNE)
        choice = self.every_expert(x), weights_BNE, logits_BNE, weights_BNE, padding_mask
        routing = self.routing(*choice, selected_BNK=logits_BNE > 0)
        return self.add_losses(routing)

    def add_losses(self, routing: Routing) -> Routing:
        """The z-loss and the L1."""
        l1 = self.l1_coefficient * losses.l1(routing, expansion=self.expansion)
        return super().add_losses(routing).with_losses(l1=l1)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Raise lambda when the step's tokens took too many experts, else lower it."""
        counts_2 = torch.zeros(2, dtype=torch.int64, device=self.weight.device)
        for routing in routings:
            counts_2 += torch.stack([routing.selected_mask.sum(), routing.real_tokens.sum()])
        selected, tokens = sum_over_ranks(counts_2)
        too_many = selected.double() > self.expansion * tokens.double()
        factor = torch.where(too_many, self.l1_multiplier, 1 / self.l1_multiplier)
        factor = torch.where(tokens > 0, factor, 1.0)  # a step without a token says nothing
        factor = factor.to(self.l1_coefficient.dtype)
        if self.l1_weight > 0:
            # Where float32 can still multiply by 1.2, so that lambda always finds its way back.
            self.l1_coefficient.mul_(factor).clamp_(1e-20, 1e20)
