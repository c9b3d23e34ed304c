"""Experts: a bank of E (gated) MLPs, and the dense MLP they are made after."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast_dtype, no_autocast
from ..dispatch import DispatchPlan
from ..parallel.exchange import TorchExchange
from ..parallel.expert_parallel import ExpertShard, run_rows
from ..parallel.placement import contiguous
from ..routing import Routing
from ..validate import between, boolean, one_of, whole
from .activations import ACTIVATIONS, Activation
from .backends import BACKENDS as _BACKENDS
from .backends import Bank, choose

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

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "silu",
        glu: bool = True,
        bias: bool = False,
        glu_limit: float | None = None,
        up_offset: float = 0.0,
        dropout: float = 0.0,
    ):
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
        ep_size: number of ranks the experts are spread over (expert parallelism). This bank then holds E/R experts, and forward
            sends each row to the rank that holds its expert. Between which ranks: see ``shard``.
        backend: "loop" (clear, the reference), "padded", "grouped" (torch's grouped matmul), "fused", or "auto", which picks one:
            see ``backends`` and ``choose_backend``. All give the same numbers.
        shard: which experts these are, and how to reach the others: ``parallel.ExpertShard``. None with ep_size > 1: experts in
            their order, over all processes of torch.distributed.

    Attributes:
        owned: the experts of this bank, by number; all E of them where ep_size is 1.

    Raises:
        ValueError: a size is not a positive whole number, an option is out of its range, or ep_size does not divide n_experts or
            does not fit the shard or the processes.
        RuntimeError: ep_size > 1 without a shard, and torch.distributed has not been initialised.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        *,
        activation: str = "silu",
        glu: bool = True,
        bias: bool = False,
        glu_limit: float | None = None,
        up_offset: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        ep_size: int = 1,
        backend: str = "auto",
        shard: ExpertShard | None = None,
    ):
        super().__init__()
        whole(1, d_model=d_model, d_ff=d_ff, n_experts=n_experts, ep_size=ep_size)
        one_of(BACKENDS, backend=backend)
        boolean(bias=bias)
        between(0.0, 1.0, dropout=dropout, drop_path=drop_path)
        if shard is None and ep_size > 1:
            exchange, placement = TorchExchange(), contiguous(n_experts, ep_size)
            if exchange.n_ranks != ep_size:
                raise ValueError(
                    f"ep_size={ep_size} must be the number of processes, {exchange.n_ranks}, where no shard says which of them"
                )
            shard = ExpertShard(placement, exchange.rank, exchange)
        if shard is not None and (shard.placement.n_ranks, shard.placement.n_experts) != (
            ep_size,
            n_experts,
        ):
            raise ValueError(
                f"ep_size={ep_size} and n_experts={n_experts} must be those of the shard's placement: "
                f"{shard.placement.n_ranks} ranks, {shard.placement.n_experts} experts"
            )
        self.d_model, self.d_ff, self.n_experts, self.shard = d_model, d_ff, n_experts, shard
        self.owned = tuple(range(n_experts)) if shard is None else shard.owned
        self.act = Activation(activation, glu, glu_limit, up_offset)
        self.activation, self.glu = activation, glu
        self.dropout, self.drop_path, self.backend = dropout, drop_path, backend
        width, n_owned = d_ff * (2 if glu else 1), len(self.owned)
        self.gate_up_proj = nn.Parameter(torch.empty(n_owned, width, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_owned, d_model, d_ff))
        self.gate_up_bias = nn.Parameter(torch.empty(n_owned, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(n_owned, d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's weights (and biases) as nn.Linear draws its own: uniform in +-1/sqrt(fan in)."""
        for weight, bias in (
            (self.gate_up_proj, self.gate_up_bias),
            (self.down_proj, self.down_bias),
        ):
            bound = 1 / math.sqrt(weight.shape[-1])
            for parameter in (weight, bias):
                if parameter is not None:
                    self.draw(parameter, lambda expert: nn.init.uniform_(expert, -bound, bound))

    @torch.no_grad()
    def draw(self, parameter: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
        """Fill a parameter of this bank expert after expert, also those of other ranks, which are not kept: from the same seed
        every expert has the same weights, on however many ranks."""
        for expert in range(self.n_experts):
            drawn = fill(torch.empty_like(parameter[0]))
            if expert in self.owned:
                parameter[self.owned.index(expert)] = drawn

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
        plan, rows_AD = self.gather(x, routing)
        if self.shard is None:
            out_AD = self.run_rows(rows_AD, plan.counts_E, self.most_rows(routing))
        elif self.shard.exchange is None:
            raise ValueError(
                "shard.exchange=None: these experts cannot be reached from other ranks; see parallel.simulate"
            )
        else:
            [out_AD] = run_rows(
                [rows_AD],
                [routing.tokens_per_expert],
                [self.run_rows],
                self.shard.exchange,
                self.shard.placement,
            )
        return self.combine(out_AD, x, plan, routing)

    def gather(self, x: Tensor, routing: Routing) -> tuple[DispatchPlan, Tensor]:
        """The first part of forward: the plan, and the rows (A, D) sorted by expert."""
        if (
            x.shape != (*routing.expert_indices.shape[:2], self.d_model)
            or routing.n_experts != self.n_experts
        ):
            raise ValueError(
                f"x {tuple(x.shape)} and a routing of {tuple(routing.expert_indices.shape[:2])} tokens to {routing.n_experts} "
                f"experts do not fit d_model={self.d_model}, n_experts={self.n_experts}"
            )
        plan = DispatchPlan(routing)
        return plan, plan.gather(
            x, routing.expert_weights if routing.weights_on == "input" else None
        )

    def combine(self, out_AD: Tensor, x: Tensor, plan: DispatchPlan, routing: Routing) -> Tensor:
        """The last part of forward: what the experts made of the rows, weighted and added up, (B, N, D) in x's dtype."""
        weights = routing.expert_weights
        y = plan.combine(
            out_AD, torch.ones_like(weights) if routing.weights_on == "input" else weights
        ).to(x.dtype)
        if self.training and self.drop_path > 0:
            stays_B11 = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
            y = y * stays_B11.to(y.dtype) / (1 - self.drop_path)
        return y

    @staticmethod
    def most_rows(routing: Routing) -> int | None:
        """The most rows one expert can have, where the routing says so without reading a value."""
        if routing.capacity is None or routing.capacity_scope == "batch":
            return routing.capacity
        return routing.capacity * len(routing.expert_indices)

    def run_rows(
        self,
        rows_AD: Tensor,
        counts_E: Tensor,
        capacity: int | None = None,
        owned: Sequence[int] | None = None,
    ) -> Tensor:
        """Rows sorted by expert, (A, D) with ``counts_E`` rows for each expert of this bank (their sum is A), to (A, D).

        ``capacity``: the most rows an expert can have, where that is known without reading a value. ``owned``: only these of the
        bank's experts, in this order (a simulated rank).
        """
        weights, dtype = (
            (self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias),
            autocast_dtype(rows_AD),
        )
        if owned is not None:
            weights = tuple(None if weight is None else weight[list(owned)] for weight in weights)
        if dtype is not None:  # grouped_mm does not know autocast: cast here
            rows_AD, *weights = (None if t is None else t.to(dtype) for t in (rows_AD, *weights))
        keep_AF = None
        if self.training and self.dropout > 0:
            keep_AF = F.dropout(rows_AD.new_ones(len(rows_AD), self.d_ff), self.dropout)
        with no_autocast(rows_AD):
            run = _BACKENDS[self.choose_backend(rows_AD, capacity, len(weights[0]))[0]]
            return run(rows_AD, counts_E, Bank(*weights, self.act), keep_AF, capacity)

    def choose_backend(
        self, rows_AD: Tensor, capacity: int | None = None, n_experts: int | None = None
    ) -> tuple[str, str]:
        """The backend that will run these rows, and why; ``n_experts`` where it is not the whole bank.

        An explicit backend is not second-guessed: where "grouped" cannot go, it gets torch's own error.
        """
        if self.backend != "auto":
            return self.backend, "asked for"
        return choose(rows_AD, n_experts or len(self.owned), self.d_ff, capacity)
