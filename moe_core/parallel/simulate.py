"""An MoE layer as R ranks would run it, in this process, and what they sent each other."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..routing import Routing
from .exchange import SimulatedExchange, Transfer
from .expert_parallel import run_rows
from .placement import Placement, contiguous


class Traffic(NamedTuple):
    """What one layer's dispatch moved: rows_RR (R, R) int64 from rank s to r, bytes of a row."""

    rows_RR: Tensor
    row_bytes: int

    @property
    def bytes_RR(self) -> Tensor:
        """(R, R) int64, bytes per link of the dispatch; combine sends the transpose."""
        return (self.rows_RR * self.row_bytes).fill_diagonal_(0)  # what stays home uses no link

    @property
    def rows_per_rank(self) -> Tensor:
        """(R,) int64, the rows that the experts of each rank work on."""
        return self.rows_RR.sum(0)

    @property
    def straggler(self) -> int:
        """The rank with most rows, for which all others must wait."""
        return int(self.rows_per_rank.argmax())

    @property
    def imbalance(self) -> float:
        """The straggler's rows over the mean: 1 at perfect balance, and without rows."""
        rows_R = self.rows_per_rank.double()
        return float(rows_R.max() / rows_R.mean()) if rows_R.sum() else 1.0


class Simulation(NamedTuple):
    """For each rank its output (B, N, D) and its Routing, and the Traffic of the dispatch."""

    outputs: list[Tensor]
    routings: list[Routing]
    traffic: Traffic


def simulate(
    moe: nn.Module,
    xs: Sequence[Tensor],
    placement: Placement | None = None,
    *,
    exchange: SimulatedExchange | None = None,
) -> Simulation:
    """Run a whole layer as if its experts were spread over R ranks, each with tokens of its own.

    Gradients reach the parameters of ``moe``, a ``MixtureOfExperts``, as the sum over ranks.

    Args:
        xs: for each of R ranks its tokens (B, N, D); B and N may differ, and be 0.
        placement: who holds which expert; None for ``contiguous``.
        exchange: one whose log is wanted: it then holds every transfer, of the backward pass too.

    Raises ValueError where R and the placement do not fit, or the router reads token ids.
    """
    bank = moe.experts
    placement = placement or contiguous(bank.n_experts, len(xs))
    exchange = exchange or SimulatedExchange(len(xs))
    # Every rank routes its own tokens: a capacity counts for each alone, as between processes.
    routings = [moe.router(x) for x in xs]
    plans, rows = zip(*(bank.gather(x, routing) for x, routing in zip(xs, routings)))
    runs = [partial(bank.run_rows, owned=owned) for owned in placement.experts_of_rank]
    before = len(exchange.transfers)
    outs = run_rows(rows, [plan.kept_E for plan in plans], runs, exchange, placement)
    outputs = [
        moe.add_others(bank.combine(out_AD, x, plan, routing), x, routing)
        for out_AD, x, plan, routing in zip(outs, xs, plans, routings)
    ]
    return Simulation(outputs, routings, _traffic(exchange.transfers[before:], xs[0]))


def _traffic(transfers: Sequence[Transfer], x: Tensor) -> Traffic:
    dispatch = next(transfer for transfer in transfers if transfer.what == "rows")
    row_bytes = x.shape[-1] * x.element_size()
    rows_RR = torch.div(dispatch.bytes_RR, row_bytes, rounding_mode="floor")
    return Traffic(rows_RR, row_bytes)
