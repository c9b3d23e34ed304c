r"""The all-to-alls of a step: balanced, without latency, nothing overlapped.

A rank sends :math:`V = T k d b (R - 1) / R` bytes in a dispatch, as much in a combine, and both
again in the backward pass.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from ..accounting import AllToAll
from ..accounting.network import Network, uniform_bytes
from .budget import DesignBudget
from .model_shape import ModelShape


@dataclass(frozen=True)
class ExchangeCost:
    """The exchange of one MoE layer for ``tokens`` of a rank.

    Attributes:
        tokens, copies, width: T, k and d: rows that leave the router, numbers of a row.
        ep: R. network: its links.
        dispatch_bytes: of a number on the way there; back it is 2.
        max_nodes: nodes a token may go to; None: all.
        layers: MoE layers. forwards: forward passes of a step, 2 where layers are computed again.
    """

    tokens: int
    copies: float
    width: int
    ep: int
    network: Network
    dispatch_bytes: int
    max_nodes: int | None
    layers: int
    forwards: int

    @property
    def nodes(self) -> int:
        """Nodes of the expert-parallel group."""
        return max(1, self.ep // self.network.ranks_per_node)

    @property
    def once_per_node(self) -> bool:
        """Whether it is faster to cross once to each node and hand rows on inside it."""
        return self.nodes > 1 and self._two_passes(2) < self._flat(2)

    @property
    def inter_copies(self) -> float:
        """Copies of a token that leave, at most: one for each expert, or one for each node."""
        return (
            min(self.copies, self.max_nodes or self.nodes, self.nodes)
            if self.once_per_node
            else self.copies
        )

    @property
    def volume(self) -> AllToAll:
        """Bytes that one rank sends; ``.dispatch``, ``.combine``, ``.forward`` and ``.step``."""
        return AllToAll(self.tokens, self.inter_copies, self.width, self.ep, self.dispatch_bytes, 2)

    @property
    def forward_seconds(self) -> float:
        """Dispatch and combine of one layer, for ``tokens``."""
        if self.ep == 1:
            return 0.0
        passed = self._two_passes if self.once_per_node else self._flat
        return passed(self.dispatch_bytes) + passed(2)

    @property
    def passes(self) -> int:
        """Dispatch-and-combine pairs of a layer and step: forward (or two), backward."""
        return self.forwards + 1

    @property
    def seconds(self) -> float:
        """All layers, forward and backward, for ``tokens``."""
        return self.layers * self.passes * self.forward_seconds

    def _flat(self, bytes_per_number: int) -> float:
        return _seconds(
            self.network, self.tokens, self.copies, self.width * bytes_per_number, self.ep
        )

    def _two_passes(self, bytes_per_number: int) -> float:
        """Across, one copy for each node; then inside it to the experts' ranks."""
        row, across = (
            self.width * bytes_per_number,
            min(self.copies, self.max_nodes or self.nodes, self.nodes),
        )
        return _seconds(self.network, self.tokens, across, row, self.ep) + _seconds(
            self.network, self.tokens, self.copies, row, self.network.ranks_per_node
        )


@lru_cache(maxsize=4096)
def _seconds(network: Network, tokens: int, copies: float, row_bytes: float, ranks: int) -> float:
    return network.flat(uniform_bytes(tokens, copies, row_bytes, ranks))


def exchange_of(
    shape: ModelShape,
    budget: DesignBudget,
    *,
    ep: int,
    tokens: int,
    recompute: str,
    max_nodes: int | None = None,
) -> ExchangeCost:
    """The exchange of a design: its links are the GPU's, with the peaks its maker states."""
    gpu = budget.accelerator
    return ExchangeCost(
        tokens,
        shape.top_k,
        shape.d_model,
        ep,
        Network(budget.gpus_per_node, gpu.link_bandwidth, gpu.network_bandwidth),
        1 if budget.fp8_dispatch else 2,
        max_nodes,
        shape.n_layers,
        2 if recompute == "layer" else 1,
    )


def cuts(exchange: ExchangeCost) -> dict[str, ExchangeCost]:
    """The same exchange after each of the cuts of the rule "30 % exchange"."""
    after = {}
    if exchange.nodes > 1 and exchange.max_nodes is None:
        after[f"node limit {node_limit(exchange.nodes)} of {exchange.nodes}"] = replace(
            exchange, max_nodes=node_limit(exchange.nodes)
        )
    if exchange.dispatch_bytes == 2:
        after["dispatch in one byte (FP8)"] = replace(exchange, dispatch_bytes=1)
    if exchange.copies >= 2:
        after["half as many experts a token, twice as wide"] = replace(
            exchange, copies=exchange.copies / 2
        )
    return after


def node_limit(nodes: int) -> int:
    """DeepSeek-V3's 4 nodes; half of them where there are fewer than 8."""
    return 4 if nodes >= 8 else max(1, nodes // 2)
