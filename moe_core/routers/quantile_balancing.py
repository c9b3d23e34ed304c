"""QuantileBalancingRouter: top-k with a bias per expert that is solved for, not stepped towards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ranks import sum_over_ranks
from ..routing import Routing
from ..validate import between, one_of, whole
from .topk import SCORING, TopKOptions, TopKRouter

_FIXED = set(SCORING) - {"score_func", "norm_topk_prob"} | {"aux_loss_weight"}


@dataclass(frozen=True)
class QuantileBalancingOptions(TopKOptions, fixed=_FIXED):
    """The arguments of ``QuantileBalancingRouter``."""

    score_func: str = "sigmoid"
    ema_decay: float = 0.0
    n_alternations: int = 1

    def __post_init__(self):
        super().__post_init__()
        one_of(("sigmoid", "softmax"), score_func=self.score_func)
        between(0.0, 1.0, ema_decay=self.ema_decay)
        whole(1, n_alternations=self.n_alternations)


class QuantileBalancingRouter(TopKRouter):
    r"""Top-K of score minus price, with prices that would have balanced the last step's tokens.

    .. math:: e_1..e_K = \mathrm{topk}(s - \beta), \qquad
              \alpha_t \leftarrow (K{+}1)\text{-th largest of } s_t - \beta, \quad
              \beta_e \leftarrow \big(\tfrac{TK}{E}{+}1\big)\text{-th largest of }
              \{s_{t,e} - \alpha_t\}_t, \quad \beta \leftarrow \beta - \mathrm{mean}(\beta)

    alpha is what a token asks of an expert, beta what an expert asks of a token: prices of the
    linear programme "best total score with K experts per token and TK/E tokens per expert", lowered
    by turns. Only beta is kept, in the float32 buffer ``beta`` (E,). It changes the choice, never a
    weight. Forward uses the beta of earlier steps, in training too, so the router is causal.

    Args, besides ``Router``'s:
        score_func: "sigmoid" or "softmax": the s above.
        norm_topk_prob: the K weights sum to 1; with K = 1 no gradient then reaches the router.
        ema_decay: beta <- ema_decay * beta + (1 - ema_decay) * new; 0 is the published default.
        n_alternations: how often alpha and beta take turns in one update.

    Source: Su 2026, kexue.fm/archives/11619; one update per optimiser step, EMA and centring as in
    Megatron-LM PR 5349. Scores, not logits, are balanced as in Kimi K3 (torchtitan PR 4577).
    """

    Options = QuantileBalancingOptions

    def initial_state(self) -> dict[str, Tensor]:
        """Prices of zero."""
        return {"beta": torch.zeros(self.n_experts)}

    @property
    def selection_bias(self) -> Tensor:
        return -self.beta

    @property
    def sums_to_one(self) -> bool:
        return self.norm_topk_prob

    def weigh(self, logits_BNE: Tensor, scores_BNE: Tensor, indices_BNK: Tensor) -> Tensor:
        """(B, N, K), the scores of the chosen, renormalised if so asked."""
        if not self.norm_topk_prob:
            return scores_BNE.gather(-1, indices_BNK)
        sigmoid = self.score_func == "sigmoid"
        log_BNE = F.logsigmoid(logits_BNE) if sigmoid else F.log_softmax(logits_BNE, dim=-1)
        # In logarithms: scores that underflow to 0 still have a ratio.
        return log_BNE.gather(-1, indices_BNK).softmax(-1)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Solve for beta once, on the tokens of all micro-batches whose logits are finite."""
        if self.top_k == self.n_experts:  # nothing to balance
            return
        # Ranks solve for themselves and average by their numbers of tokens.
        totals = self.beta.new_zeros(self.n_experts + 1)
        if sum(routing.real_tokens.numel() for routing in routings):
            scores_TE = torch.cat([routing.scores.flatten(0, 1) for routing in routings])
            logits_TE = torch.cat([routing.logits.flatten(0, 1) for routing in routings])
            real_T = torch.cat([routing.real_tokens.flatten() for routing in routings])
            real_T &= logits_TE.isfinite().all(-1)  # one NaN in the prices would stay there
            beta_E, n_real = self.beta, real_T.sum()
            for _ in range(self.n_alternations):
                beta_E = balancing_bias(scores_TE, real_T, self.top_k, beta_E)
            weighted = torch.cat([beta_E, beta_E.new_ones(1)]) * n_real
            totals = torch.where(n_real > 0, weighted, 0)
        totals = sum_over_ranks(totals)
        mean_E = totals[:-1] / totals[-1].clamp(min=1)
        new_E = self.ema_decay * self.beta + (1 - self.ema_decay) * mean_E
        self.beta.copy_(torch.where(totals[-1] > 0, new_E, self.beta))


def balancing_bias(scores_TE: Tensor, real_T: Tensor, top_k: int, beta_E: Tensor) -> Tensor:
    """One turn of alpha, then beta, as in the formula above; K < E. Padding has no say."""
    T, E = scores_TE.shape
    if T == 0:
        return beta_E
    alpha_T1 = (scores_TE - beta_E).topk(top_k + 1, dim=-1).values[:, -1:]
    share = (real_T.sum() * top_k // E).clamp(max=T - 1)
    asked_TE = (scores_TE - alpha_T1).masked_fill(~real_T.unsqueeze(-1), -torch.inf)
    sorted_TE = asked_TE.sort(dim=0, descending=True).values
    beta_E = sorted_TE.index_select(0, share.view(1)).squeeze(0)
    return beta_E - beta_E.mean()
