r"""Bytes that expert parallelism moves.

.. math:: V = T \cdot \min(k, M) \cdot d \cdot b \cdot \frac{P - 1}{P}, \qquad \text{forward} =
    V_{dispatch} + V_{combine}, \qquad \text{step} = 2 \cdot \text{forward}

V is what one rank sends in one all-to-all when tokens choose experts evenly; it receives as much.
Backward moves the same again: the gradient of a combine is a dispatch, and that of a dispatch is a
combine. Seconds: ``network.Network``.
"""

from dataclasses import dataclass

from moe_core.validate import at_least, whole

from .spec import ModelSpec


@dataclass(frozen=True)
class AllToAll:
    """The all-to-alls of one MoE layer, seen from one rank. Bytes.

    Attributes:
        tokens_per_rank, top_k, width: T, k and d of the rows, D or the latent width.
        n_ranks: P, over which the experts are spread evenly.
        dispatch_bytes, combine_bytes: b of a number on the way there and back; 1 for FP8, 2 for
            bfloat16.
        max_copies: M: a token is sent at most so often, once to every node it goes to (node-limited
            routing); None sends it k times.

    Raises:
        ValueError: a value is out of its range.

    Source: the volume is arithmetic; that backward repeats it: README of DeepEP. Node limit:
    DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """

    tokens_per_rank: int
    top_k: float
    width: int
    n_ranks: int
    dispatch_bytes: float = 2
    combine_bytes: float = 2
    max_copies: int | None = None

    def __post_init__(self):
        whole(0, tokens_per_rank=self.tokens_per_rank)
        whole(
            1,
            width=self.width,
            n_ranks=self.n_ranks,
            max_copies=1 if self.max_copies is None else self.max_copies,
        )
        at_least(
            0,
            top_k=self.top_k,
            dispatch_bytes=self.dispatch_bytes,
            combine_bytes=self.combine_bytes,
        )

    def _volume(self, bytes_per_number: float) -> float:
        copies = self.top_k if self.max_copies is None else min(self.top_k, self.max_copies)
        return (
            self.tokens_per_rank
            * copies
            * self.width
            * bytes_per_number
            * (self.n_ranks - 1)
            / self.n_ranks
        )

    @property
    def dispatch(self) -> float:
        """V on the way to the experts."""
        return self._volume(self.dispatch_bytes)

    @property
    def combine(self) -> float:
        """V on the way back."""
        return self._volume(self.combine_bytes)

    @property
    def forward(self) -> float:
        """2 V where both have the same precision."""
        return self.dispatch + self.combine

    @property
    def step(self) -> float:
        """4 V: forward and backward."""
        return 2 * self.forward


def all_to_alls(
    spec: ModelSpec,
    tokens_per_rank: int,
    n_ranks: int,
    *,
    dispatch_bytes: float = 2,
    combine_bytes: float = 2,
    max_copies: int | None = None,
) -> list[AllToAll]:
    """One ``AllToAll`` for every MoE layer.

    The sum of their ``step`` is what a rank sends in a training step.

    Raises:
        ValueError: a value is out of its range, or the model has no MoE layer.
    """
    if not spec.moe_layers:
        raise ValueError("the model has no MoE layer: nothing is exchanged")
    return [
        AllToAll(
            tokens_per_rank,
            moe.experts_per_token,
            moe.expert_width(spec.d_model),
            n_ranks,
            dispatch_bytes,
            combine_bytes,
            max_copies,
        )
        for moe in spec.moe_layers
    ]
