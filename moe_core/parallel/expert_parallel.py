"""Expert parallelism: the rows of every rank go to the ranks that hold their experts, through them, and back.

Written once over an ``Exchange``: lists have one entry for each rank that lives in this process. The steps are

    rows sorted by expert -> sorted by owner -> [counts exchanged, read once] -> [rows exchanged], rank after rank
    -> expert after expert -> through this rank's experts -> and all the way back

Source: Lepikhin et al. 2020 (GShard, arXiv 2006.16668), section 3, for experts spread over devices with an all-to-all on both sides.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .exchange import Exchange
from .placement import Placement

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ExpertShard(NamedTuple):
    """One rank's part of the experts: who holds what, which rank this is, and how to reach the others (None: it cannot)."""

    placement: Placement
    rank: int
    exchange: Exchange | None = None

    @property
    def owned(self) -> tuple[int, ...]:
        """The experts of this rank, in the order of its bank."""
        return self.placement.experts_of_rank[self.rank]


RunRows = Callable[
    [Tensor, Tensor], Tensor
]  # (rows (A, D) sorted by expert, counts (P,)) -> (A, D)


@torch.compiler.disable(reason="the host reads how many rows go where")
def run_rows(
    rows: Sequence[Tensor],
    counts: Sequence[Tensor],
    experts: Sequence[RunRows],
    exchange: Exchange,
    placement: Placement,
) -> list[Tensor]:
    """Run rows through experts that live on other ranks.

    Args:
        rows: for each rank here (A, D), sorted by expert. Rows beyond the sum of the counts stay at home and come back as zeros.
        counts: for each rank here (E,) int64, its rows for each expert.
        experts: for each rank here what runs rows through its bank of P experts.
        exchange, placement: R ranks both. With copies of an expert a rank's rows for it are dealt out to them in turn.

    Returns:
        For each rank here (A, D), in the order of ``rows``. The host reads the device once, for the numbers of rows.

    Raises:
        ValueError: the ranks' rows differ in width or dtype (raised on every rank), or numbers of ranks or experts do not fit.
    """
    R, P = placement.n_ranks, placement.places_per_rank
    if exchange.n_ranks != R or any(len(counts_E) != placement.n_experts for counts_E in counts):
        raise ValueError(
            f"{exchange.n_ranks} ranks and counts of {[len(c) for c in counts]} experts must fit the placement: "
            f"{R} ranks, {placement.n_experts} experts"
        )
    going = [
        _to_owners(counts_E, len(rows_AD), placement, rank)
        for rows_AD, counts_E, rank in zip(rows, counts, exchange.ranks)
    ]
    # The counts, and what every rank must agree on: rows of one width and dtype. A mismatch is then seen by all, before rows move.
    notes = [
        torch.cat([counts_RP, counts_RP.new_tensor(_kind(rows_AD)).expand(R, 2)], 1)
        for (_, counts_RP), rows_AD in zip(going, rows)
    ]
    each = [[1] * R] * len(rows)
    notes_got = exchange.move(notes, each, each, what="counts")
    read = torch.stack(
        [torch.stack(pair) for pair in zip(notes, notes_got)]
    ).tolist()  # the one host read
    for rank, (mine, others) in zip(exchange.ranks, read):
        _agree(rank, mine[0][P:], [note[P:] for note in others])
    send = [[sum(note[:P]) for note in mine] for mine, _ in read]
    receive = [[sum(note[:P]) for note in others] for _, others in read]

    leaving = [
        _permute(rows_AD[: sum(to)], order_A if order_A is None else order_A[: sum(to)])
        for rows_AD, (order_A, _), to in zip(rows, going, send)
    ]
    arrived = exchange.all_to_all(leaving, send, receive)
    outputs = []
    for run, rows_AD, note_RP in zip(experts, arrived, notes_got):
        counts_RP = note_RP[:, :P]
        place_A = (
            torch.arange(P, device=rows_AD.device)
            .repeat(R)
            .repeat_interleave(counts_RP.flatten(), output_size=len(rows_AD))
        )
        order_A = torch.argsort(
            place_A, stable=True
        )  # rank-major to expert-major: within an expert, rank after rank
        outputs.append(
            _permute(run(_permute(rows_AD, order_A), counts_RP.sum(0)), _inverse(order_A))
        )
    returned = exchange.all_to_all(outputs, receive, send)
    home = [
        _permute(rows_AD, order_A if order_A is None else _inverse(order_A[: len(rows_AD)]))
        for rows_AD, (order_A, _) in zip(returned, going)
    ]
    return [
        F.pad(out_AD, (0, 0, 0, len(rows_AD) - len(out_AD))) for out_AD, rows_AD in zip(home, rows)
    ]


