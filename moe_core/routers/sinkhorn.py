"""SinkhornRouter: top-k of a softmax that was balanced over the experts as well."""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..routing import Routing
from ..validate import at_least, top_k_fits, whole
from .base import Router, RouterOptions, checked_padding_mask


@dataclass(frozen=True)
class SinkhornOptions(RouterOptions, fixed=("aux_loss_weight",)):
    """The arguments of ``SinkhornRouter``."""

    top_k: int = 1
    _: KW_ONLY
    tolerance: float = 1e-4
    max_rounds: int = 100

    def __post_init__(self):
        super().__post_init__()
        top_k_fits(self.top_k, self.n_experts)
        at_least(0, tolerance=self.tolerance)
        whole(1, max_rounds=self.max_rounds)


class SinkhornRouter(Router):
    r"""S-BASE: in training the K experts come from a balanced plan, the weights from the logits.

    .. math:: \pi = \mathrm{diag}(u)\, e^{h}\, \mathrm{diag}(v),
              \quad \sum_e \pi_{t,e} = \tfrac{1}{T}, \quad \sum_t \pi_{t,e} = \tfrac{1}{E},
              \qquad e_1..e_K = \mathrm{topk}(\pi_t)

    Weights are sigmoid(h) when K = 1, else softmax(h) over all experts, not renormalised. The plan
    is balanced and has no gradient; its top-k is only about as well balanced. In training a token's
    route depends on the whole batch, later tokens included. Eval is plain top-k of the logits:
    causal, and not balanced.

    Args, besides ``Router``'s:
        tolerance: stop when no log v changes by more. Each look synchronises with a GPU; 0: none.
        max_rounds: stop at the latest after so many rounds.

    Source: Clark et al. 2022 (arXiv 2202.01169), S-BASE; weights and eval as in Megatron-LM's
    sinkhorn routing, whose exp(h) overflows for h > 88; here everything is a logarithm.
    """

    Options = SinkhornOptions

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the largest share of the plan first."""
        logits_BNE = self.logits(x)
        ranked_by_BNE = logits_BNE.detach()
        if self.training:
            real_T = checked_padding_mask(padding_mask, x).flatten()
            stop = {"tolerance": self.tolerance, "max_rounds": self.max_rounds}
            _, log_v_E = sinkhorn(ranked_by_BNE.flatten(0, 1), real_T, **stop)
            # u scales whole rows, so v alone orders the experts: a bias per expert for this batch.
            ranked_by_BNE = ranked_by_BNE + log_v_E
        indices_BNK = ranked_by_BNE.topk(self.top_k, dim=-1).indices
        scores_BNE = logits_BNE.sigmoid() if self.top_k == 1 else logits_BNE.softmax(-1)
        weights_BNK = scores_BNE.gather(-1, indices_BNK)
        routing = self.routing(indices_BNK, weights_BNK, logits_BNE, scores_BNE, padding_mask)
        routing = self.limit_capacity(routing)
        return self.add_losses(routing)


@torch.no_grad()
def sinkhorn(
    logits_TE: Tensor, real_T: Tensor, *, tolerance: float = 1e-4, max_rounds: int = 100
) -> tuple[Tensor, Tensor]:
    r"""Scale exp(h) to row sums 1/T and column sums 1/E, by turns; padding rows have sum 0.

    .. math:: u_t \leftarrow \frac{1}{T \sum_e e^{h_{t,e}} v_e},
              \qquad v_e \leftarrow \frac{1}{E \sum_t u_t e^{h_{t,e}}}

    log u (T,), -inf for padding, and log v (E,) with mean 0. The plan is exp(h + log u + log v):
    rows are exact, columns to the tolerance. log v is 0 when there is no real token.
    """
    E = logits_TE.shape[-1]
    log_share = -real_T.sum().clamp(min=1).to(logits_TE.dtype).log()
    log_share_T = torch.where(real_T, log_share, -torch.inf)
    log_v_E = logits_TE.new_zeros(E)
    for _ in range(max_rounds if len(logits_TE) else 0):
        before_E = log_v_E
        log_u_T = log_share_T - torch.logsumexp(logits_TE + log_v_E, dim=-1)
        log_v_E = -math.log(E) - torch.logsumexp(logits_TE + log_u_T.unsqueeze(-1), dim=0)
        log_v_E = torch.where(real_T.any(), log_v_E, 0)
        if tolerance > 0 and (log_v_E - before_E).abs().max() <= tolerance:
            break
    # u and v are known but for a factor that they can lend each other.
    log_v_E = log_v_E - log_v_E.mean()
    return log_share_T - torch.logsumexp(logits_TE + log_v_E, dim=-1), log_v_E
