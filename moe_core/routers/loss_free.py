"""LossFreeRouter: balance by a bias that selects and does nothing else (DeepSeek-V3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import losses
from ..ranks import load_over_ranks
from ..routing import Routing
from ..validate import at_least, one_of
from .topk import TopKOptions, TopKRouter

BIAS_UPDATES = ("sign", "proportional")
_FIXED = ("score_after_topk", "bias", "expert_bias", "weights_on", "aux_loss_weight")


@dataclass(frozen=True)
class LossFreeOptions(TopKOptions, fixed=_FIXED):
    """The arguments of ``LossFreeRouter``."""

    bias_update: str = "sign"
    bias_update_rate: float = 1e-3
    sequence_loss_weight: float = 0.0
    score_func: str = "sigmoid"
    norm_eps: float = 1e-20
    group_score: str = "top2_sum"
    expert_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        one_of(BIAS_UPDATES, bias_update=self.bias_update)
        at_least(0, bias_update_rate=self.bias_update_rate)
        at_least(0, sequence_loss_weight=self.sequence_loss_weight)


class LossFreeRouter(TopKRouter):
    r"""Top-K of score plus bias; each step lowers the bias of busy experts and raises that of idle.

    .. math:: e_1..e_K = \mathrm{topk}(s + b), \quad w_k = \gamma \, s_{e_k} \Big/ \sum_j s_{e_j},
              \quad b_e \leftarrow b_e + u \, \mathrm{sign}(\bar c - c_e)

    c is the load, before capacity and without padding; b is ``expert_bias`` (E,), a float32 buffer.

    Args, besides ``TopKRouter``'s (DeepSeek-V3: gamma = 2.5, and 4 of 8 groups):
        bias_update: "sign", or "proportional", which steps by the relative violation :math:`u (\bar
            c - c_e) / \bar c`, so that u means the same at any batch size.
        bias_update_rate: u; 0.001 in the papers, and 0 at the end of training: it may be changed.
        sequence_loss_weight: coefficient of ``losses.sequence_balance`` (DeepSeek-V3: 0.0001).

    Source: Wang et al. 2024 (arXiv 2408.15664), algorithm 1, and its section on variants for the
    step without the sign; DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """

    Options = LossFreeOptions

    def add_losses(self, routing: Routing) -> Routing:
        """The z-loss, and the sequence-wise balance loss."""
        routing = super().add_losses(routing)
        if self.sequence_loss_weight > 0:
            loss = self.sequence_loss_weight * losses.sequence_balance(routing)
            routing = routing.with_losses(sequence_balance=loss)
        return routing

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Move the bias by one step; at a rate of 0 it stays, to the last bit."""
        if self.bias_update_rate == 0:
            return
        counts_E = load_over_ranks(routings, self.expert_bias)
        total = counts_E.sum()
        # E (mean - c_e), still an integer: no rounding can turn its sign.
        missing_E = total - self.n_experts * counts_E
        sign = self.bias_update == "sign"
        step_E = missing_E.sign() if sign else missing_E / total.clamp(min=1)
        self.expert_bias += self.bias_update_rate * step_E
        # The mean changes no choice, and unchecked it drifts (torchtitan #1506).
        self.expert_bias -= self.expert_bias.mean()
