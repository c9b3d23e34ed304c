"""TopKRouter: each token takes the K experts it likes best. How published routers differ is a matter of options."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..capacity import CapacityRule
from ..routing import WEIGHTS_ON, Routing
from ..validate import at_least, boolean, one_of, top_k_fits, whole
from .base import Router


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + e^h)), elementwise. The floor under the root keeps its gradient 0, not NaN, where e^h underflows."""
    return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()


SCORE_FUNCS = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
}
GROUP_SCORES = {
    "max": lambda choice_BNGM: choice_BNGM.amax(dim=-1),
    "top2_sum": lambda choice_BNGM: choice_BNGM.topk(2, dim=-1).values.sum(dim=-1),
}


class TopKRouter(Router):
    r"""Token choice: the K experts with the highest score.

    .. math:: s = \mathrm{score}(h), \quad e_1..e_K = \mathrm{topk}(s + b),
        \quad w_k = \gamma \, s_{e_k} \Big/ \Big(\sum_j s_{e_j} + \epsilon\Big)

    Args:
        d_model, n_experts, top_k: D, E and K.
        score_func: "softmax" over the experts, "sigmoid" or "sqrt_softplus" of each logit by itself.
        score_after_topk: False scores all E logits and selects by score; True selects by logit and scores the K chosen logits
            as if the others were -inf. ``Routing.scores`` holds all E scores either way: a loss that saw only the chosen ones
            would give the others no gradient.
        norm_topk_prob: divide by the sum over the K chosen, as in the formula. False keeps w_k = gamma * s_{e_k}. With top_k=1
            the division leaves w = gamma whatever the router does, and no gradient reaches it through the output: use False there.
        norm_eps: epsilon in that division.
        routed_scaling_factor: gamma.
        bias: learn a bias of the logits, h = x W^T + ``bias``; part of logits, scores and weights like the weight itself.
        expert_bias: have a buffer ``expert_bias`` (E,), the b of the formula, float32 and zero at first. It is added to what is
            selected by and to nothing else: logits, scores and weights never hold it, and it has no gradient.
        n_groups, topk_groups: with n_groups > 1, the experts stand in n_groups equal groups of neighbours, and a token may choose
            only inside its topk_groups best.
        group_score: what makes a group good: the "max" of its experts' (biased) scores, or the sum of its best two, "top2_sum".
        weights_on: what a weight multiplies, the expert's "output" or its "input"; see ``Routing``.
        capacity_factor, aux_loss_weight, z_loss_weight, jitter_noise: see ``Router``.

    Raises:
        ValueError: an argument is out of range, or the groups do not divide the experts or leave fewer than K of them.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); renormalised as in Jiang et al. 2024 (Mixtral, arXiv 2401.04088); groups as in
    DeepSeek-V2 (arXiv 2405.04434, section 2.2.2); sigmoid, selection bias and top2_sum as in DeepSeek-V3 (arXiv 2412.19437,
    section 2.1.2). The options of published models stand in ``presets``.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        score_func: str = "softmax",
        score_after_topk: bool = False,
        norm_topk_prob: bool = True,
        norm_eps: float = 0.0,
        routed_scaling_factor: float = 1.0,
        bias: bool = False,
        expert_bias: bool = False,
        n_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "max",
        weights_on: str = "output",
        capacity_factor: float | CapacityRule | None = None,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        top_k_fits(top_k, n_experts)
        one_of(SCORE_FUNCS, score_func=score_func)
        one_of(WEIGHTS_ON, weights_on=weights_on)
        boolean(
            score_after_topk=score_after_topk,
            norm_topk_prob=norm_topk_prob,
            bias=bias,
            expert_bias=expert_bias,
        )
        at_least(0, norm_eps=norm_eps, routed_scaling_factor=routed_scaling_factor)
        groups_fit(n_groups, topk_groups, group_score, n_experts, top_k)
        super().__init__(
            d_model,
            n_experts,
            capacity_factor=capacity_factor,
            aux_loss_weight=aux_loss_weight,
            z_loss_weight=z_loss_weight,
            jitter_noise=jitter_noise,
        )
        self.top_k, self.score_func, self.score_after_topk = top_k, score_func, score_after_topk
        self.norm_topk_prob, self.norm_eps, self.routed_scaling_factor = (
            norm_topk_prob,
            norm_eps,
            routed_scaling_factor,
        )
        self.n_groups, self.topk_groups, self.group_score, self.weights_on = (
            n_groups,
            topk_groups,
            group_score,
            weights_on,
        )
        self.bias = nn.Parameter(torch.zeros(n_experts)) if bias else None
        self.register_buffer(
            "expert_bias", torch.zeros(n_experts, dtype=torch.float32) if expert_bias else None
        )

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the best expert first.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        scores_BNE = self.scores_of(logits_BNE)
        indices_BNK = self.select(logits_BNE if self.score_after_topk else scores_BNE)
        weights_BNK = self.weigh(logits_BNE, scores_BNE, indices_BNK)
        return self.route(
            indices_BNK,
            weights_BNK,
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
            normalized=self.sums_to_one,
            weights_on=self.weights_on,
        )

    def logits(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, E) in float32 at least; see ``Router.logits``."""
        logits_BNE = super().logits(x)
        return logits_BNE if self.bias is None else logits_BNE + self.bias.to(logits_BNE.dtype)

    def scores_of(self, logits: Tensor) -> Tensor:
        """The score function, over the last dimension."""
        return SCORE_FUNCS[self.score_func](logits)

    def select(self, values_BNE: Tensor) -> Tensor:
        """The K best experts of each token, (B, N, K) int64: bias, groups, top-k. A choice has no gradient."""
        choice_BNE = values_BNE.detach()
        if self.expert_bias is not None:
            choice_BNE = choice_BNE + self.expert_bias
        if self.n_groups > 1:
            choice_BNE = keep_best_groups(
                choice_BNE, self.n_groups, self.topk_groups, self.group_score
            )
        return choice_BNE.topk(self.top_k, dim=-1).indices

    def weigh(self, logits_BNE: Tensor, scores_BNE: Tensor, indices_BNK: Tensor) -> Tensor:
        """The weights (B, N, K) of the chosen experts, from unbiased scores: score, renormalise, scale."""
        if self.score_after_topk:
            weights_BNK = self.scores_of(logits_BNE.gather(-1, indices_BNK))
        else:
            weights_BNK = scores_BNE.gather(-1, indices_BNK)
        if self.norm_topk_prob:
            total_BN1 = weights_BNK.sum(dim=-1, keepdim=True) + self.norm_eps
            # all K scores may underflow: not 0 / 0
            weights_BNK = weights_BNK / total_BN1.clamp(min=torch.finfo(total_BN1.dtype).tiny)
        return weights_BNK * self.routed_scaling_factor

    def balance_loss(self, routing: Routing) -> Tensor:
        """``losses.load_balance``; of scores that do not sum to 1 it takes each token's relative ones, so that balance is 1."""
        return losses.load_balance(routing, relative_scores=self.score_func != "softmax")

    @property
    def sums_to_one(self) -> bool:
        """True where the K weights sum to 1 for every input: a softmax over the K, or one whose largest values are divided by
        their sum. A sigmoid may underflow for all K, and a bias may select experts whose softmax does."""
        if (
            self.routed_scaling_factor != 1
            or self.score_func != "softmax"
            or self.norm_topk_prob
            and self.norm_eps > 1e-6
        ):
            return False
        return self.score_after_topk or self.norm_topk_prob and self.expert_bias is None


