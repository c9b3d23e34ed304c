r"""What an all-to-all costs: the alpha-beta model, flat or hierarchical.

.. math:: t(n) = \alpha + n / \beta

A message of n bytes costs a latency alpha and its bytes over the bandwidth beta. A model, not a
measurement: no congestion, no overlap with computing. Bytes and seconds; a matrix bytes_RR[s][r]
holds what rank s sends to rank r.

Sources: the formulas of the flat and the two-level all-to-all are those of Tutel (Hwang et al.
2022, arXiv 2206.03382); copies per node and the limit on nodes: DeepSeek-V3 (arXiv 2412.19437),
section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.metrics import expert_sets
from moe_core.parallel.placement import Placement
from moe_core.routing import Routing
from moe_core.validate import at_least, whole


@dataclass(frozen=True)
class Network:
    """Links between ranks; ranks of a node are numbered one after the other.

    Attributes:
        ranks_per_node: m.
        intra_bandwidth, inter_bandwidth: bytes per second and direction of one rank, inside its
            node and to others.
        intra_latency, inter_latency: alpha, seconds per message.

    The defaults are an H800 node (NVLink about 160 GB/s, InfiniBand about 50 GB/s: DeepSeek-V3,
    section 3.2), and no latency.

    Raises:
        ValueError: a number is out of range.
    """

    ranks_per_node: int = 8
    intra_bandwidth: float = 160e9
    inter_bandwidth: float = 50e9
    intra_latency: float = 0.0
    inter_latency: float = 0.0

    def __post_init__(self):
        whole(1, ranks_per_node=self.ranks_per_node)
        at_least(0, intra_latency=self.intra_latency, inter_latency=self.inter_latency)
        for name in ("intra_bandwidth", "inter_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be more than 0 bytes per second"
                )

    def flat(self, bytes_RR: Tensor) -> float:
        r"""Seconds of an all-to-all in which every rank writes to every other one.

        .. math:: t = \max_r \sum_{s \ne r} \left( \alpha_{sr} + n_{sr} / \beta_{sr} \right)

        The links inside and between nodes work side by side, sending and receiving too; the slowest
        rank decides. Uniform, on one kind of link: (R - 1) alpha + V / beta. A pair with nothing to
        send costs nothing.

        Raises:
            ValueError: bytes_RR is not a square of numbers that are at least 0.
        """
        n_RR = self._sizes(bytes_RR)
        near_RR = self._near(len(n_RR))
        return max(
            _slowest(n_RR * near_RR, self.intra_latency, self.intra_bandwidth),
            _slowest(n_RR * ~near_RR, self.inter_latency, self.inter_bandwidth),
        )

    def hierarchical(self, bytes_RR: Tensor) -> float:
        r"""Seconds of the two-level all-to-all: inside the node, then between nodes.

        The first pass goes to the rank with the receiver's place in its node.

        Fewer messages, (m - 1) + (R/m - 1) instead of R - 1, for one more pass inside the node.

        Raises:
            ValueError: ranks_per_node does not divide R, or bytes_RR is not a square of numbers
                that are at least 0.
        """
        n_RR = self._sizes(bytes_RR)
        R, m = len(n_RR), self._whole_nodes(len(n_RR))
        n = n_RR.view(
            R // m, m, R // m, m
        )  # node and place of the sender, node and place of the receiver
        inside = n.sum(
            2
        )  # (node, place, place'): what goes to ranks of place', whatever their node
        between = n.sum(1).permute(2, 0, 1)  # (place', node, node')
        return max(
            _slowest(_no_diagonal(node), self.intra_latency, self.intra_bandwidth)
            for node in inside
        ) + max(
            _slowest(_no_diagonal(place), self.inter_latency, self.inter_bandwidth)
            for place in between
        )

    def node_limited(
        self, routings: Sequence[Routing], placement: Placement, row_bytes: float
    ) -> tuple[float, float]:
        """Seconds and the busiest rank's inter-node bytes, if a token crosses to a node once.

        One copy goes to the rank of the same place on the other node, which hands it on inside the
        node; one pass after the other.

        Args:
            routings: each rank's. placement: R ranks; the first copy of an expert is the one that
                is used.
            row_bytes: bytes of a row: 2 D in bfloat16, D in FP8.

        Raises:
            ValueError: ranks_per_node does not divide R, or the routings are not R or not for the
                placement's experts.
        """
        R, m = placement.n_ranks, self._whole_nodes(placement.n_ranks)
        at_least(0, row_bytes=row_bytes)
        if [routing.n_experts for routing in routings] != [placement.n_experts] * R:
            raise ValueError(
                f"routings to {[routing.n_experts for routing in routings]} experts must be {R}, "
                f"one for each rank, to the placement's {placement.n_experts} experts"
            )
        across_RR, inside_RR = torch.zeros(2, R, R, dtype=torch.float64)
        owner_E = torch.tensor(
            [places[0] // placement.places_per_rank for places in placement.places_of_expert]
        )
        for rank, routing in enumerate(routings):
            sets_TE = expert_sets(routing, kept=True).flatten(0, 1).cpu()
            goes_TR = torch.stack([sets_TE[:, owner_E == r].any(-1) for r in range(R)], -1)
            for node in range(0, R, m):
                gate = rank if rank // m == node // m else node + rank % m
                here_Tm = goes_TR[:, node : node + m]
                across_RR[rank, gate] += row_bytes * here_Tm.any(-1).sum()
                inside_RR[gate, node : node + m] += row_bytes * here_Tm.sum(0)
        across_RR, inside_RR = _no_diagonal(across_RR), _no_diagonal(inside_RR)
        return self.flat(across_RR) + self.flat(inside_RR), float(
            torch.maximum(across_RR.sum(0), across_RR.sum(1)).max()
        )

    def _whole_nodes(self, n_ranks: int) -> int:
        if n_ranks % self.ranks_per_node:
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} must divide the {n_ranks} ranks"
            )
        return self.ranks_per_node

    def _near(self, n_ranks: int) -> Tensor:
        node_R = torch.arange(n_ranks) // self.ranks_per_node
        return node_R.unsqueeze(0) == node_R.unsqueeze(1)

    @staticmethod
    def _sizes(bytes_RR: Tensor) -> Tensor:
        n_RR = torch.as_tensor(bytes_RR, dtype=torch.float64)
        if (
            n_RR.ndim != 2
            or n_RR.shape[0] != n_RR.shape[1]
            or len(n_RR) == 0
            or not bool((n_RR >= 0).all())
        ):
            raise ValueError(
                f"bytes_RR of shape {tuple(n_RR.shape)} must be (R, R) numbers, at least 0"
            )
        return _no_diagonal(n_RR)


def uniform_bytes(tokens_per_rank: int, copies: float, row_bytes: float, n_ranks: int) -> Tensor:
    r"""(R, R) bytes of an even dispatch: a rank sends :math:`V = T k b (R - 1) / R`.

    Args:
        tokens_per_rank: T. copies: k, rows per token (with one copy per node: the nodes it goes
            to).
        row_bytes: b, bytes of a row. n_ranks: R.

    Raises:
        ValueError: a number is out of range.
    """
    whole(0, tokens_per_rank=tokens_per_rank)
    whole(1, n_ranks=n_ranks)
    at_least(0, copies=copies, row_bytes=row_bytes)
    return _no_diagonal(
        torch.full(
            (n_ranks, n_ranks), tokens_per_rank * copies * row_bytes / n_ranks, dtype=torch.float64
        )
    )


def _slowest(n_RR: Tensor, latency: float, bandwidth: float) -> float:
    busy_RR = torch.where(n_RR > 0, latency + n_RR / bandwidth, 0.0)
    return float(torch.maximum(busy_RR.sum(0), busy_RR.sum(1)).max())


def _no_diagonal(n_RR: Tensor) -> Tensor:
    return n_RR.masked_fill(torch.eye(len(n_RR), dtype=torch.bool), 0)
