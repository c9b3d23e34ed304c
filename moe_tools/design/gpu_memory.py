"""What one GPU must hold, and how a design can make it hold less."""

from dataclasses import dataclass
from math import ceil, floor, log10

from ..accounting import ModelSpec, activation_bytes_per_token, state_memory
from ..accounting.activation_bytes import RECOMPUTE
from ..accounting.model_memory import PRECISIONS
from .budget import RESERVE, DesignBudget, Impossible
from .model_shape import ModelShape

# Ways to save, the least costly first: what is sharded, what is computed again. With "weights"
# sharded two layers are gathered at a time.
SAVINGS = tuple(
    (sharded, recompute) for sharded in ("optimizer", "weights") for recompute in RECOMPUTE
)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU.

    Attributes:
        weights, gradients, optimizer: of AdamW in mixed precision, see ``accounting.state_memory``.
        gathered: weights of two layers, the one at work and the next, where weights are sharded;
            else 0.
        activations: of one micro-batch at perfect balance.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All five."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def gpu_memory(
    spec: ModelSpec, *, gpus: int, ep: int, sharded: str, recompute: str, tokens: int
) -> GpuMemory:
    """The memory of a GPU that runs ``tokens`` at a time.

    The other arguments: see ``state_memory`` and ``activation_bytes_per_token``.
    """
    state = state_memory(spec, "mixed", n_ranks=gpus, ep=ep, sharded=sharded)
    rest = spec.total_params - spec.parts["experts"] - spec.parts["embedding"] - spec.parts["head"]
    layer = (spec.parts["experts"] / ep + rest) / spec.n_layers
    gathered = 2 * PRECISIONS["mixed"].weights * layer if sharded == "weights" else 0.0
    activations = tokens * sum(activation_bytes_per_token(spec, recompute=recompute).values())
    return GpuMemory(state.weights, state.gradients, state.optimizer, gathered, activations)


def ep_sizes(gpus: int, ranks_per_node: int, n_experts: int) -> list[int]:
    """Sizes of an expert-parallel group: they divide GPUs, experts and nodes evenly."""
    return [
        ep
        for ep in range(1, min(gpus, n_experts) + 1)
        if gpus % ep == n_experts % ep == 0
        and (ranks_per_node % ep == 0 or ep % ranks_per_node == 0)
    ]


def least_memory(spec: ModelSpec, gpus: int, ranks_per_node: int, tokens: int) -> float:
    """Bytes of a GPU in the thriftiest plan, with so many tokens at a time."""
    return min(
        gpu_memory(
            spec, gpus=gpus, ep=ep, sharded=sharded, recompute=recompute, tokens=tokens
        ).total
        for ep in ep_sizes(gpus, ranks_per_node, spec.moe_layers[0].n_experts)
        for sharded, recompute in SAVINGS
    )


def does_not_fit(shape: ModelShape, budget: DesignBudget) -> Impossible:
    """The error for a shape that no plan holds, with the numbers from which on one would."""
    spec, usable, m, N = shape.spec, budget.usable_memory, budget.gpus_per_node, budget.seq_len
    least = least_memory(spec, budget.gpus, m, N)
    nearest = []
    gpus = _first_that_fits(lambda gpus, m: least_memory(spec, gpus, m, N) <= usable, budget)
    if gpus:
        nearest.append(f"gpus={gpus}")
    if budget.memory_limit and least <= budget.accelerator.memory:
        nearest.append(f"memory_limit={_up(least):.4g}")
    else:
        nearest.append(f"GPUs with {_up(least / (1 - RESERVE)) / 1e9:.4g} GB")
    shorter = (
        0 if budget.flops else _longest(spec, budget)
    )  # the same FLOPs on shorter sequences would buy a larger model
    if shorter:
        nearest.append(f"seq_len={shorter}")
    return Impossible(
        f"{spec.total_params / 1e9:.4g}B parameters, {spec.active_params / 1e9:.4g}B of them "
        f"active, need at least {least / 1e9:.4g} GB on each of gpus={budget.gpus}; "
        f"{usable / 1e9:.4g} GB are usable",
        *nearest,
    )


def _longest(spec: ModelSpec, budget: DesignBudget) -> int:
    """The longest sequence that fits, 0 if none does."""
    found = 0
    for ep in ep_sizes(budget.gpus, budget.gpus_per_node, spec.moe_layers[0].n_experts):
        for sharded, recompute in SAVINGS:
            how = {"gpus": budget.gpus, "ep": ep, "sharded": sharded, "recompute": recompute}
            state, one = (
                gpu_memory(spec, **how, tokens=0).total,
                gpu_memory(spec, **how, tokens=1).activations,
            )
            found = max(found, int((budget.usable_memory - state) / one))
    return found


def _first_that_fits(fits, budget: DesignBudget) -> int | None:
    """The least number of GPUs, in whole nodes, that fits; None up to 4096 times as many."""
    gpus, m = budget.gpus, budget.gpus_per_node
    if (
        budget.ranks_per_node is None and gpus < 8
    ):  # one node, not full: as large as it may be, then nodes of 8
        for n in range(gpus + 1, 9):
            if fits(n, n):
                return n
        gpus = m = 8
    low = gpus // m
    high, most = 2 * low, 4096 * low
    while high <= most and not fits(high * m, m):
        low, high = high, 2 * high
    if high > most:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * m, m) else (middle, high)
    return high * m


def _up(value: float) -> float:
    """The next number of four digits: printed, it still is enough."""
    unit = 10.0 ** (floor(log10(value)) - 3)
    return ceil(value / unit) * unit