def keep_best_groups(
    choice_BNE: Tensor, n_groups: int, topk_groups: int, group_score: str
) -> Tensor:
    """The values of the experts in each token's best groups; -inf for the others.

    -inf and not 0: a biased score can be negative, and then experts outside the groups would win (DeepSeek-V3, issue 741).
    """
    choice_BNGM = choice_BNE.unflatten(-1, (n_groups, -1))
    best_BNg = GROUP_SCORES[group_score](choice_BNGM).topk(topk_groups, dim=-1).indices
    out_BNG = torch.ones(
        choice_BNGM.shape[:-1], dtype=torch.bool, device=choice_BNE.device
    ).scatter(-1, best_BNg, False)
    return choice_BNGM.masked_fill(out_BNG.unsqueeze(-1), -torch.inf).flatten(-2)


def groups_fit(
    n_groups: int, topk_groups: int, group_score: str, n_experts: int, top_k: int
) -> None:
    """Raise ValueError unless the groups divide the experts and the chosen ones hold at least K."""
    whole(1, n_groups=n_groups, topk_groups=topk_groups)
    one_of(GROUP_SCORES, group_score=group_score)
    if n_experts % n_groups:
        raise ValueError(f"n_groups={n_groups} must divide n_experts={n_experts}")
    if topk_groups > n_groups:
        raise ValueError(f"topk_groups={topk_groups} must be between 1 and n_groups={n_groups}")
    size = n_experts // n_groups
    if top_k > topk_groups * size:
        raise ValueError(
            f"top_k={top_k} must be at most {topk_groups * size}, the experts in topk_groups={topk_groups} groups of {size}"
        )
    if n_groups > 1 and group_score == "top2_sum" and size < 2:
        raise ValueError(
            f"n_groups={n_groups} leaves {size} expert a group, group_score='top2_sum' needs at least 2"
        )
