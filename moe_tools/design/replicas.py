r"""What data parallelism moves: gradients are summed and weights gathered.

Two levels, one after the other: inside the node, then between nodes with what each of its c ranks
has of it.

.. math:: t = h b \left( \frac{c - 1}{c\, \beta_{intra}} + \frac{M - 1}{c\, M\, \beta_{inter}}
    \right)

h numbers of b bytes a rank, held alike by c ranks in each of M nodes. A model, like
``accounting.network.Network``: no latency, no congestion.
"""

from ..accounting import ModelSpec
from ..accounting.model_memory import PRECISIONS
from .budget import DesignBudget


def collective_seconds(
    numbers: float, per_node: int, nodes: int, budget: DesignBudget, bytes_per_number: float
) -> float:
    """One all-gather or reduce-scatter of ``numbers`` over c ranks in each of M nodes."""
    gpu = budget.accelerator
    inside, between = (
        (per_node - 1) / per_node / gpu.link_bandwidth,
        (nodes - 1) / nodes / per_node / gpu.network_bandwidth,
    )
    return numbers * bytes_per_number * (inside + between)


def replica_seconds(
    spec: ModelSpec, budget: DesignBudget, *, ep: int, sharded: str, micro_batches: int
) -> float:
    """Seconds of a step: gradients summed and weights gathered once.

    Where weights are sharded: once summed and twice gathered for each micro-batch.
    """
    m, nodes = budget.gpus_per_node, budget.gpus // budget.gpus_per_node
    experts = spec.parts["experts"]
    per_node = max(
        1, m // ep
    )  # ranks of a node with the same experts; whole nodes of one group have none
    among = nodes if ep <= m else budget.gpus // ep
    b = PRECISIONS["mixed"].weights  # gradients have as many bytes
    once = collective_seconds(experts / ep, per_node, among, budget, b) + collective_seconds(
        spec.total_params - experts, m, nodes, budget, b
    )
    return once * (3 * micro_batches if sharded == "weights" else 2)
