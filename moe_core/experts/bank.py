"""Experts: a bank of E (gated) MLPs, and the dense MLP they are made after."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast_dtype, no_autocast
from ..dispatch import DispatchPlan
from ..parallel import ExpertShard
from ..routing import Routing
from ..validate import between, boolean, one_of, whole
from .activations import Activation
from .backends import BACKENDS as RUNS
from .backends import Bank, choose, run

BACKENDS = ("auto", *RUNS)


@dataclass(frozen=True, kw_only=True)
class MLPOptions:
    """What an expert is made of besides its size: the options of ``FeedForward`` and ``Experts``.

    Attributes:
        activation, glu, glu_limit, up_offset: see ``Activation``; gated means three matrices.
        bias: both products add a bias.
        dropout: in training, the probability with which a hidden value is set to 0.

    Raises ValueError where an option is out of its range.
    """

    activation: str = "silu"
    glu: bool = True
    bias: bool = False
    glu_limit: float | None = None
    up_offset: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        self.act()  # checks the four
        boolean(bias=self.bias)
        between(0.0, 1.0, dropout=self.dropout)

    def act(self) -> Activation:
        """What stands between the two matrices."""
        return Activation(self.activation, self.glu, self.glu_limit, self.up_offset)


class FeedForward(nn.Module):
    """One dense MLP, y = down(act(gate(x)) * up(x)): what an expert is, when there is only one.

    ``options`` are those of ``MLPOptions``.
    """

    def __init__(self, d_model: int, d_ff: int, **options):
        super().__init__()
        whole(1, d_model=d_model, d_ff=d_ff)
        mlp = MLPOptions(**options)
        self.act, self.dropout = mlp.act(), mlp.dropout
        self.activation, self.glu = mlp.activation, mlp.glu
        self.gate_up_proj = nn.Linear(d_model, d_ff * (2 if mlp.glu else 1), bias=mlp.bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=mlp.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = self.act(self.gate_up_proj(x))
        return self.down_proj(F.dropout(hidden, self.dropout, self.training))


class Experts(nn.Module):
    r"""E MLPs of the same shape; each row goes through the one its routing names.

    .. math:: f_e(x) = W^{down}_e \big(\mathrm{act}(W^{gate}_e x) \odot W^{up}_e x\big)

    Weights lie as the ecosystem keeps them: ``gate_up_proj`` (E, 2F, D) as [gate; up], or (E, F, D)
    without a gate, and ``down_proj`` (E, D, F); with ``bias`` also ``gate_up_bias`` (E, 2F) or (E,
    F), and ``down_bias`` (E, D), else None. ``owned`` are this bank's experts, by number.

    Args:
        d_model, d_ff, n_experts: D, F and E.
        drop_path: in training, the probability with which a sequence skips all experts; outputs of
            the others are scaled by 1 / (1 - drop_path). Huang et al. 2016, stochastic depth.
        ep_size: number of ranks the experts are spread over. This bank then holds E/R experts, and
            forward sends each row to the rank that holds its expert.
        backend: "loop" (clear, the reference), "padded", "grouped" (torch's grouped matmul),
            "fused", or "auto", which picks one. All give the same numbers.
        shard: which experts these are, and how to reach the others. None with ep_size > 1: experts
            in their order, over all processes of torch.distributed.
        n_routed: the experts that a routing is over, where some compute without this bank; None: E.
        options: those of ``MLPOptions``.

    Raises ValueError where an argument is out of its range, or ep_size does not fit E, shard or
    processes; RuntimeError where it needs torch.distributed, which is not initialised.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        *,
        drop_path: float = 0.0,
        ep_size: int = 1,
        backend: str = "auto",
        shard: ExpertShard | None = None,
        n_routed: int | None = None,
        **options,
    ):
        super().__init__()
        whole(1, d_model=d_model, d_ff=d_ff, n_experts=n_experts, ep_size=ep_size)
        one_of(BACKENDS, backend=backend)
        between(0.0, 1.0, drop_path=drop_path)
        mlp = MLPOptions(**options)
        if shard is None and ep_size > 1:
            shard = ExpertShard.of_this_process(n_experts, ep_size)
        if shard is not None:
            shard.require(n_experts, ep_size)
            # The host reads how many rows go where: nothing to compile.
            self.exchange_rows = torch.compiler.disable(shard.run)
        self.d_model, self.d_ff, self.n_experts, self.shard = d_model, d_ff, n_experts, shard
        self.n_routed = n_experts if n_routed is None else n_routed
        self.owned = tuple(range(n_experts)) if shard is None else shard.owned
        self.act, self.activation, self.glu = mlp.act(), mlp.activation, mlp.glu
        self.dropout, self.drop_path, self.backend = mlp.dropout, drop_path, backend
        width, n_owned, bias = d_ff * (2 if mlp.glu else 1), len(self.owned), mlp.bias
        self.gate_up_proj = nn.Parameter(torch.empty(n_owned, width, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_owned, d_model, d_ff))
        self.gate_up_bias = nn.Parameter(torch.empty(n_owned, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(n_owned, d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert as nn.Linear draws its own: uniform in +-1/sqrt(fan in)."""
        layers = (self.gate_up_proj, self.gate_up_bias), (self.down_proj, self.down_bias)
        for weight, bias in layers:
            bound = 1 / math.sqrt(weight.shape[-1])
            for parameter in (weight, bias):
                if parameter is not None:
                    self.draw(parameter, lambda expert: nn.init.uniform_(expert, -bound, bound))

    @torch.no_grad()
    def draw(self, parameter: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
        """Fill a parameter of this bank expert after expert."""
        # Also those of other ranks, which are not kept: from the same seed every expert has the
        # same weights, on however many ranks.
        for expert in range(self.n_experts):
            drawn = fill(torch.empty_like(parameter[0]))
            if expert in self.owned:
                parameter[self.owned.index(expert)] = drawn

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Run each kept slot of x (B, N, D) through its expert and add up, in x's dtype.

        Exactly 0 for a token without a kept slot. Raises ValueError where x and routing do not fit.
        """
        plan, rows_AD = self.gather(x, routing)
        if self.shard is None:
            places = None if routing.capacity is None else routing.places_per_expert
            out_AD = self.run_rows(rows_AD, plan.counts_E, places)
        else:
            out_AD = self.exchange_rows(self.run_rows, rows_AD, plan.kept_E)
        return self.combine(out_AD, x, plan, routing)

    def gather(self, x: Tensor, routing: Routing) -> tuple[DispatchPlan, Tensor]:
        """The first part of forward: the plan, and the rows (A, D) sorted by expert."""
        tokens, E = routing.expert_indices.shape[:2], routing.scores.shape[-1]
        if x.shape != (*tokens, self.d_model) or E != self.n_routed:
            found = f"x {tuple(x.shape)} and a routing of {tuple(tokens)} tokens to {E} experts"
            sizes = f"d_model={self.d_model}, n_experts={self.n_routed}"
            raise ValueError(f"{found} do not fit {sizes}")
        plan = DispatchPlan(routing, self.n_experts)
        on_input = routing.weights_on == "input"
        return plan, plan.gather(x, routing.expert_weights if on_input else None)

    def combine(self, out_AD: Tensor, x: Tensor, plan: DispatchPlan, routing: Routing) -> Tensor:
        """The last part of forward: the experts' rows, weighted and added up, in x's dtype."""
        weights_BNK = routing.expert_weights
        if routing.weights_on == "input":  # the weight was in the row already
            weights_BNK = torch.ones_like(weights_BNK)
        y = plan.combine(out_AD, weights_BNK).to(x.dtype)
        if self.training and self.drop_path > 0:
            # One draw a sequence: stochastic depth skips the layer for a whole sample.
            stays_B11 = torch.rand(y.shape[0], 1, 1, device=y.device) >= self.drop_path
            y = y * stays_B11.to(y.dtype) / (1 - self.drop_path)
        return y

    def run_rows(
        self,
        rows_AD: Tensor,
        counts_E: Tensor,
        places: int | None = None,
        owned: Sequence[int] | None = None,
    ) -> Tensor:
        """Rows sorted by expert, (A, D), through this bank, to (A, D).

        ``counts_E`` are the rows of each expert; ``places`` is the most one can have, where that is
        known without reading a value; ``owned`` takes only these of the bank, in this order.
        """
        weights = self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias
        if owned is not None:
            weights = [None if weight is None else weight[list(owned)] for weight in weights]
        dtype = autocast_dtype(rows_AD)
        if dtype is not None:  # grouped_mm does not know autocast: cast here
            rows_AD, *weights = (None if t is None else t.to(dtype) for t in (rows_AD, *weights))
        keep_AF = None
        if self.training and self.dropout > 0:
            # Drawn here, so that all backends drop the same values.
            keep_AF = F.dropout(rows_AD.new_ones(rows_AD.shape[0], self.d_ff), self.dropout)
        inputs = rows_AD, counts_E, Bank(*weights, self.act), keep_AF, places
        if dtype is None:
            return run(self.backend, *inputs)
        with no_autocast(rows_AD):
            return run(self.backend, *inputs)

    def choose_backend(
        self, rows_AD: Tensor, places: int | None = None, n_experts: int | None = None
    ) -> tuple[str, str]:
        """The backend that will run these rows, and why."""
        if self.backend != "auto":  # not second-guessed: where "grouped" cannot go, torch says why
            return self.backend, "asked for"
        return choose(rows_AD, n_experts or len(self.owned), self.d_ff, places)
