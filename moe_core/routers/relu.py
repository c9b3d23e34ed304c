"""ReLURouter: a token takes every expert whose logit is positive; an L1 penalty that adapts itself keeps them few."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import losses
from ..ranks import sum_over_ranks
from ..routing import Routing
from ..validate import at_least, expansion_fits
from .base import Router


class ReLURouter(Router):
    r"""ReMoE: the weight itself is sparse, so that nothing has to be selected and everything is differentiable.

    .. math:: w_e = \mathrm{ReLU}(h_e), \quad L = \lambda \frac{E}{k T^2} \sum_e c_e \sum_t w_{t,e},
        \quad c_e = \sum_t 1[w_{t,e} > 0]

    .. math:: \lambda \leftarrow 1.2 \lambda \text{ if } 1 - \frac{\sum_e c_e}{T E} < 1 - \frac{k}{E},
        \quad \lambda \leftarrow \lambda / 1.2 \text{ otherwise}

    c_e makes a busy expert pay more, which balances the load; it is a count and carries no gradient. A token may take any number of
    experts, none included: its output is then 0. There is no capacity: the number of slots settles at k per token by itself, after
    a start at about E/2, which needs memory for that many.

    Args:
        d_model, n_experts: D and E.
        expansion: k, the mean number of experts per token that lambda steers to, above 0 and at most E.
        l1_weight: lambda at the start.
        l1_multiplier: the factor 1.2 by which lambda changes in each ``update``.
        z_loss_weight, jitter_noise: see ``Router``.

    Attributes:
        l1_coefficient: lambda now, a float32 buffer. Each router has its own, since it sees its own routings only.

    Raises:
        ValueError: an argument is out of range.

    Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711); lambda's rule as in the authors' code.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expansion: float = 1.0,
        *,
        l1_weight: float = 1e-8,
        l1_multiplier: float = 1.2,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        expansion_fits(expansion, n_experts)
        super().__init__(d_model, n_experts, z_loss_weight=z_loss_weight, jitter_noise=jitter_noise)
        at_least(0, l1_weight=l1_weight)
        at_least(1, l1_multiplier=l1_multiplier)
        self.expansion, self.l1_weight, self.l1_multiplier = expansion, l1_weight, l1_multiplier
        self.register_buffer("l1_coefficient", torch.tensor(l1_weight, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Draw the weight anew and start lambda again."""
        super().reset_parameters()
        if "l1_coefficient" in self._buffers:  # not yet when the base class calls this first
            self.l1_coefficient.fill_(self.l1_weight)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K = E slots, of which those with a positive logit are selected.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        weights_BNE = torch.relu(logits_BNE)
        routing = self.route(
            self.every_expert(x),
            weights_BNE,
            logits_BNE,
            weights_BNE,
            padding_mask=padding_mask,
            selected_BNK=logits_BNE > 0,
        )
        return routing.with_losses(
            l1=self.l1_coefficient * losses.l1(routing, expansion=self.expansion)
        )

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Raise lambda when the tokens of this optimiser step took too many experts, lower it otherwise; no token, no change."""
        counts_2 = torch.zeros(2, dtype=torch.int64, device=self.weight.device)
        for routing in routings:
            counts_2 += torch.stack([routing.selected_mask.sum(), routing.real_tokens.sum()])
        selected, tokens = sum_over_ranks(counts_2)
        too_many = selected.double() > self.expansion * tokens.double()
        factor = torch.where(too_many, self.l1_multiplier, 1 / self.l1_multiplier)
        factor = torch.where(tokens > 0, factor, 1.0).to(self.l1_coefficient.dtype)
        if (
            self.l1_weight > 0
        ):  # where float32 can still multiply by 1.2, so that lambda always finds its way back
            self.l1_coefficient.mul_(factor).clamp_(1e-20, 1e20)
