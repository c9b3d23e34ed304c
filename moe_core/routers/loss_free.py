"""LossFreeRouter: balance by a bias that selects and does nothing else (DeepSeek-V3)."""

from collections.abc import Sequence

import torch

from .. import losses
from ..capacity import CapacityRule
from ..ranks import sum_over_ranks
from ..routing import Routing
from ..validate import at_least, one_of
from .topk import TopKRouter

BIAS_UPDATES = ("sign", "proportional")


class LossFreeRouter(TopKRouter):
    r"""Top-K of score plus bias; after each step the bias of busy experts goes down and that of idle ones up.

    .. math:: e_1..e_K = \mathrm{topk}(s + b), \quad w_k = \gamma \, s_{e_k} \Big/ \sum_j s_{e_j}, \quad
              b_e \leftarrow b_e + u \, \mathrm{sign}(\bar c - c_e)

    c counts the slots that asked for an expert, before capacity and without padding. "proportional" steps by the relative violation
    :math:`u (\bar c - c_e) / \bar c` instead, so that u means the same at any batch size. Afterwards the mean of b is taken off: it
    changes no choice, and unchecked it drifts (torchtitan #1506).

    Args:
        d_model, n_experts, top_k: D, E and K.
        bias_update: "sign" or "proportional".
        bias_update_rate: u; the papers use 0.001, and 0 for the last stretch of training. An attribute one may change.
        sequence_loss_weight: coefficient of ``losses.sequence_balance`` (DeepSeek-V3: 0.0001); 0 leaves the loss out.
        score_func, norm_topk_prob, norm_eps, routed_scaling_factor, n_groups, topk_groups, group_score: see ``TopKRouter``.
            DeepSeek-V3 has gamma = 2.5, and 4 of 8 groups.
        capacity_factor, z_loss_weight, jitter_noise: see ``Router``.

    Attributes:
        expert_bias: b (E,), a float32 buffer. ``update`` changes it, forward never does.

    Raises:
        ValueError: an argument is out of range.

    Source: Wang et al. 2024 (arXiv 2408.15664), algorithm 1, and its section on variants for the step without the sign;
    DeepSeek-AI 2024 (DeepSeek-V3, arXiv 2412.19437), section 2.1.2.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        bias_update: str = "sign",
        bias_update_rate: float = 1e-3,
        sequence_loss_weight: float = 0.0,
        score_func: str = "sigmoid",
        norm_topk_prob: bool = True,
        norm_eps: float = 1e-20,
        routed_scaling_factor: float = 1.0,
        n_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "top2_sum",
        capacity_factor: float | CapacityRule | None = None,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        one_of(BIAS_UPDATES, bias_update=bias_update)
        at_least(0, bias_update_rate=bias_update_rate, sequence_loss_weight=sequence_loss_weight)
        super().__init__(
            d_model,
            n_experts,
            top_k,
            score_func=score_func,
            norm_topk_prob=norm_topk_prob,
            norm_eps=norm_eps,
            routed_scaling_factor=routed_scaling_factor,
            expert_bias=True,
            n_groups=n_groups,
            topk_groups=topk_groups,
            group_score=group_score,
            capacity_factor=capacity_factor,
            z_loss_weight=z_loss_weight,
            jitter_noise=jitter_noise,
        )
        self.bias_update, self.bias_update_rate, self.sequence_loss_weight = (
            bias_update,
            bias_update_rate,
            sequence_loss_weight,
        )

    def route(self, *args, **kwargs) -> Routing:
        """See ``Router.route``; adds the sequence-wise loss."""
        routing = super().route(*args, **kwargs)
        if self.sequence_loss_weight > 0:
            routing = routing.with_losses(
                sequence_balance=self.sequence_loss_weight * losses.sequence_balance(routing)
            )
        return routing

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Move the bias by one step; call once per optimiser step, on every rank.

        Args:
            routings: this layer's, one for each micro-batch of the step. Counts are added as integers, over micro-batches and ranks.
        """
        counts_E = torch.zeros(self.n_experts, dtype=torch.int64, device=self.expert_bias.device)
        for routing in routings:
            counts_E += routing.slots_per_expert()
        counts_E = sum_over_ranks(counts_E)
        total = counts_E.sum()
        missing_E = (
            total - self.n_experts * counts_E
        )  # E (mean - c_e), still an integer: no rounding can turn its sign
        step_E = missing_E.sign() if self.bias_update == "sign" else missing_E / total.clamp(min=1)
        self.expert_bias += self.bias_update_rate * step_E
        self.expert_bias -= self.expert_bias.mean()
