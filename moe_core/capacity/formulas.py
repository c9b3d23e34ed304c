"""How many places each expert has: C from T, K, E and the factor, as the libraries compute it."""

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction

from ..validate import at_least, one_of, whole


def exact(n_tokens: int, top_k: int, n_experts: int, factor: float | tuple[int, int]) -> int:
    r""":math:`\lceil T K / E \cdot c_f \rceil`, the decimal as you write it: 100 * 1.1 is 110.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 3, with K as in Megatron-LM.
    """
    # In whole numbers: no float can round up to one place more.
    numerator, denominator = factor if isinstance(factor, tuple) else as_written(factor)
    return -(-n_tokens * top_k * numerator // (n_experts * denominator))


def as_written(factor: float) -> tuple[int, int]:
    """The decimal as a fraction of whole numbers."""
    return Fraction(str(factor)).as_integer_ratio()


def megatron(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """In floats, 100 * 1.1 is 110.00000000000001: 111 places. Megatron-LM ``get_capacity``."""
    return math.ceil(n_tokens * top_k / n_experts * factor)


def deepspeed(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """In float32, at least 4. DeepSpeed ``sharded_moe._capacity`` and its ``min_capacity``."""
    return math.ceil(_float32(_float32(n_tokens / n_experts) * _float32(factor * top_k)))


def tutel(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`K \lfloor c_f \lceil T/E \rceil \rfloor`: per choice. Tutel ``extract_critical``."""
    return top_k * int(factor * math.ceil(n_tokens / n_experts))


def megablocks(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor c_f K T / E \rfloor`, T of all ranks. MegaBlocks ``expert_capacity``."""
    return int(factor * (top_k * n_tokens / n_experts))


def fairscale(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor 2T/E \rfloor` whatever factor and K: top-2. fairscale ``top2gating``."""
    return 2 * n_tokens // n_experts


def nanomoe(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor c_f K T / E \rfloor`, made even, at least 4. nanoMoE ``get_capacity``."""
    places = math.floor(top_k * factor * n_tokens / n_experts)
    return places + places % 2


def flaxformer(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """round(c_f T / E) without K, halves to even, at least 4. flaxformer ``MoeLayer``."""
    return round(factor * n_tokens / n_experts)


def st_moe(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    r""":math:`\lfloor c_f T / E \rfloor` without K, from 4 to T. st-moe-pytorch ``TopNGating``."""
    return min(n_tokens, int(n_tokens * factor / n_experts))


def hf_switch(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """64 whatever the shapes, for scope="sequence". ``SwitchTransformersConfig``."""
    return 64


FORMULAS: dict[str, Callable[[int, int, int, float], int]] = {
    formula.__name__: formula
    for formula in (
        *(exact, megatron, deepspeed, tutel, megablocks),
        *(fairscale, nanomoe, flaxformer, st_moe, hf_switch),
    )
}
# What the library never goes below unless told otherwise.
FLOORS = dict.fromkeys(FORMULAS, 0) | dict.fromkeys(("deepspeed", "nanomoe", "flaxformer"), 4)
FLOORS["st_moe"] = 4
# Here factor 0 asks for as many places as the busiest expert needs, so that nobody is dropped.
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
    r"""C, the number of places of each expert.

    .. math:: C = \Big\lceil \frac{T K}{E}\, c_f \Big\rceil \quad \text{(the formula "exact")}

    Args:
        n_tokens: T = B*N, padding included: shapes alone decide C, no tensor is read.
        top_k, n_experts: K and E.
        capacity_factor: c_f; at 1 there are as many places as slots.
        formula: a name in ``FORMULAS``: they disagree by rounding, by K, and by a floor.
        min_capacity: never fewer places than this; None takes the library's own floor.
        largest_load: the slots of the busiest expert, where capacity_factor=0 means as many.

    Raises ValueError where a number or a name is out of range, or largest_load is missing.
    """
    whole(0, n_tokens=n_tokens)
    whole(1, top_k=top_k, n_experts=n_experts)
    at_least(0, capacity_factor=capacity_factor)
    one_of(FORMULAS, formula=formula)
    floor = FLOORS[formula] if min_capacity is None else min_capacity
    whole(0, min_capacity=floor)
    if capacity_factor == 0 and formula in ZERO_MEANS_LARGEST_LOAD:
        if largest_load is None:
            means = f"capacity_factor=0 means the largest load with formula={formula!r}"
            raise ValueError(f"{means}: give largest_load")
        whole(0, largest_load=largest_load)
        return max(largest_load, floor)
    return max(FORMULAS[formula](n_tokens, top_k, n_experts, capacity_factor), floor)


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