def _to_owners(
    counts_E: Tensor, n_rows: int, placement: Placement, rank: int
) -> tuple[Tensor | None, Tensor]:
    """The order (A,) that sorts rows by place (None: they are), and the rows (R, P) for each place of each rank."""
    R, P, E = placement.n_ranks, placement.places_per_rank, placement.n_experts
    if placement.in_order:
        return None, counts_E.view(R, P)
    device, copies = counts_E.device, max(map(len, placement.places_of_expert))
    table_EC = torch.tensor(
        [(places * copies)[:copies] for places in placement.places_of_expert], device=device
    )
    copies_E = torch.tensor([*map(len, placement.places_of_expert)], device=device)
    # Rows beyond the counts belong to no expert: they sort behind the last place.
    ends_E = counts_E.cumsum(0)
    row_A = torch.arange(n_rows, device=device)
    expert_A = torch.searchsorted(ends_E, row_A, right=True)
    real_A, expert_A = expert_A < E, expert_A.clamp(max=E - 1)
    turn_A = (row_A - (ends_E - counts_E)[expert_A] + rank) % copies_E[expert_A]
    place_A = torch.where(real_A, table_EC[expert_A, turn_A], R * P)
    counts_RP = (
        counts_E.new_zeros(R * P + 1)
        .scatter_add_(0, place_A, torch.ones_like(place_A))[:-1]
        .view(R, P)
    )
    return torch.argsort(place_A, stable=True), counts_RP


def _kind(rows_AD: Tensor) -> tuple[int, int]:
    if rows_AD.dtype not in _DTYPES:
        raise ValueError(f"rows have dtype {rows_AD.dtype}, must be one of {_DTYPES}")
    return rows_AD.shape[-1], _DTYPES.index(rows_AD.dtype)


def _agree(rank: int, mine: list[int], others: list[list[int]]) -> None:
    for other, theirs in enumerate(others):
        if theirs != mine:
            (width, dtype), (their_width, their_dtype) = mine, theirs
            raise ValueError(
                f"expert parallelism: rank {other} sends rows of {their_width} x {_DTYPES[their_dtype]}, but rank {rank} "
                f"has rows of {width} x {_DTYPES[dtype]}; all ranks must have the same width and dtype"
            )


def _inverse(order_A: Tensor) -> Tensor:
    return torch.empty_like(order_A).scatter_(
        0, order_A, torch.arange(len(order_A), device=order_A.device)
    )


def _permute(rows_AD: Tensor, order_A: Tensor | None) -> Tensor:
    return rows_AD if order_A is None else _Permute.apply(rows_AD, order_A)


class _Permute(torch.autograd.Function):
    """Each row has one place, so the way back is the inverse order; index_select's own backward would add, row after row."""

    @staticmethod
    def forward(ctx, rows_AD: Tensor, order_A: Tensor) -> Tensor:
        ctx.save_for_backward(order_A)
        return rows_AD.index_select(0, order_A)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AD: Tensor):
        return grad_AD.index_select(0, _inverse(ctx.saved_tensors[0])), None
