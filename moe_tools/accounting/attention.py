"""Attention in numbers: what its projections hold, what its scores cost, what it keeps of the past.

A kind of attention is a frozen dataclass with the methods of ``Mixer``. Linear attention and state
spaces: ``recurrent``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from moe_core.validate import boolean, one_of, whole

QK_NORMS = (None, "head", "full")


class Mixer(ABC):
    """What mixes the tokens of a sequence, as against a feed-forward network."""

    @abstractmethod
    def matrices(self, d_model: int) -> int:
        """Numbers that a token is multiplied with, once each: 2 FLOPs apiece."""

    @abstractmethod
    def vectors(self, d_model: int) -> int:
        """Numbers that are no matrix: biases, gains of norms, sinks."""

    def score_flops(self, context: float) -> float:
        """FLOPs of one token that looks at ``context`` positions, beyond the projections.

        Raises:
            ValueError: they are no function of the context alone.
        """
        raise ValueError(
            f"the FLOPs of {type(self).__name__} beyond its projections hang on how its kernel "
            "cuts the sequence: not counted"
        )

    def cache(self) -> int:
        """Numbers kept for every past token."""
        return 0

    def state(self) -> int:
        """Numbers kept for a sequence, however long it is."""
        return 0

    def seen(self, context: float) -> float:
        """How many of ``context`` positions a token looks at, and a cache holds."""
        return context

    def saved(self, d_model: int) -> int:
        """Numbers kept of one token for the backward pass, besides one a head in float32.

        See ``activation_bytes``.

        Raises:
            ValueError: its kernel decides that.
        """
        raise ValueError(
            f"what {type(self).__name__} keeps for the backward pass is its kernel's choice: not "
            "counted"
        )


@dataclass(frozen=True)
class AttentionSpec(Mixer):
    r"""Softmax attention: MHA, GQA or MQA, by the number of heads with keys and values.

    .. math:: 2\,D\,H\,d + 2\,D\,H_{kv}\,d \quad (+\text{ biases, norms of q and k, sinks})

    Attributes:
        n_heads, n_kv_heads, head_dim: H, H_kv and d. MHA has H_kv = H.
        qkv_bias, out_bias: a bias on the three projections in, and on the one out.
        qk_norm: RMS norm of queries and keys: "head" has d gains each, "full" one for every number
            of q and k (OLMoE), None has none.
        sinks: one learned number a head that takes part in the softmax (gpt-oss).
        output_gate: as wide a projection again gates the output (Qwen3-Next).
        shared_kv: keys and values are those of the layer below (Hunyuan-Large): no projections, no
            cache; a norm "head" of the keys stays.
        window: a token sees only so many positions, itself included; None sees all.
        position_buckets: rows of a learned table of relative positions, H numbers each (T5), in the
            layers that hold one.

    Raises:
        ValueError: a size is not a positive whole number, n_kv_heads does not divide n_heads, or an
            option is out of its range.

    Source: Ainslie et al. 2023 (GQA, arXiv 2305.13245).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None
    sinks: bool = False
    output_gate: bool = False
    shared_kv: bool = False
    window: int | None = None
    position_buckets: int = 0

    def __post_init__(self):
        whole(1, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        boolean(
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            sinks=self.sinks,
            output_gate=self.output_gate,
            shared_kv=self.shared_kv,
        )
        one_of(QK_NORMS, qk_norm=self.qk_norm)
        whole(1, window=1 if self.window is None else self.window)
        whole(0, position_buckets=self.position_buckets)

    @property
    def _q(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def _kv(self) -> int:
        """Width of the keys, and of the values, that this layer makes."""
        return 0 if self.shared_kv else self.n_kv_heads * self.head_dim

    def matrices(self, d_model: int) -> int:
        """q, [gate,] k, v and out."""
        return d_model * (self._q * (3 if self.output_gate else 2) + 2 * self._kv)

    def vectors(self, d_model: int) -> int:
        """Biases, norms, sinks, table of positions."""
        bias = (
            self.qkv_bias * (self._q * (2 if self.output_gate else 1) + 2 * self._kv)
            + self.out_bias * d_model
        )
        norm = {None: 0, "head": 2 * self.head_dim, "full": self._q + self._kv}[self.qk_norm]
        return bias + norm + self.n_heads * (self.sinks + self.position_buckets)

    def seen(self, context: float) -> float:
        """At most the window."""
        return context if self.window is None else min(context, self.window)

    def score_flops(self, context: float) -> float:
        """q k^T and the sum over v: 2 products of 2 d FLOPs, a head and a position each."""
        return 4 * self.seen(context) * self._q

    def cache(self) -> int:
        """A key and a value."""
        return 2 * self._kv

    def saved(self, d_model: int) -> int:
        """The input of the projections, q, k, v, and the input of the output projection."""
        return d_model + 2 * self._q + 2 * self.n_kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentAttentionSpec(Mixer):
    r"""Multi-head latent attention (MLA): what is cached is one short latent per token.

    .. math:: D r_q + r_q + r_q H (d_n + d_r) + D (r_{kv} + d_r) + r_{kv} + r_{kv} H (d_n + d_v) + H
        d_v D

    Attributes:
        n_heads: H. q_rank: r_q, or None where queries are projected at once. kv_rank: r_kv.
        nope_dim, rope_dim, v_dim: d_n, d_r (without and with rotary positions) and d_v, of a head.
        indexer_heads, indexer_dim: DeepSeek sparse attention's indexer (V3.2), which picks the
            positions to attend to; 0 has none.
        output_gate: a projection D x H d_v gates the output (Kimi-K3).

    Raises:
        ValueError: a size is not a positive whole number, or an indexer is given without q_rank,
            whose latent it reads.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    n_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    indexer_heads: int = 0
    indexer_dim: int = 0
    output_gate: bool = False

    def __post_init__(self):
        whole(
            1,
            n_heads=self.n_heads,
            q_rank=1 if self.q_rank is None else self.q_rank,
            kv_rank=self.kv_rank,
            nope_dim=self.nope_dim,
            v_dim=self.v_dim,
        )
        whole(
            0,
            rope_dim=self.rope_dim,
            indexer_heads=self.indexer_heads,
            indexer_dim=self.indexer_dim,
        )
        if bool(self.indexer_heads) != bool(self.indexer_dim) or (
            self.indexer_heads and self.q_rank is None
        ):
            raise ValueError(
                f"indexer_heads={self.indexer_heads} and indexer_dim={self.indexer_dim} must both "
                f"be 0, or both above 0 with q_rank={self.q_rank} not None"
            )
        boolean(output_gate=self.output_gate)

    @property
    def _q(self) -> int:
        return self.n_heads * (self.nope_dim + self.rope_dim)

    def matrices(self, d_model: int) -> int:
        """Down and up for queries, down and up for keys and values, out, the indexer's three."""
        D, H, r = d_model, self.n_heads, self.q_rank
        queries = D * self._q if r is None else D * r + r * self._q
        keys_values = D * (self.kv_rank + self.rope_dim) + self.kv_rank * H * (
            self.nope_dim + self.v_dim
        )
        indexer = (r or 0) * self.indexer_heads * self.indexer_dim + D * (
            self.indexer_dim + self.indexer_heads
        )
        return queries + keys_values + H * self.v_dim * D * (2 if self.output_gate else 1) + indexer

    def vectors(self, d_model: int) -> int:
        """Norms of the latents; the indexer's layer norm of its keys."""
        return (self.q_rank or 0) + self.kv_rank + 2 * self.indexer_dim

    def score_flops(self, context: float) -> float:
        """As in training, keys and values expanded; without the indexer's own scores."""
        if self.indexer_heads:
            return super().score_flops(context)
        return 2 * context * self.n_heads * (self.nope_dim + self.rope_dim + self.v_dim)

    def cache(self) -> int:
        """The latent, the rotary key that all heads share, and the indexer's key."""
        return self.kv_rank + self.rope_dim + self.indexer_dim

    def saved(self, d_model: int) -> int:
        """Input, both latents before and after their norm, q, k, v and the heads' output."""
        if self.indexer_heads:
            return super().saved(d_model)
        latents = 2 * (self.q_rank or 0) + 2 * self.kv_rank
        return d_model + latents + 2 * self._q + 2 * self.n_heads * self.v_dim
