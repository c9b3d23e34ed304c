"""ZeroComputationRouter: token choice among E real experts and some that cost nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ranks import load_over_ranks
from ..routing import Routing
from ..validate import at_least, whole
from .topk import SCORING, TopKOptions, TopKRouter

_FIXED = set(SCORING) - {"norm_topk_prob"} | {"capacity_factor"}


@dataclass(frozen=True)
class ZeroComputationOptions(TopKOptions, fixed=_FIXED):
    """The arguments of ``ZeroComputationRouter``."""

    n_zero_experts: int = 1
    n_copy_experts: int = 1
    n_constant_experts: int = 1
    ffn_ratio: float = 1.0
    bias_update_rate: float = 0.0
    mean_ffn_experts: float | None = None
    expert_bias: bool = True

    def __post_init__(self):
        whole(1, n_experts=self.n_experts)
        whole(0, n_zero_experts=self.n_zero_experts, n_copy_experts=self.n_copy_experts)
        whole(0, n_constant_experts=self.n_constant_experts)
        if sum(self.cheap_experts) == 0:
            three = "n_zero_experts, n_copy_experts and n_constant_experts"
            raise ValueError(f"{three} must not all be 0")
        super().__post_init__()
        at_least(0, ffn_ratio=self.ffn_ratio, bias_update_rate=self.bias_update_rate)
        if self.ffn_ratio == 0:
            raise ValueError(f"ffn_ratio={self.ffn_ratio!r} must be above 0")
        mean, most = self.mean_ffn_experts, min(self.top_k, self.n_experts)
        if (self.bias_update_rate > 0) != (mean is not None):
            needed = f"given exactly when bias_update_rate={self.bias_update_rate!r} is above 0"
            raise ValueError(f"mean_ffn_experts={mean!r} must be {needed}")
        if mean is not None:
            at_least(0, mean_ffn_experts=mean)
            if mean > most:
                raise ValueError(f"mean_ffn_experts={mean!r} must be at most {most}")

    @property
    def cheap_experts(self) -> tuple[int, int, int]:
        return self.n_zero_experts, self.n_copy_experts, self.n_constant_experts

    @property
    def total_experts(self) -> int:
        return self.n_experts + sum(self.cheap_experts)


class ZeroComputationRouter(TopKRouter):
    r"""Top-k over E feed-forward experts and Z without a matmul: easy tokens cost less.

    .. math:: p = \mathrm{softmax}(h) \in \mathbb{R}^{E+Z}, \quad e_1..e_K = \mathrm{topk}(p + b),
        \quad w_k = p_{e_k} \Big/ \sum_j p_{e_j}

    The order is feed-forward, zero, copy, constant; there is no capacity. Two ways steer how much
    is computed. A balance loss with a ratio tau, the idea of MoE++ (this form is ours), or the
    selection bias of LongCat-Flash, where s_e is the share of slots that chose a feed-forward
    expert e:

    .. math:: L = \sum_e \frac{f_e P_e}{\pi_e},
        \quad \pi_e \propto \tau \text{ (feed-forward)}, \; 1 \text{ (the others)},
        \qquad b_e \leftarrow b_e + \mu \Big( \frac{K_e}{K E} - s_e \Big)

    Args, besides ``Router``'s (``n_experts`` is E there, and E + Z as an attribute):
        n_zero_experts, n_copy_experts, n_constant_experts: Z in three parts, at least one in all.
        norm_topk_prob: divide by the sum over the K chosen; LongCat-Flash does not.
        ffn_ratio: tau, slots of a feed-forward expert for each slot of a cheap one.
        bias_update_rate: mu; 0 leaves the bias at 0.
        mean_ffn_experts: K_e, feed-forward experts per token to steer to; given with mu > 0 only.

    Source: Jin et al. 2024 (MoE++, arXiv 2410.07348), without its gating residual between layers;
    LongCat-Flash (arXiv 2509.01322), all of Z copies (its formula from an account of the paper).
    """

    Options = ZeroComputationOptions

    @property
    def cheap_experts(self) -> tuple[int, int, int]:
        return self.options.cheap_experts

    @property
    def n_ffn_experts(self) -> int:
        return self.options.n_experts

    def expected_share(self) -> Tensor:
        """(E + Z,): tau times as much for a feed-forward expert, or what the bias steers to."""
        n_ffn, n_cheap = self.n_ffn_experts, self.n_experts - self.n_ffn_experts
        ffn = self.ffn_ratio * n_ffn / (self.ffn_ratio * n_ffn + n_cheap)
        if self.bias_update_rate > 0:
            ffn = self.mean_ffn_experts / self.top_k
        shares = [ffn / n_ffn] * n_ffn + [(1 - ffn) / n_cheap] * n_cheap
        return torch.tensor(shares, dtype=torch.float64)

    def balance_loss(self, routing: Routing) -> Tensor:
        """The loss of the formula above; with tau = 1 it is ``losses.load_balance``."""
        total = self.ffn_ratio * self.n_ffn_experts + self.n_experts - self.n_ffn_experts
        product_E = routing.slot_share() * routing.mean_score()
        ffn, cheap = product_E[: self.n_ffn_experts].sum(), product_E[self.n_ffn_experts :].sum()
        return total * (ffn / self.ffn_ratio + cheap)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Move each feed-forward expert's bias towards its share of the slots, if there is one."""
        if self.bias_update_rate == 0:
            return
        counts_E = load_over_ranks(routings, self.expert_bias)
        share_E = counts_E.double() / counts_E.sum().clamp(min=1)
        missing_E = self.mean_ffn_experts / (self.top_k * self.n_ffn_experts) - share_E
        missing_E[self.n_ffn_experts :] = 0  # the cheap ones take what is left
        # Without a token nothing changes; a product, because an if would synchronise.
        step_E = self.bias_update_rate * missing_E * (counts_E.sum() > 0)
        self.expert_bias += step_E.to(self.expert_bias.dtype)
