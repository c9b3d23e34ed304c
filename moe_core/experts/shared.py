"""Shared experts: what every token visits besides the experts its router chose."""

import torch
from torch import Tensor, nn

from ..routing import Routing
from ..validate import boolean, one_of, whole
from .bank import FeedForward

COMBINE = ("sum", "mean")


class SharedExperts(FeedForward):
    r"""n experts that every token visits, as one MLP of width n * F: the sum of n of width F.

    .. math:: [\sigma(w \cdot x)] \; \frac{1}{n \text{ or } 1} \sum_{i=1}^{n} f_i(x)

    Args:
        d_model, d_ff, n_shared_experts: D, F (the width of one of them), and n, at least 1.
        gated: multiply by the sigmoid of a learned score of the token (Qwen2-MoE).
        combine: "sum" adds the n outputs up (DeepSeekMoE, arXiv 2401.06066), "mean" divides by n.
        options: those of ``FeedForward``.

    Raises ValueError where an argument is out of its range.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_shared_experts: int = 1,
        *,
        gated: bool = False,
        combine: str = "sum",
        **options,
    ):
        whole(1, d_ff=d_ff, n_shared_experts=n_shared_experts)
        boolean(gated=gated)
        one_of(COMBINE, combine=combine)
        super().__init__(d_model, n_shared_experts * d_ff, **options)
        self.n_shared_experts, self.combine = n_shared_experts, combine
        self.gate = nn.Linear(d_model, 1, bias=False) if gated else None

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """(..., D) -> (..., D); with a routing, also for slots whose overflow is "shared"."""
        y = super().forward(x)
        if self.combine == "mean":
            y = y / self.n_shared_experts
        if self.gate is not None:
            y = torch.sigmoid(self.gate(x)) * y
        # It stands in for the experts that were full, with the weights they would have had.
        if routing is not None and routing.overflow == "shared":
            y = y + (routing.overflow_weight.unsqueeze(-1) * y).to(y.dtype)
        return y
