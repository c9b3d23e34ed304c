"""TopKRouter: each token takes the K experts it likes best. Published ones differ by options."""

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..routing import WEIGHTS_ON, Routing
from ..validate import at_least, boolean, one_of, top_k_fits, whole
from .base import Router, RouterOptions


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + e^h)), elementwise."""
    # The floor keeps the root's gradient 0, not NaN, where e^h underflows.
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


@dataclass(frozen=True)
class TopKOptions(RouterOptions):
    """The arguments of ``TopKRouter``."""

    top_k: int
    _: KW_ONLY
    score_func: str = "softmax"
    score_after_topk: bool = False
    norm_topk_prob: bool = True
    norm_eps: float = 0.0
    routed_scaling_factor: float = 1.0
    bias: bool = False
    expert_bias: bool = False
    n_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    weights_on: str = "output"

    def __post_init__(self):
        super().__post_init__()
        top_k_fits(self.top_k, self.total_experts)
        one_of(SCORE_FUNCS, score_func=self.score_func)
        one_of(WEIGHTS_ON, weights_on=self.weights_on)
        boolean(score_after_topk=self.score_after_topk, norm_topk_prob=self.norm_topk_prob)
        boolean(bias=self.bias, expert_bias=self.expert_bias)
        at_least(0, norm_eps=self.norm_eps, routed_scaling_factor=self.routed_scaling_factor)
        groups = self.n_groups, self.topk_groups, self.group_score
        groups_fit(*groups, self.total_experts, self.top_k)


# How to score, select and weigh; a router with rules of its own fixes these.
SCORING = (
    *("score_func", "score_after_topk", "norm_topk_prob", "norm_eps", "routed_scaling_factor"),
    *("bias", "expert_bias", "n_groups", "topk_groups", "group_score", "weights_on"),
)


class TopKRouter(Router):
    r"""Token choice: the K experts with the highest score.

    .. math:: s = \mathrm{score}(h), \quad e_1..e_K = \mathrm{topk}(s + b),
        \quad w_k = \gamma \, s_{e_k} \Big/ \Big(\sum_j s_{e_j} + \epsilon\Big)

    Args, besides ``Router``'s:
        score_func: "softmax" over the experts, or "sigmoid" or "sqrt_softplus" of each logit.
        score_after_topk: select by logit and score the K chosen as if the others were -inf.
        norm_topk_prob: divide by the sum over the K chosen. With top_k=1 that leaves w = gamma
            whatever the router does, and no gradient reaches it: use False there.
        norm_eps, routed_scaling_factor: epsilon and gamma.
        bias: learn a bias of the logits, h = x W^T + ``bias``.
        expert_bias: have the b of the formula, a float32 buffer (E,), zero at first.
        n_groups, topk_groups: the experts stand in n_groups groups of neighbours, and a token
            chooses inside its topk_groups best.
        group_score: of a group's (biased) scores, the "max" or the sum of the best two, "top2_sum".
        weights_on: what a weight multiplies, the expert's "output" or its "input".

    Source: Shazeer et al. 2017 (arXiv 1701.06538); renormalised as in Mixtral (arXiv 2401.04088);
    groups as in DeepSeek-V2 (arXiv 2405.04434, section 2.2.2); sigmoid, selection bias and top2_sum
    as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Published options stand in ``presets``.
    """

    Options = TopKOptions

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.bias = nn.Parameter(torch.zeros(self.n_experts)) if self.options.bias else None
        if not self.options.expert_bias:  # else it is the buffer of initial_state
            self.expert_bias = None

    def initial_state(self) -> dict[str, Tensor]:
        """The selection bias, where there is one."""
        return {"expert_bias": torch.zeros(self.n_experts)} if self.options.expert_bias else {}

    def reset_parameters(self) -> None:
        """Draw the weight anew; biases start at zero."""
        super().reset_parameters()
        if isinstance(self.bias, nn.Parameter):
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the best expert first."""
        logits_BNE = self.logits(x)
        # All E scores, also where only the K chosen are used: a loss that saw only these would give
        # the others no gradient.
        scores_BNE = self.scores_of(logits_BNE)
        indices_BNK = self.select(logits_BNE if self.score_after_topk else scores_BNE)
        weights_BNK = self.weigh(logits_BNE, scores_BNE, indices_BNK)
        choice = indices_BNK, weights_BNK, logits_BNE, scores_BNE, padding_mask
        promises = {"normalized": self.sums_to_one, "weights_on": self.weights_on}
        routing = self.routing(*choice, **promises)
        routing = self.limit_capacity(routing)
        return self.add_losses(routing)

    @property
    def selection_bias(self) -> Tensor | None:
        return self.expert_bias

    def logits(self, x: Tensor) -> Tensor:
        """As ``Router.logits``, plus the bias."""
        logits_BNE = super().logits(x)
        return logits_BNE if self.bias is None else logits_BNE + self.bias.to(logits_BNE.dtype)

    def scores_of(self, logits: Tensor) -> Tensor:
        """The score function, over the last dimension."""
        return SCORE_FUNCS[self.score_func](logits)

    def select(self, values_BNE: Tensor) -> Tensor:
        """(B, N, K) int64, the K best experts of each token: bias, groups, top-k."""
        choice_BNE = values_BNE.detach()  # a choice has no gradient
        if self.selection_bias is not None:
            choice_BNE = choice_BNE + self.selection_bias  # here and nowhere else
        if self.n_groups > 1:
            groups = self.n_groups, self.topk_groups, self.group_score
            choice_BNE = keep_best_groups(choice_BNE, *groups)
        return choice_BNE.topk(self.top_k, dim=-1).indices

    def weigh(self, logits_BNE: Tensor, scores_BNE: Tensor, indices_BNK: Tensor) -> Tensor:
        """(B, N, K), the weights of the chosen: unbiased scores, renormalised, scaled."""
        if self.score_after_topk:
            weights_BNK = self.scores_of(logits_BNE.gather(-1, indices_BNK))
        else:
            weights_BNK = scores_BNE.gather(-1, indices_BNK)
        if self.norm_topk_prob:
            total_BN1 = weights_BNK.sum(dim=-1, keepdim=True) + self.norm_eps
            # All K scores may underflow: not 0 / 0.
            weights_BNK = weights_BNK / total_BN1.clamp(min=torch.finfo(total_BN1.dtype).tiny)
        return weights_BNK * self.routed_scaling_factor

    def balance_loss(self, routing: Routing) -> Tensor:
        """``losses.load_balance``, of relative scores where a token's do not sum to 1."""
        return losses.load_balance(routing, relative_scores=self.score_func != "softmax")

    @property
    def sums_to_one(self) -> bool:
        # For every input: a sigmoid may underflow for all K, and a bias may select experts whose
        # softmax does.
        if self.routed_scaling_factor != 1 or self.score_func != "softmax":
            return False
        if self.norm_topk_prob and self.norm_eps > 1e-6:
            return False
        return self.score_after_topk or self.norm_topk_prob and self.expert_bias is None


def keep_best_groups(
    choice_BNE: Tensor, n_groups: int, topk_groups: int, group_score: str
) -> Tensor:
    """The values of the experts in each token's best groups; -inf for the others."""
    choice_BNGM = choice_BNE.unflatten(-1, (n_groups, -1))
    best_BNg = GROUP_SCORES[group_score](choice_BNGM).topk(topk_groups, dim=-1).indices
    out_BNG = torch.ones_like(choice_BNGM[..., 0], dtype=torch.bool).scatter(-1, best_BNg, False)
    # -inf and not 0: biased scores can be negative, and then experts outside the groups would win
    # (DeepSeek-V3, issue 741).
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
        most = f"{topk_groups * size}, the experts in topk_groups={topk_groups} groups of {size}"
        raise ValueError(f"top_k={top_k} must be at most {most}")
    if n_groups > 1 and group_score == "top2_sum" and size < 2:
        needs = "group_score='top2_sum' needs 2"
        raise ValueError(f"n_groups={n_groups} leaves {size} expert a group, {needs}")
