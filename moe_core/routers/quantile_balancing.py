"""QuantileBalancingRouter: top-k with a bias per expert that is solved for, not stepped towards."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capacity import CapacityRule
from ..ranks import sum_over_ranks
from ..routing import Routing
from ..validate import between, boolean, one_of, top_k_fits, whole
from .base import Router


class QuantileBalancingRouter(Router):
    r"""Quantile balancing: K experts per token by biased score, with the bias that would have balanced the last step's tokens.

    .. math:: e_1..e_K = \mathrm{topk}(s - \beta), \qquad
              \alpha_t \leftarrow (K{+}1)\text{-th largest of } s_t - \beta, \quad
              \beta_e \leftarrow \text{the } \big(\tfrac{TK}{E}{+}1\big)\text{-th largest of } \{s_{t,e} - \alpha_t\}_t, \quad
              \beta \leftarrow \beta - \mathrm{mean}(\beta)

    alpha is what a token asks of an expert, beta what an expert asks of a token: prices of the linear programme "best total score
    with K experts per token and TK/E tokens per expert", lowered by turns. Only beta is kept. It changes the choice, never a
    weight, and carries no gradient.

    Forward uses the beta of earlier steps, in training and in eval alike, and never changes it: a token's route depends on that
    token alone, so the router is causal.

    Args:
        d_model, n_experts, top_k: D, E and K. With K = E there is nothing to balance, and beta stays 0.
        score_func: "sigmoid" or "softmax": the s above.
        norm_topk_prob: the K weights sum to 1; with K = 1 they are then always 1, and no gradient reaches the router.
        ema_decay: beta <- ema_decay * beta + (1 - ema_decay) * new. 0 keeps no memory, the published default.
        n_alternations: how often alpha and beta take turns in one update; 1 as in training codes, since every step goes on from the
            last.
        capacity_factor, z_loss_weight, jitter_noise: see ``Router``. There is no balance loss: beta does its work.

    Attributes:
        beta: (E,) float32, a state_dict buffer that only ``update`` changes. Zeros at first: plain top-k.

    Raises:
        ValueError: an argument is out of range.

    Source: Su 2026, kexue.fm/archives/11619; one update per optimiser step, EMA and centring as in Megatron-LM PR 5349. Scores
    rather than logits are balanced, as in Kimi K3 (torchtitan PR 4577).
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        score_func: str = "sigmoid",
        norm_topk_prob: bool = True,
        ema_decay: float = 0.0,
        n_alternations: int = 1,
        capacity_factor: float | CapacityRule | None = None,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        top_k_fits(top_k, n_experts)
        one_of(("sigmoid", "softmax"), score_func=score_func)
        boolean(norm_topk_prob=norm_topk_prob)
        between(0.0, 1.0, ema_decay=ema_decay)
        whole(1, n_alternations=n_alternations)
        super().__init__(
            d_model,
            n_experts,
            capacity_factor=capacity_factor,
            z_loss_weight=z_loss_weight,
            jitter_noise=jitter_noise,
        )
        self.top_k, self.score_func, self.norm_topk_prob = top_k, score_func, norm_topk_prob
        self.ema_decay, self.n_alternations = ema_decay, n_alternations
        self.register_buffer("beta", torch.zeros(n_experts))

    def reset_parameters(self) -> None:
        """Draw the weight anew and forget the bias."""
        super().reset_parameters()
        for buffer in self.buffers():  # none yet when the base class calls this first
            buffer.zero_()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K slots per token, the highest biased score first.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        log_scores_BNE = (
            F.logsigmoid(logits_BNE)
            if self.score_func == "sigmoid"
            else F.log_softmax(logits_BNE, dim=-1)
        )
        scores_BNE = (
            logits_BNE.sigmoid() if self.score_func == "sigmoid" else logits_BNE.softmax(-1)
        )
        indices_BNK = (scores_BNE.detach() - self.beta).topk(self.top_k, dim=-1).indices
        if (
            self.norm_topk_prob
        ):  # s / sum of the K chosen, in logarithms: scores that underflow to 0 still have a ratio
            weights_BNK = log_scores_BNE.gather(-1, indices_BNK).softmax(-1)
        else:
            weights_BNK = scores_BNE.gather(-1, indices_BNK)
        return self.route(
            indices_BNK,
            weights_BNK,
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
            normalized=self.norm_topk_prob,
        )

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Solve for beta once, on the tokens of all these micro-batches together; call it on every rank, once per optimiser step.

        Ranks solve for themselves and average by their numbers of tokens. Without a real token beta stays.
        """
        if self.top_k == self.n_experts:
            return
        totals = self.beta.new_zeros(self.n_experts + 1)
        if sum(routing.real_tokens.numel() for routing in routings):
            scores_TE = torch.cat([routing.scores.flatten(0, 1) for routing in routings])
            real_T = torch.cat([routing.real_tokens.flatten() for routing in routings])
            beta_E, n_real = self.beta, real_T.sum()
            for _ in range(self.n_alternations):
                beta_E = balancing_bias(scores_TE, real_T, self.top_k, beta_E)
            totals = torch.where(n_real > 0, torch.cat([beta_E, beta_E.new_ones(1)]) * n_real, 0)
        totals = sum_over_ranks(totals)
        new_E = self.ema_decay * self.beta + (1 - self.ema_decay) * totals[:-1] / totals[-1].clamp(
            min=1
        )
        self.beta.copy_(torch.where(totals[-1] > 0, new_E, self.beta))


def balancing_bias(scores_TE: Tensor, real_T: Tensor, top_k: int, beta_E: Tensor) -> Tensor:
    """One turn of alpha, then beta, as in the formula above; K < E. No tensor is read. Padding has no say."""
    T, E = scores_TE.shape
    if T == 0:
        return beta_E
    alpha_T1 = (scores_TE - beta_E).topk(top_k + 1, dim=-1).values[:, -1:]
    share = (real_T.sum() * top_k // E).clamp(max=T - 1)
    asked_TE = (scores_TE - alpha_T1).masked_fill(~real_T.unsqueeze(-1), -torch.inf)
    beta_E = asked_TE.sort(dim=0, descending=True).values.index_select(0, share.view(1)).squeeze(0)
    return beta_E - beta_E.mean()
