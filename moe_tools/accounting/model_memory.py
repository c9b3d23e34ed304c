"""Memory of a model: parameters, what training adds to each, and the KV cache.

Bytes, always; 1 GB = 1e9 bytes. Activations: ``activation_bytes``.
"""

from dataclasses import dataclass

from moe_core.validate import at_least, one_of, whole

from .spec import ModelSpec

SHARDED = ("nothing", "optimizer", "gradients", "weights")


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter in training with AdamW.

    Attributes:
        weights, gradients: of the tensors the model computes with, and of what backward leaves.
        master: of a second copy of the weights that the optimizer steps, 0 where there is none.
        moments: of both moments together.

    Raises:
        ValueError: a number is negative or infinite.
    """

    weights: float
    gradients: float
    master: float
    moments: float

    def __post_init__(self):
        at_least(
            0,
            weights=self.weights,
            gradients=self.gradients,
            master=self.master,
            moments=self.moments,
        )

    @property
    def total(self) -> float:
        """Bytes per parameter in all."""
        return self.weights + self.gradients + self.master + self.moments


# 16 bytes a parameter either way (Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section 3.1).
PRECISIONS = {
    "float32": Precision(weights=4, gradients=4, master=0, moments=8),
    "mixed": Precision(
        weights=2, gradients=2, master=4, moments=8
    ),  # bfloat16 weights and gradients, float32 master and moments
    "mixed_float32_gradients": Precision(
        weights=2, gradients=4, master=4, moments=8
    ),  # gradients are summed in float32
}


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank; optimizer is the moments and the master copy."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three; activations come on top."""
        return self.weights + self.gradients + self.optimizer


def state_memory(
    spec: ModelSpec,
    precision: str | Precision = "mixed",
    *,
    n_ranks: int = 1,
    ep: int = 1,
    sharded: str = "nothing",
) -> StateMemory:
    r"""Weights, gradients and AdamW's state on each of ``n_ranks`` data-parallel ranks, in bytes.

    Routed experts are spread over groups of ``ep`` ranks: a rank holds E / ep of each layer, and
    n_ranks / ep ranks hold the same ones. All else is on every rank. What is sharded is divided
    among the ranks that hold the same parameters:

    .. math:: \frac{P_{experts}}{ep} \cdot \begin{cases} 1 \\ ep / R & \text{if sharded} \end{cases}
        \; + \; P_{rest} \cdot \begin{cases} 1 \\ 1 / R & \text{if sharded} \end{cases}

    Args:
        precision: a name among ``PRECISIONS`` or a ``Precision``.
        n_ranks, ep: R and the size of an expert-parallel group; ep divides R.
        sharded: "nothing"; "optimizer" (ZeRO-1); also "gradients" (ZeRO-2); also "weights" (ZeRO-3,
            FSDP; what is gathered for the moment is not counted).

    Raises:
        ValueError: a value is out of its range, ep does not divide n_ranks, or ep is more than the
            experts of a layer.
    """
    whole(1, n_ranks=n_ranks, ep=ep)
    one_of(SHARDED, sharded=sharded)
    if isinstance(precision, str):
        one_of(PRECISIONS, precision=precision)
        precision = PRECISIONS[precision]
    if n_ranks % ep:
        raise ValueError(f"ep={ep} must divide n_ranks={n_ranks}")
    fewest = min((moe.n_experts for moe in spec.moe_layers), default=1)
    if ep > fewest:
        raise ValueError(f"ep={ep} must be at most the experts of a layer={fewest}")
    experts = spec.parts["experts"]
    rest, level = spec.total_params - experts, SHARDED.index(sharded)

    held, shared_out = experts / ep + rest, (experts + rest) / n_ranks
    return StateMemory(
        weights=precision.weights * (shared_out if level >= 3 else held),
        gradients=precision.gradients * (shared_out if level >= 2 else held),
        optimizer=(precision.master + precision.moments) * (shared_out if level >= 1 else held),
    )


def kv_cache_bytes_per_token(spec: ModelSpec, bytes_per_number: float = 2) -> float:
    """What one more token adds to the cache of a sequence, in bytes, as long as no window is full.

    GQA keeps 2 H_kv d numbers a layer, MLA its latent and the shared rotary key: r_kv + d_r;
    recurrent mixers keep nothing per token.
    """
    at_least(0, bytes_per_number=bytes_per_number)
    return bytes_per_number * sum(mixer.cache() for mixer in _mixers(spec))


def kv_cache_bytes(spec: ModelSpec, seq_len: int, bytes_per_number: float = 2) -> float:
    """The KV cache of one sequence: at most its window for each mixer that has one.

    A recurrent mixer adds its state.

    Raises:
        ValueError: seq_len is not a whole number, or the model has an encoder.
    """
    whole(0, seq_len=seq_len)
    at_least(0, bytes_per_number=bytes_per_number)
    return bytes_per_number * sum(
        mixer.cache() * mixer.seen(seq_len) + mixer.state() for mixer in _mixers(spec)
    )


def _mixers(spec: ModelSpec) -> list:
    spec.check_decoder_only()
    return [mixer for layer in spec.layers for mixer in layer.mixers]
