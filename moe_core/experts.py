"""Experts: a bank of E (gated) MLPs, and the dense MLP they are made after."""

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._validate import between, boolean, one_of, whole
from .dispatch import DispatchPlan
from .routing import Routing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),  # So et al. 2021, Primer
}
BACKENDS = ("auto", "loop", "grouped")


def _hidden(projected: Tensor, activation: str, glu: bool) -> Tensor:
    """(..., 2F) as [gate; up] when gated, else (..., F), to (..., F)."""
    if not glu:
        return ACTIVATIONS[activation](projected)
    gate, up = projected.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


class FeedForward(nn.Module):
    """One dense MLP, y = down(act(gate(x)) * up(x)): what an expert is, when there is only one.

    Args:
        d_model, d_ff: D and F.
        activation: "silu", "gelu", "relu" or "relu2" (squared ReLU).
        glu: gated (three matrices, Shazeer 2020, arXiv 2002.05202) or not (two).
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "silu", glu: bool = True):
        super().__init__()
        whole(1, d_model=d_model, d_ff=d_ff)
        one_of(ACTIVATIONS, activation=activation)
        boolean(glu=glu)
        self.activation, self.glu = activation, glu
        self.gate_up_proj = nn.Linear(d_model, d_ff * (2 if glu else 1), bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(_hidden(self.gate_up_proj(x), self.activation, self.glu))


class Experts(nn.Module):
    r"""E MLPs of the same shape; each row goes through the one its routing names.

    .. math:: f_e(x) = W^{down}_e \big(\mathrm{act}(W^{gate}_e x) \odot W^{up}_e x\big)

    Weights lie as the ecosystem keeps them: ``gate_up_proj`` (E, 2F, D) as [gate; up], or (E, F, D) without a gate, and
    ``down_proj`` (E, D, F).

    Args:
        d_model, d_ff, n_experts: D, F and E.
        activation: "silu", "gelu", "relu" or "relu2".
        glu: gated or not.
        drop_path: in training, the probability with which a sequence skips all experts (its output is 0; the others are
            scaled by 1 / (1 - drop_path)). Huang et al. 2016, stochastic depth.
        ep_size: number of ranks the experts are spread over; one process holds all experts, so 1.
        backend: "loop" (clear, any dtype, the reference), "grouped" (torch's grouped matmul) or "auto".

    Raises:
        ValueError: a size is not a positive whole number, an option is unknown, or ep_size is not 1.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, *, activation: str = "silu", glu: bool = True,
                 drop_path: float = 0.0, ep_size: int = 1, backend: str = "auto"):
        super().__init__()
        whole(1, d_model=d_model, d_ff=d_ff, n_experts=n_experts)
        one_of(ACTIVATIONS, activation=activation)
        one_of(BACKENDS, backend=backend)
        boolean(glu=glu)
        between(0.0, 1.0, drop_path=drop_path)
        if ep_size != 1:
            raise ValueError(f"ep_size={ep_size!r} must be 1: all experts live in one process")
        self.d_model, self.d_ff, self.n_experts = d_model, d_ff, n_experts
        self.activation, self.glu, self.drop_path, self.backend = activation, glu, drop_path, backend
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, d_ff * (2 if glu else 1), d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's weights as nn.Linear draws its own: uniform in +-1/sqrt(fan in)."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

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
        y = plan.combine(self.run_rows(plan.gather(x, before), plan.counts_E), after).to(x.dtype)
        if self.training and self.drop_path > 0:
            stays_B11 = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
            y = y * stays_B11.to(y.dtype) / (1 - self.drop_path)
        return y

    def run_rows(self, rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, (A, D) with ``counts_E`` rows each, to (A, D)."""
        gate_up_proj, down_proj, device = self.gate_up_proj, self.down_proj, rows_AD.device.type
        if torch.is_autocast_enabled(device) and rows_AD.dtype != torch.float64:  # grouped_mm does not know autocast: cast here
            dtype = torch.get_autocast_dtype(device)
            rows_AD, gate_up_proj, down_proj = rows_AD.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
        if self.choose_backend(rows_AD) == "grouped":
            ends_E = counts_E.cumsum(0).to(torch.int32)
            hidden = F.grouped_mm(rows_AD, gate_up_proj.transpose(-2, -1), offs=ends_E)
            hidden = _hidden(hidden, self.activation, self.glu)
            return F.grouped_mm(hidden, down_proj.transpose(-2, -1), offs=ends_E)
        # unbind once: indexing the bank inside the loop would build a zero gradient of the whole bank for every expert.
        # No expert is skipped: one without rows then has a gradient of zeros and not None.
        outputs = []
        for rows, gate_up, down in zip(rows_AD.split(counts_E.tolist()), gate_up_proj.unbind(0), down_proj.unbind(0)):
            outputs.append(_hidden(rows @ gate_up.T, self.activation, self.glu) @ down.T)
        return torch.cat(outputs)

    def choose_backend(self, rows_AD: Tensor) -> str:
        """The backend that will run these rows: "loop" or "grouped".

        grouped_mm knows float32, float16 and bfloat16, and wants every row to start at a multiple of 16 bytes. ("auto" falls
        back to the loop otherwise; an explicit "grouped" gets torch's own error.)
        """
        if self.backend != "auto":
            return self.backend
        known = rows_AD.dtype in (torch.float32, torch.float16, torch.bfloat16)
        aligned = all(size * rows_AD.element_size() % 16 == 0 for size in (self.d_model, self.d_ff))
        return "grouped" if known and aligned else "loop"
