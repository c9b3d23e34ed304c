"""SinkhornRouter: top-k of a softmax that was balanced over the experts as well."""

import math

import torch
from torch import Tensor

from ..capacity import CapacityRule
from ..routing import Routing
from ..validate import at_least, top_k_fits, whole
from .base import Router
from .expert_choice import count_real


class SinkhornRouter(Router):
    r"""Sinkhorn routing (S-BASE): in training the K experts come from a balanced transport plan, the weights from the logits.

    .. math:: \pi = \mathrm{diag}(u)\, e^{h}\, \mathrm{diag}(v), \quad \sum_e \pi_{t,e} = \tfrac{1}{T}, \quad
              \sum_t \pi_{t,e} = \tfrac{1}{E}, \qquad e_1..e_K = \mathrm{topk}(\pi_t)

    The plan carries no gradient. Since u scales whole rows, the choice is topk(h + log v): Sinkhorn finds a bias per expert for
    this batch. Weights are sigmoid(h) when K = 1, else softmax(h) over all experts, not renormalised. The plan's column sums
    are equal; its rounded top-k is only about as well balanced.

    In training a token's route depends on the whole batch, later tokens included. Eval is plain top-k of the logits: causal,
    and not balanced.

    Args:
        d_model, n_experts, top_k: D, E and K.
        tolerance: stop when no log v changes by more. Looking waits for the GPU in each round; 0 does not look.
        max_rounds: stop at the latest after so many rounds.
        capacity_factor, z_loss_weight, jitter_noise: see ``Router``. There is no balance loss: it would be a second balancer.

    Raises:
        ValueError: an argument is out of range.

    Source: Clark et al. 2022 (arXiv 2202.01169), S-BASE; weights and eval as in Megatron-LM's sinkhorn routing. There the scaling runs
    on exp(h), which overflows for h > 88, and compares v; here both are logarithms.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 1,
        *,
        tolerance: float = 1e-4,
        max_rounds: int = 100,
        capacity_factor: float | CapacityRule | None = None,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        top_k_fits(top_k, n_experts)
        at_least(0, tolerance=tolerance)
        whole(1, max_rounds=max_rounds)
        super().__init__(
            d_model,
            n_experts,
            capacity_factor=capacity_factor,
            z_loss_weight=z_loss_weight,
            jitter_noise=jitter_noise,
        )
        self.top_k, self.tolerance, self.max_rounds = top_k, tolerance, max_rounds

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the largest share of the plan first.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        ranked_by_BNE = logits_BNE.detach()
        if self.training:
            _, log_v_E = sinkhorn(
                ranked_by_BNE.flatten(0, 1),
                count_real(x, padding_mask).flatten(),
                tolerance=self.tolerance,
                max_rounds=self.max_rounds,
            )
            ranked_by_BNE = ranked_by_BNE + log_v_E
        indices_BNK = ranked_by_BNE.topk(self.top_k, dim=-1).indices
        scores_BNE = logits_BNE.sigmoid() if self.top_k == 1 else logits_BNE.softmax(-1)
        return self.route(
            indices_BNK,
            scores_BNE.gather(-1, indices_BNK),
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
        )


@torch.no_grad()
def sinkhorn(
    logits_TE: Tensor, real_T: Tensor, *, tolerance: float = 1e-4, max_rounds: int = 100
) -> tuple[Tensor, Tensor]:
    r"""Scale exp(h) to row sums 1/T and column sums 1/E, by turns; padding rows have sum 0.

    .. math:: u_t \leftarrow \frac{1}{T \sum_e e^{h_{t,e}} v_e}, \qquad v_e \leftarrow \frac{1}{E \sum_t u_t e^{h_{t,e}}}

    Returns:
        log u (T,), -inf for padding, and log v (E,) with mean 0. The plan is exp(h + log u + log v), rows exact, columns
        to the tolerance. log v is 0 when there is no real token.
    """
    E = logits_TE.shape[-1]
    log_share_T = torch.where(
        real_T, -real_T.sum().clamp(min=1).to(logits_TE.dtype).log(), -torch.inf
    )
    log_v_E = logits_TE.new_zeros(E)
    for _ in range(max_rounds if len(logits_TE) else 0):
        before_E = log_v_E
        log_u_T = log_share_T - torch.logsumexp(logits_TE + log_v_E, dim=-1)
        log_v_E = -math.log(E) - torch.logsumexp(logits_TE + log_u_T.unsqueeze(-1), dim=0)
        log_v_E = torch.where(real_T.any(), log_v_E, 0)
        if tolerance > 0 and (log_v_E - before_E).abs().max() <= tolerance:
            break
    shift = log_v_E.mean()  # u and v are known but for a factor that one can lend the other
    log_v_E = log_v_E - shift
    return log_share_T - torch.logsumexp(logits_TE + log_v_E, dim=-1), log_v_E
