"""ZeroComputationRouter: token choice among E real experts and some that cost nothing, so that easy tokens cost less."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ranks import sum_over_ranks
from ..routing import Routing
from ..validate import at_least, boolean, whole
from .base import Router


class ZeroComputationRouter(Router):
    r"""Top-k over E feed-forward experts and Z experts without a matmul; each token decides how many of its K slots cost anything.

    .. math:: p = \mathrm{softmax}(h) \in \mathbb{R}^{E+Z}, \quad e_1..e_K = \mathrm{topk}(p + b), \quad
        w_k = p_{e_k} \Big/ \sum_j p_{e_j}

    The routing is over E + Z experts, in the order feed-forward, zero, copy, constant; what they compute stands in
    ``moe_core.zero_computation``. There is no capacity.

    Two ways to steer how much is computed. A balance loss with a ratio tau between the two kinds, the idea of MoE++; this form,
    which is 1 at the loads it asks for, is ours:

    .. math:: L = \sum_e \frac{f_e P_e}{\pi_e}, \quad \pi_e \propto \tau \text{ (feed-forward)}, \; 1 \text{ (the others)}

    And the selection bias of LongCat-Flash, changed once per optimiser step for the feed-forward experts only, where s_e is the
    share of slots that chose e:

    .. math:: b_e \leftarrow b_e + \mu \Big( \frac{K_e}{K E} - s_e \Big)

    Args:
        d_model, n_experts, top_k: D, E (the feed-forward experts) and K <= E + Z.
        n_zero_experts, n_copy_experts, n_constant_experts: Z in three parts, at least one in all.
        norm_topk_prob: divide by the sum over the K chosen; LongCat-Flash does not.
        ffn_ratio: tau, slots of a feed-forward expert for each slot of a cheap one where the balance loss is content.
        bias_update_rate: mu; 0 leaves the bias at 0.
        mean_ffn_experts: K_e, feed-forward experts per token that the bias steers to; to be given exactly when mu > 0.
        aux_loss_weight: coefficient of the balance loss above. z_loss_weight, jitter_noise: see ``Router``.

    Attributes:
        n_ffn_experts: E. n_experts: E + Z. expert_bias: b, (E + Z,) float32.

    Raises:
        ValueError: an argument is out of range.

    Source: Jin et al. 2024 (MoE++, arXiv 2410.07348), without its gating residual, which hands logits from layer to layer;
    LongCat-Flash (arXiv 2509.01322), where all of Z are copies, for the bias (its formula from an account of the paper).
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        n_zero_experts: int = 1,
        n_copy_experts: int = 1,
        n_constant_experts: int = 1,
        norm_topk_prob: bool = True,
        ffn_ratio: float = 1.0,
        bias_update_rate: float = 0.0,
        mean_ffn_experts: float | None = None,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        whole(1, n_experts=n_experts)
        whole(
            0,
            n_zero_experts=n_zero_experts,
            n_copy_experts=n_copy_experts,
            n_constant_experts=n_constant_experts,
        )
        n_cheap = n_zero_experts + n_copy_experts + n_constant_experts
        if n_cheap == 0:
            raise ValueError(
                "n_zero_experts, n_copy_experts and n_constant_experts must not all be 0"
            )
        if (
            isinstance(top_k, bool)
            or not isinstance(top_k, int)
            or not 1 <= top_k <= n_experts + n_cheap
        ):
            raise ValueError(
                f"top_k={top_k!r} must be between 1 and all experts={n_experts + n_cheap}"
            )
        boolean(norm_topk_prob=norm_topk_prob)
        at_least(0, ffn_ratio=ffn_ratio, bias_update_rate=bias_update_rate)
        if ffn_ratio == 0:
            raise ValueError(f"ffn_ratio={ffn_ratio!r} must be above 0")
        if (bias_update_rate > 0) != (mean_ffn_experts is not None):
            raise ValueError(
                f"mean_ffn_experts={mean_ffn_experts!r} must be given exactly when "
                f"bias_update_rate={bias_update_rate!r} is above 0"
            )
        if mean_ffn_experts is not None:
            at_least(0, mean_ffn_experts=mean_ffn_experts)
            if mean_ffn_experts > min(top_k, n_experts):
                raise ValueError(
                    f"mean_ffn_experts={mean_ffn_experts!r} must be at most {min(top_k, n_experts)}"
                )
        super().__init__(
            d_model,
            n_experts + n_cheap,
            aux_loss_weight=aux_loss_weight,
            z_loss_weight=z_loss_weight,
            jitter_noise=jitter_noise,
        )
        self.top_k, self.norm_topk_prob, self.n_ffn_experts = top_k, norm_topk_prob, n_experts
        self.n_zero_experts, self.n_copy_experts, self.n_constant_experts = (
            n_zero_experts,
            n_copy_experts,
            n_constant_experts,
        )
        self.ffn_ratio, self.bias_update_rate, self.mean_ffn_experts = (
            ffn_ratio,
            bias_update_rate,
            mean_ffn_experts,
        )
        self.register_buffer("expert_bias", torch.zeros(n_experts + n_cheap, dtype=torch.float32))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K slots per token, with indices in [0, E + Z).

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        scores_BNE = torch.softmax(logits_BNE, dim=-1)
        indices_BNK = torch.topk(scores_BNE + self.expert_bias, self.top_k, dim=-1).indices
        weights_BNK = scores_BNE.gather(-1, indices_BNK)  # the bias selects and does nothing else
        if self.norm_topk_prob:
            weights_BNK = weights_BNK / weights_BNK.sum(dim=-1, keepdim=True)
        return self.route(
            indices_BNK,
            weights_BNK,
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
            normalized=self.norm_topk_prob,
        )

    def balance_loss(self, routing: Routing) -> Tensor:
        """The balance loss of the formula above, without its coefficient; with tau = 1 it is ``losses.load_balance``."""
        total = self.ffn_ratio * self.n_ffn_experts + self.n_experts - self.n_ffn_experts
        product_E = routing.slot_share() * routing.mean_score()
        ffn, cheap = product_E[: self.n_ffn_experts].sum(), product_E[self.n_ffn_experts :].sum()
        return total * (ffn / self.ffn_ratio + cheap)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Move the bias of each feed-forward expert towards its share of the slots; no token, no change."""
        if self.bias_update_rate == 0:
            return
        counts_E = torch.zeros(self.n_experts, dtype=torch.int64, device=self.expert_bias.device)
        for routing in routings:
            counts_E += routing.slots_per_expert()
        counts_E = sum_over_ranks(counts_E)
        share_E = counts_E.double() / counts_E.sum().clamp(min=1)
        missing_E = self.mean_ffn_experts / (self.top_k * self.n_ffn_experts) - share_E
        missing_E[self.n_ffn_experts :] = 0
        self.expert_bias += (self.bias_update_rate * missing_E * (counts_E.sum() > 0)).to(
            self.expert_bias.dtype
        )
