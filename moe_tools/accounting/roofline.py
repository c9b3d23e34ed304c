r"""Roofline of an expert's matrix products: do they wait for arithmetic or for memory?

.. math:: I = \frac{2 m d f}{b\,(d f + m d + m f)} \approx m \text{ (in bfloat16, while } m \ll d,
    f\text{)}, \qquad \text{attainable} = \min(\text{peak}, I \cdot \text{bandwidth})

m tokens go through one d x f matrix. At the ridge, I = peak / bandwidth, both limits meet.
Source: Williams, Waterman and Patterson 2009, "Roofline"; the rest is arithmetic.
"""

from dataclasses import dataclass

from moe_core.validate import at_least, whole

from .spec import ModelSpec


@dataclass(frozen=True)
class Accelerator:
    """A processor's limits, as its maker states them: peaks that no real program reaches.

    Attributes:
        peak_flops: FLOP/s of bfloat16 matrix products, dense (without sparsity).
        memory_bandwidth: bytes/s between the processor and its memory, one direction at a time.
        memory: bytes.
        link_bandwidth: bytes/s to its neighbours in a node, in one direction (half of what is
            advertised as bidirectional).
        network_bandwidth: bytes/s to other nodes, in one direction.
    """

    name: str
    peak_flops: float
    memory_bandwidth: float
    memory: float
    link_bandwidth: float
    network_bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on arithmetic is the limit."""
        return self.peak_flops / self.memory_bandwidth


# NVIDIA's data sheets for SXM boards; of a B200, an eighth of what is stated for a DGX B200.
# NVLink: 600, 900, 900 and 1800 GB/s in both directions together. Network: one InfiniBand port for
# each GPU, HDR (200 Gb/s) beside an A100, NDR (400 Gb/s) beside the others.
ACCELERATORS = {
    "a100": Accelerator("A100 80 GB", 312e12, 2.04e12, 80e9, 300e9, 25e9),
    "h100": Accelerator("H100", 989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Accelerator("H200", 989e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Accelerator("B200", 2250e12, 8.0e12, 180e9, 900e9, 50e9),
}


def intensity(m: float, d: int, f: int, bytes_per_number: float = 2) -> float:
    """FLOPs per byte of (m, d) times (d, f), every number read or written once.

    Raises ValueError for a size below what makes sense.
    """
    at_least(0, m=m, bytes_per_number=bytes_per_number)
    whole(1, d=d, f=f)
    return 2 * m * d * f / (bytes_per_number * (d * f + m * d + m * f))


def attainable_flops(
    m: float, d: int, f: int, accelerator: Accelerator, bytes_per_number: float = 2
) -> float:
    """FLOP/s that the roofline allows for this product."""
    return min(
        accelerator.peak_flops, intensity(m, d, f, bytes_per_number) * accelerator.memory_bandwidth
    )


def tokens_to_reach(ridge: float, d: int, f: int, bytes_per_number: float = 2) -> float:
    r"""Tokens at which an expert's product reaches the ridge: the m of that intensity.

    .. math:: m = \frac{r b\,d f}{2 d f - r b (d + f)}

    Infinity where no m is enough: with many tokens the intensity tends to 2 d f / (b (d + f)), and
    that is below the ridge.

    Raises:
        ValueError: a value is out of its range.
    """
    at_least(0, ridge=ridge, bytes_per_number=bytes_per_number)
    whole(1, d=d, f=f)
    rest = 2 * d * f - ridge * bytes_per_number * (d + f)
    return ridge * bytes_per_number * d * f / rest if rest > 0 else float("inf")


def tokens_per_expert(n_tokens: float, n_experts: int, top_k: float) -> float:
    """m = T k / E, the mean. Raises ValueError for a value out of its range."""
    at_least(0, n_tokens=n_tokens, top_k=top_k)
    whole(1, n_experts=n_experts)
    return n_tokens * top_k / n_experts


def distinct_experts(n_tokens: int, n_experts: int, top_k: float) -> float:
    r"""Experts that a batch of T tokens reads, on average, if each picks k of E evenly.

    .. math:: E \left(1 - \left(1 - \frac{k}{E}\right)^T\right)

    Raises:
        ValueError: n_tokens is negative, or top_k (which may be a mean) is not above 0 and at most
            n_experts.
    """
    whole(0, n_tokens=n_tokens)
    if not 0 < top_k <= n_experts:
        raise ValueError(f"top_k={top_k!r} must be above 0 and at most n_experts={n_experts}")
    return n_experts * (1 - (1 - top_k / n_experts) ** n_tokens)


def expert_roofline(
    spec: ModelSpec, n_tokens: int, accelerator: Accelerator, bytes_per_number: float = 2
) -> list[dict[str, float]]:
    """Every distinct MoE of a model at a batch of ``n_tokens``.

    Those are all tokens in flight on the ranks that share its experts.

    Returns:
        For each: "tokens_per_expert", "intensity" (FLOPs/byte, of a D x F product),
        "attainable_flops" (FLOP/s), "share_of_peak", "tokens_per_expert_at_ridge", "experts_read".

    Raises:
        ValueError: a value is out of its range, or the model has no MoE layer.
    """
    if not spec.moe_layers:
        raise ValueError("the model has no MoE layer")
    rows = []
    for moe in dict.fromkeys(spec.moe_layers):
        d, k = moe.expert_width(spec.d_model), moe.experts_per_token
        m = tokens_per_expert(n_tokens, moe.n_experts, k)
        attainable = attainable_flops(m, d, moe.d_ff, accelerator, bytes_per_number)
        rows.append(
            {
                "tokens_per_expert": m,
                "intensity": intensity(m, d, moe.d_ff, bytes_per_number),
                "attainable_flops": attainable,
                "share_of_peak": attainable / accelerator.peak_flops,
                "tokens_per_expert_at_ridge": tokens_to_reach(
                    accelerator.ridge, d, moe.d_ff, bytes_per_number
                ),
                "experts_read": distinct_experts(n_tokens, moe.n_experts, k),
            }
        )
    return rows
