"""Exchange: the all-to-all, in one process that holds every rank or between real processes.

Expert parallelism is written once, over an Exchange and over lists with one entry for each rank
that lives in this process: all R for ``SimulatedExchange``, one for ``TorchExchange``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..validate import whole

# For each rank that lives here: its rows, and how many of them go to (come from) each rank.
Rows = Sequence[Tensor]
Splits = Sequence[Sequence[int]]


class Exchange(ABC):
    """R ranks that can send rows to each other; ``ranks`` are those that live in this process."""

    n_ranks: int
    ranks: tuple[int, ...]

    @abstractmethod
    def move(self, rows: Rows, send: Splits, receive: Splits, what: str = "rows") -> list[Tensor]:
        """Send rows from every rank to every rank, without gradient; ``what`` names it in the log.

        ``rows`` (A, ...) stand in the order of the ranks they go to, those returned in the order of
        the ranks they came from.
        """

    def all_to_all(self, rows: Rows, send: Splits, receive: Splits) -> Rows:
        """``move`` with a gradient: what came from a rank sends its gradient back there."""
        return _AllToAll.apply(self, send, receive, *rows)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, send: Splits, receive: Splits, *rows: Tensor):
        ctx.exchange, ctx.send, ctx.receive = exchange, send, receive
        return tuple(exchange.move(rows, send, receive))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return None, None, None, *ctx.exchange.move(grads, ctx.receive, ctx.send, what="gradients")


@dataclass(frozen=True)
class Transfer:
    """One all-to-all as it happened; bytes_RR from rank s to rank r, the diagonal stays home."""

    what: str
    bytes_RR: Tensor


class SimulatedExchange(Exchange):
    """All R ranks in this process: sending is cutting and joining. ``transfers`` is the log.

    Raises ValueError where n_ranks is not a positive whole number.
    """

    def __init__(self, n_ranks: int):
        whole(1, n_ranks=n_ranks)
        self.n_ranks, self.ranks = n_ranks, tuple(range(n_ranks))
        self.transfers: list[Transfer] = []

    def move(self, rows: Rows, send: Splits, receive: Splits, what: str = "rows") -> list[Tensor]:
        """See ``Exchange.move``."""
        pieces = [rows_s.split(list(send_s)) for rows_s, send_s in zip(rows, send)]
        bytes_RR = torch.tensor([[piece.nbytes for piece in row] for row in pieces])
        self.transfers.append(Transfer(what, bytes_RR))
        return [torch.cat([pieces[s][r] for s in self.ranks]) for r in self.ranks]


class TorchExchange(Exchange):
    """Real processes: this one is one rank of a torch.distributed group, None: of all processes.

    Raises RuntimeError where torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "TorchExchange needs torch.distributed: "
                "start under torchrun, or call init_process_group first"
            )
        self.group, self.rank = group, dist.get_rank(group)
        self.n_ranks, self.ranks = dist.get_world_size(group), (self.rank,)

    def move(self, rows: Rows, send: Splits, receive: Splits, what: str = "rows") -> list[Tensor]:
        """See ``Exchange.move``; gloo on a CPU, NCCL on a GPU."""
        [rows_A], [to], [come] = rows, send, receive  # one rank lives here
        got = rows_A.new_empty(sum(come), *rows_A.shape[1:])
        dist.all_to_all_single(got, rows_A.contiguous(), list(come), list(to), group=self.group)
        return [got]
