"""How many places stand in front of each expert: the formulas by name, with the numbers of the libraries they come from."""

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction

import torch

from ..validate import at_least, one_of, whole


def exact(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lceil T K / E \cdot c_f \rceil`, with the decimal you write taken exactly: 100 slots at 1.1 are 110 places.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 3, with K as in Megatron-LM.
    """
    numerator, denominator = _as_written(factor)
    return -(-n_tokens * top_k * numerator // (n_experts * denominator))


@torch.compiler.assume_constant_result
def _as_written(factor: float) -> tuple[int, int]:
    """The decimal as a fraction of whole numbers. A constant: torch.compile need not look inside."""
    return Fraction(str(factor)).as_integer_ratio()


def megatron(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """The same in floats, in which 100 * 1.1 is 110.00000000000001 and needs 111 places. Megatron-LM ``get_capacity``."""
    return math.ceil(n_tokens * top_k / n_experts * factor)


def deepspeed(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """The same in float32 and never below 4. DeepSpeed ``sharded_moe._capacity``, ``min_capacity`` of its MoE layer."""
    return math.ceil(_float32(_float32(n_tokens / n_experts) * _float32(factor * top_k)))


def tutel(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`K \lfloor c_f \lceil T/E \rceil \rfloor`: rounded per choice, not at the end. Tutel ``extract_critical``."""
    return top_k * int(factor * math.ceil(n_tokens / n_experts))


def megablocks(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor c_f K T / E \rfloor`, T over all ranks (T W in its code). MegaBlocks ``ParallelMLP.expert_capacity``."""
    return int(factor * (top_k * n_tokens / n_experts))


def fairscale(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor 2T/E \rfloor`, whatever the factor and K (its gate is top-2 only). fairscale ``top2gating``."""
    return 2 * n_tokens // n_experts


def nanomoe(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor c_f K T / E \rfloor`, made even by adding 1, at least 4. nanoMoE ``Router.get_capacity``."""
    places = math.floor(top_k * factor * n_tokens / n_experts)
    return places + places % 2


def flaxformer(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """round(c_f T / E) without K, halves to the even number, at least 4. flaxformer ``MoeLayer``, min_expert_capacity."""
    return round(factor * n_tokens / n_experts)


def st_moe(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor c_f T / E \rfloor` without K, at most T, at least 4. st-moe-pytorch ``TopNGating``, one group = one sequence."""
    return min(n_tokens, int(n_tokens * factor / n_experts))


def hf_switch(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """64, whatever the shapes; transformers counts them per sequence, so use scope="sequence". ``SwitchTransformersConfig``."""
    return 64


Formula = Callable[[int, int, int, float], int]
FORMULAS: dict[str, Formula] = {
    formula.__name__: formula
    for formula in (
        exact,
        megatron,
        deepspeed,
        tutel,
        megablocks,
        fairscale,
        nanomoe,
        flaxformer,
        st_moe,
        hf_switch,
    )
}
# What the library never goes below unless told otherwise.
FLOORS = {name: 0 for name in FORMULAS} | dict.fromkeys(
    ("deepspeed", "nanomoe", "flaxformer", "st_moe"), 4
)
# Libraries in which factor 0 asks for as many places as the most loaded expert needs, so that nobody is dropped.
ZERO_MEANS_LARGEST_LOAD = ("tutel", "megablocks")


def expert_capacity(
    n_tokens: int,
    top_k: int,
    n_experts: int,
    capacity_factor: float,
    *,
    formula: str = "exact",
    min_capacity: int | None = None,
    largest_load: int | None = None,
) -> int:
    r"""The number of places in front of each expert.

    .. math:: C = \Big\lceil \frac{T K}{E}\, c_f \Big\rceil \quad \text{(the formula "exact")}

    Args:
        n_tokens: T = B*N, padding included: shapes alone decide C, no tensor is read.
        top_k, n_experts: K and E.
        capacity_factor: c_f; at 1 there are as many places as slots.
        formula: a name in ``FORMULAS``: they disagree by rounding, by K, and by a floor.
        min_capacity: never fewer places than this; None takes the library's own floor (``FLOORS``).
        largest_load: the slots of the most loaded expert, for formulas in which capacity_factor=0 means "as many as needed".

    Raises:
        ValueError: a count is not a whole number, capacity_factor is negative or not finite, the formula is unknown, or it
            needs largest_load and none is given.
    """
    whole(0, n_tokens=n_tokens)
    whole(1, top_k=top_k, n_experts=n_experts)
    at_least(0, capacity_factor=capacity_factor)
    one_of(FORMULAS, formula=formula)
    floor = FLOORS[formula] if min_capacity is None else min_capacity
    whole(0, min_capacity=floor)
    if needs_largest_load(formula, capacity_factor):
        if largest_load is None:
            raise ValueError(
                f"capacity_factor=0 means the largest load with formula={formula!r}: give largest_load"
            )
        whole(0, largest_load=largest_load)
        return max(largest_load, floor)
    return max(FORMULAS[formula](n_tokens, top_k, n_experts, capacity_factor), floor)


def needs_largest_load(formula: str, capacity_factor: float) -> bool:
    """Whether C depends on how the tokens were routed, and not on shapes alone."""
    return capacity_factor == 0 and formula in ZERO_MEANS_LARGEST_LOAD


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
