"""Experts: a bank of E (gated) MLPs, and the dense MLP they are made after."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import ACTIVATIONS, Activation
from .backends import BACKENDS as _BACKENDS
from .backends import Bank, choose
from ._autocast import autocast_dtype, no_autocast
from ._validate import between, boolean, one_of, whole
from .dispatch import DispatchPlan
from .routing import Routing

BACKENDS = ("auto", *_BACKENDS)

__all__ = ["ACTIVATIONS", "BACKENDS", "Experts", "FeedForward"]


class FeedForward(nn.Module):
    """One dense MLP, y = down(act(gate(x)) * up(x)): what an expert is, when there is only one.

    Args:
        d_model, d_ff: D and F.
        activation, glu, glu_limit, up_offset: see ``Activation``; gated means three matrices, else two.
        bias: both products add a bias.
        dropout: probability with which a hidden value is set to 0 in training.

    Raises:
        ValueError: a size is not a positive whole number, or an option is out of its range.
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "silu", glu: bool = True, bias: bool = False,
                 glu_limit: float | None = None, up_offset: float = 0.0, dropout: float = 0.0):
        super().__init__()
        whole(1, d_model=d_model, d_ff=d_ff)
        boolean(bias=bias)
        between(0.0, 1.0, dropout=dropout)
        self.act, self.dropout = Activation(activation, glu, glu_limit, up_offset), dropout
        self.activation, self.glu = activation, glu
        self.gate_up_proj = nn.Linear(d_model, d_ff * (2 if glu else 1), bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = self.act(self.gate_up_proj(x))
        return self.down_proj(F.dropout(hidden, self.dropout, self.training))


class Experts(nn.Module):
    r"""E MLPs of the same shape; each row goes through the one its routing names.

    .. math:: f_e(x) = W^{down}_e \big(\mathrm{act}(W^{gate}_e x) \odot W^{up}_e x\big)

    Weights lie as the ecosystem keeps them: ``gate_up_proj`` (E, 2F, D) as [gate; up], or (E, F, D) without a gate, and
    ``down_proj`` (E, D, F); with ``bias`` also ``gate_up_bias`` (E, 2F) or (E, F), and ``down_bias`` (E, D), else these are None.

    Args:
        d_model, d_ff, n_experts: D, F and E.
        activation, glu, glu_limit, up_offset: see ``Activation``. gpt-oss: "quick_gelu", True, 7.0, 1.0.
        bias: both products add a bias.
        dropout: probability with which a hidden value is set to 0 in training; the others are scaled by 1 / (1 - dropout).
        drop_path: in training, the probability with which a sequence skips all experts (its output is 0; the others are
            scaled by 1 / (1 - drop_path)). Huang et al. 2016, stochastic depth.
        ep_size: number of ranks the experts are spread over; one process holds all experts, so 1.
        backend: "loop" (clear, the reference), "padded", "grouped" (torch's grouped matmul), "fused", or "auto", which picks one:
            see ``backends`` and ``choose_backend``. All give the same numbers.

    Raises:
        ValueError: a size is not a positive whole number, an option is out of its range, or ep_size is not 1.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, *, activation: str = "silu", glu: bool = True, bias: bool = False,
                 glu_limit: float | None = None, up_offset: float = 0.0, dropout: float = 0.0, drop_path: float = 0.0, ep_size: int = 1,
                 backend: str = "auto"):
        super().__init__()
        whole(1, d_model=d_model, d_ff=d_ff, n_experts=n_experts)
        one_of(BACKENDS, backend=backend)
        boolean(bias=bias)
        between(0.0, 1.0, dropout=dropout, drop_path=drop_path)
        if ep_size != 1:
            raise ValueError(f"ep_size={ep_size!r} must be 1: all experts live in one process")
        self.d_model, self.d_ff, self.n_experts = d_model, d_ff, n_experts
        self.act = Activation(activation, glu, glu_limit, up_offset)
        self.activation, self.glu = activation, glu
        self.dropout, self.drop_path, self.backend = dropout, drop_path, backend
        width = d_ff * (2 if glu else 1)
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.gate_up_bias = nn.Parameter(torch.empty(n_experts, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(n_experts, d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's weights (and biases) as nn.Linear draws its own: uniform in +-1/sqrt(fan in)."""
        for weight, bias in ((self.gate_up_proj, self.gate_up_bias), (self.down_proj, self.down_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Run every kept slot through its expert and add the results up.

        Args:
            x: (B, N, D) tokens.
            routing: for the same B and N.

        Returns:
            (B, N, D) in x's dtype; exactly 0 for a token none of whose slots is kept.

        Raises:
            ValueError: x and routing do not belong together.
        """
        if x.shape != (*routing.expert_indices.shape[:2], self.d_model) or routing.n_experts != self.n_experts:
            raise ValueError(
                f"x {tuple(x.shape)} and a routing of {tuple(routing.expert_indices.shape[:2])} tokens to {routing.n_experts} "
                f"experts do not fit d_model={self.d_model}, n_experts={self.n_experts}"
            )
        plan = DispatchPlan(routing)
        before, after = None, routing.expert_weights
        if routing.weights_on == "input":
            before, after = after, torch.ones_like(after)
        capacity = routing.capacity
        if capacity is not None and routing.capacity_scope == "sequence":
            capacity *= x.shape[0]
        y = plan.combine(self.run_rows(plan.gather(x, before), plan.counts_E, capacity), after).to(x.dtype)
        if self.training and self.drop_path > 0:
            stays_B11 = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
            y = y * stays_B11.to(y.dtype) / (1 - self.drop_path)
        return y

    def run_rows(self, rows_AD: Tensor, counts_E: Tensor, capacity: int | None = None) -> Tensor:
        """Rows sorted by expert, (A, D) with ``counts_E`` rows each (their sum is A), to (A, D).

        ``capacity``: the most rows an expert can have, where that is known without reading a value.
        """
        weights, dtype = (self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias), autocast_dtype(rows_AD)
        if dtype is not None:  # grouped_mm does not know autocast: cast here
            rows_AD, *weights = (None if t is None else t.to(dtype) for t in (rows_AD, *weights))
        keep_AF = None
        if self.training and self.dropout > 0:
            keep_AF = F.dropout(rows_AD.new_ones(len(rows_AD), self.d_ff), self.dropout)
        with no_autocast(rows_AD):
            run = _BACKENDS[self.choose_backend(rows_AD, capacity)[0]]
            return run(rows_AD, counts_E, Bank(*weights, self.act), keep_AF, capacity)

    def choose_backend(self, rows_AD: Tensor, capacity: int | None = None) -> tuple[str, str]:
        """The backend that will run these rows, and why.

        An explicit backend is not second-guessed: where "grouped" cannot go, it gets torch's own error.
        """
        if self.backend != "auto":
            return self.backend, "asked for"
        return choose(rows_AD, self.n_experts, self.d_ff, capacity)
