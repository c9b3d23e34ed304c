"""Expert parallelism: every rank's rows go to the ranks that hold their experts, and back.

    rows sorted by expert -> sorted by owner -> [counts exchanged, read once] -> [rows exchanged]
    -> sorted by expert again -> through this rank's experts -> and all the way back

Source: Lepikhin et al. 2020 (GShard, arXiv 2006.16668), section 3.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .exchange import Exchange, TorchExchange
from .placement import Placement, contiguous

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# (rows (A, D) sorted by expert, counts (P,)) -> (A, D)
RunRows = Callable[[Tensor, Tensor], Tensor]


class ExpertShard(NamedTuple):
    """One rank's part of the experts: who holds what, which rank it is, how to reach others."""

    placement: Placement
    rank: int
    exchange: Exchange | None = None

    @classmethod
    def of_this_process(cls, n_experts: int, ep_size: int) -> "ExpertShard":
        """Experts in their order, over all processes of torch.distributed.

        Raises ValueError where ep_size does not divide E or is not the number of processes,
        RuntimeError where torch.distributed is not initialised.
        """
        exchange, placement = TorchExchange(), contiguous(n_experts, ep_size)
        if exchange.n_ranks != ep_size:
            raise ValueError(
                f"ep_size={ep_size} must be the number of processes, {exchange.n_ranks}, "
                "where no shard says which of them"
            )
        return cls(placement, exchange.rank, exchange)

    @property
    def owned(self) -> tuple[int, ...]:
        """The experts of this rank, in the order of its bank."""
        return self.placement.experts_of_rank[self.rank]

    def require(self, n_experts: int, ep_size: int) -> None:
        """Raise ValueError unless the placement is of so many experts and ranks."""
        R, E = self.placement.n_ranks, self.placement.n_experts
        if (R, E) != (ep_size, n_experts):
            raise ValueError(
                f"ep_size={ep_size} and n_experts={n_experts} must be those of the shard's "
                f"placement: {R} ranks, {E} experts"
            )

    def run(self, bank: RunRows, rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        """``run_rows`` for this rank alone; raises ValueError where there is no exchange."""
        if self.exchange is None:
            alone = "shard.exchange=None: these experts cannot be reached from other ranks"
            raise ValueError(f"{alone}; see parallel.simulate")
        [out_AD] = run_rows([rows_AD], [counts_E], [bank], self.exchange, self.placement)
        return out_AD


def run_rows(
    rows: Sequence[Tensor],
    counts: Sequence[Tensor],
    experts: Sequence[RunRows],
    exchange: Exchange,
    placement: Placement,
) -> list[Tensor]:
    """Run rows through experts that live on other ranks; the host reads the device once.

    Args:
        rows: for each rank here (A, D), sorted by expert; they come back in this order. Rows beyond
            the sum of the counts stay at home and come back as zeros.
        counts: for each rank here (E,) int64, its rows for each expert.
        experts: for each rank here what runs rows through its bank of P experts.
        exchange, placement: R ranks both. Rows for an expert with copies are dealt out in turn.

    Raises ValueError where numbers of ranks or experts do not fit, or the ranks' rows differ in
    width or dtype (then on every rank).
    """
    R, P = placement.n_ranks, placement.places_per_rank
    if exchange.n_ranks != R or any(len(counts_E) != placement.n_experts for counts_E in counts):
        found = [len(counts_E) for counts_E in counts]
        raise ValueError(
            f"{exchange.n_ranks} ranks and counts of {found} experts must fit the placement: "
            f"{R} ranks, {placement.n_experts} experts"
        )
    # 1. Sort the rows by owner, and count what goes where.
    owners = zip(counts, map(len, rows), exchange.ranks)
    going = [_to_owners(counts_E, A, placement, rank) for counts_E, A, rank in owners]

    # 2. Tell each rank how many rows come, and what all must agree on: their width and dtype. A
    #    mismatch is then seen by every rank, before rows move.
    notes = [
        torch.cat([counts_RP, counts_RP.new_tensor(_kind(rows_AD)).expand(R, 2)], 1)
        for (_, counts_RP), rows_AD in zip(going, rows)
    ]
    one_each = [[1] * R] * len(rows)
    notes_got = exchange.move(notes, one_each, one_each, what="counts")
    read = torch.stack([torch.stack(pair) for pair in zip(notes, notes_got)]).tolist()  # one read
    for rank, (mine, others) in zip(exchange.ranks, read):
        _agree(rank, mine[0][P:], [note[P:] for note in others])
    send = [[sum(note[:P]) for note in mine] for mine, _ in read]
    receive = [[sum(note[:P]) for note in others] for _, others in read]

    # 3. Send the rows.
    leaving = [
        _permute(rows_AD[: sum(to)], order_A if order_A is None else order_A[: sum(to)])
        for rows_AD, (order_A, _), to in zip(rows, going, send)
    ]
    arrived = exchange.all_to_all(leaving, send, receive)

    # 4. They came rank after rank: sort by expert, run, and sort back.
    outputs = []
    for run, rows_AD, note_RP in zip(experts, arrived, notes_got):
        counts_RP = note_RP[:, :P]
        place_A = torch.arange(P, device=rows_AD.device).repeat(R)
        place_A = place_A.repeat_interleave(counts_RP.flatten(), output_size=len(rows_AD))
        order_A = torch.argsort(place_A, stable=True)  # within an expert, rank after rank
        out_AD = run(_permute(rows_AD, order_A), counts_RP.sum(0))
        outputs.append(_permute(out_AD, _inverse(order_A)))

    # 5. And all the way home.
    returned = exchange.all_to_all(outputs, receive, send)
    home = [
        _permute(rows_AD, order_A if order_A is None else _inverse(order_A[: len(rows_AD)]))
        for rows_AD, (order_A, _) in zip(returned, going)
    ]
    missing = [len(rows_AD) - len(out_AD) for out_AD, rows_AD in zip(home, rows)]
    return [F.pad(out_AD, (0, 0, 0, n)) for out_AD, n in zip(home, missing)]


def _to_owners(
    counts_E: Tensor, n_rows: int, placement: Placement, rank: int
) -> tuple[Tensor | None, Tensor]:
    """The order (A,) that sorts rows by place (None: they are sorted), and the rows (R, P)."""
    R, P, E = placement.n_ranks, placement.places_per_rank, placement.n_experts
    if placement.in_order:
        return None, counts_E.view(R, P)
    device, places = counts_E.device, placement.places_of_expert
    most = max(map(len, places))
    table_EC = torch.tensor([(of_e * most)[:most] for of_e in places], device=device)
    copies_E = torch.tensor([len(of_e) for of_e in places], device=device)
    # Rows beyond the counts belong to no expert: they sort behind the last place.
    ends_E = counts_E.cumsum(0)
    row_A = torch.arange(n_rows, device=device)
    expert_A = torch.searchsorted(ends_E, row_A, right=True)
    real_A, expert_A = expert_A < E, expert_A.clamp(max=E - 1)
    # Each rank starts with another copy, or all first rows would go to the same one.
    turn_A = (row_A - (ends_E - counts_E)[expert_A] + rank) % copies_E[expert_A]
    place_A = torch.where(real_A, table_EC[expert_A, turn_A], R * P)
    counts_P = counts_E.new_zeros(R * P + 1).scatter_add_(0, place_A, torch.ones_like(place_A))
    return torch.argsort(place_A, stable=True), counts_P[:-1].view(R, P)


def _kind(rows_AD: Tensor) -> tuple[int, int]:
    if rows_AD.dtype not in _DTYPES:
        raise ValueError(f"rows have dtype {rows_AD.dtype}, must be one of {_DTYPES}")
    return rows_AD.shape[-1], _DTYPES.index(rows_AD.dtype)


def _agree(rank: int, mine: list[int], others: list[list[int]]) -> None:
    for other, theirs in enumerate(others):
        if theirs != mine:
            (width, dtype), (their_width, their_dtype) = mine, theirs
            raise ValueError(
                f"expert parallelism: rank {other} sends rows of {their_width} x "
                f"{_DTYPES[their_dtype]}, but rank {rank} has rows of {width} x {_DTYPES[dtype]}; "
                "all ranks must have the same width and dtype"
            )


def _inverse(order_A: Tensor) -> Tensor:
    places_A = torch.arange(len(order_A), device=order_A.device)
    return torch.empty_like(order_A).scatter_(0, order_A, places_A)


def _permute(rows_AD: Tensor, order_A: Tensor | None) -> Tensor:
    return rows_AD if order_A is None else _Permute.apply(rows_AD, order_A)


class _Permute(torch.autograd.Function):
    """Each row has one place: the way back is the inverse order, with nothing to add up."""

    @staticmethod
    def forward(ctx, rows_AD: Tensor, order_A: Tensor) -> Tensor:
        ctx.save_for_backward(order_A)
        return rows_AD.index_select(0, order_A)

    @staticmethod
    def backward(ctx, grad_AD: Tensor):
        return _Permute.apply(grad_AD, _inverse(ctx.saved_tensors[0])), None
