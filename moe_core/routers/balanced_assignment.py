"""BalancedAssignmentRouter (BASE): the best assignment that gives every expert equally many."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..routing import Routing
from .base import Router, RouterOptions, checked_padding_mask
from .quantile_balancing import balancing_bias

_FIXED = ("capacity_factor", "aux_loss_weight", "top_k")


@dataclass(frozen=True)
class BalancedAssignmentOptions(RouterOptions, fixed=_FIXED):
    """The arguments of ``BalancedAssignmentRouter``."""

    top_k: int = 1


class BalancedAssignmentRouter(Router):
    r"""BASE layers: one expert per token; in training a balanced assignment, solved exactly.

    .. math:: \max_{a} \sum_t h_{t, a_t} \; \text{s.t. every expert has the same number of tokens},
              \quad w_t = \sigma(h_{t, a_t})

    Every expert gets T/E of the T real tokens; at most T/E rounded up where E does not divide T. In
    training a token's route depends on the whole batch, later tokens included, and the assignment
    is solved on the CPU, which synchronises. Eval takes each token's best expert: causal, and not
    balanced. Weights start orthogonal, with gain 0.1, as the published centroids.

    The published layer is y = w f(x) + (1 - w) x with an f that ends in its own residual, f(x) = x
    + g(x); that is x + w g(x), our weight and the caller's residual connection.
    Source: Lewis et al. 2021 (arXiv 2103.16716), section 3, and its code in fairseq (an auction
    there, shortest paths here: the same optimum), without shuffling tokens across workers.
    """

    Options = BalancedAssignmentOptions
    prescribes_start = True

    @torch.no_grad()
    def reset_weight(self) -> None:
        """Draw orthogonal rows of length 0.1."""
        # In float32 at least: there is no QR decomposition in bfloat16.
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        self.weight.copy_(nn.init.orthogonal_(weight, gain=0.1))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens; raises ValueError where in training a logit is not finite."""
        logits_BNE = self.logits(x)
        indices_BN = logits_BNE.argmax(-1)
        if self.training:
            real_BN = checked_padding_mask(padding_mask, x)
            indices_BN[real_BN] = balanced_assignment(logits_BNE[real_BN]).to(x.device)
        scores_BNE, indices_BN1 = logits_BNE.sigmoid(), indices_BN.unsqueeze(-1)
        weights_BN1 = scores_BNE.gather(-1, indices_BN1)
        routing = self.routing(indices_BN1, weights_BN1, logits_BNE, scores_BNE, padding_mask)
        return self.add_losses(routing)  # no capacity: the balance is exact


@torch.no_grad()
def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """(T,) int64 on the CPU: the experts with the largest sum of scores, at most ceil(T/E) each.

    Raises ValueError where a score is not finite.
    Source: successive shortest paths, Ahuja, Magnanti and Orlin 1993, Network Flows, section 9.7.
    """
    T, E = scores_TE.shape
    scores_TE = scores_TE.detach().to("cpu", torch.float64)
    if not bool(scores_TE.isfinite().all()):
        raise ValueError("scores hold NaN or infinity")
    places = -(-T // E)
    # Rows of zeros cost the same everywhere: they take the room that is left over.
    scores_RE = torch.cat([scores_TE, scores_TE.new_zeros(places * E - T, E)])
    # Start with each token's best expert after a bias per expert that nearly balances them: optimal
    # for the loads it happens to give.
    bias_E, all_R = scores_RE.new_zeros(E), torch.ones(len(scores_RE), dtype=torch.bool)
    if E > 1:
        for _ in range(20):
            bias_E = balancing_bias(scores_RE, all_R, 1, bias_E)
    expert_R = (scores_RE - bias_E).argmax(-1)
    load_E = torch.zeros(E, dtype=torch.int64).scatter_add_(0, expert_R, torch.ones_like(expert_R))
    # While an expert has too many tokens, move one along the cheapest chain of experts (token 1
    # from a to b, token 2 from b to c, ...) to one with room. The assignment stays optimal for its
    # new loads, with one token less in the wrong place: at most T chains end with the optimum.
    while bool((load_E > places).any()):
        # What moving this token there would lose.
        loss_RE = scores_RE.gather(1, expert_R.unsqueeze(1)) - scores_RE
        edge_EE = torch.full((E, E), torch.inf, dtype=torch.float64)
        edge_EE.scatter_reduce_(0, expert_R.unsqueeze(1).expand(-1, E), loss_RE, "amin")
        chain = cheapest_chain(edge_EE, load_E > places, load_E < places)
        moves = []
        for a, b in zip(chain, chain[1:]):
            here_S = (expert_R == a).nonzero().flatten()
            moves.append((here_S[loss_RE[here_S, b].argmin()], b))
        for token, b in moves:
            load_E[expert_R[token]] -= 1
            expert_R[token] = b
            load_E[b] += 1
    return expert_R[:T]


def cheapest_chain(edge_EE: Tensor, start_E: Tensor, end_E: Tensor) -> list[int]:
    """Bellman-Ford: the nodes of the cheapest path from any start to any end."""
    E = len(edge_EE)  # edges may be negative, circles may not
    # Cheaper by no more than rounding is not cheaper, or the search would run in circles.
    rounding = 1e-12 * float(edge_EE[edge_EE.isfinite()].abs().max().clamp(min=1))
    cost_E = torch.where(start_E, 0.0, torch.inf).double()
    came_from_E = torch.full((E,), -1)
    for _ in range(E - 1):
        through_E, via_E = (cost_E.unsqueeze(1) + edge_EE).min(0)
        cheaper_E = through_E < cost_E - rounding
        if not bool(cheaper_E.any()):
            break
        cost_E = torch.where(cheaper_E, through_E, cost_E)
        came_from_E = torch.where(cheaper_E, via_E, came_from_E)
    chain = [int(torch.where(end_E, cost_E, torch.inf).argmin())]
    while int(came_from_E[chain[0]]) >= 0:
        chain.insert(0, int(came_from_E[chain[0]]))
    return chain
