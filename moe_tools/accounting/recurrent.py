"""Linear attention and state spaces in numbers: mixers whose memory of the past does not grow.

Convolutions count as matrices: each of their numbers is multiplied once a token. What the
recurrence itself costs hangs on how a kernel cuts the sequence into chunks, so these kinds refuse
``score_flops`` and ``saved``.
"""

from dataclasses import dataclass

from moe_core.validate import boolean, whole

from .attention import Mixer


@dataclass(frozen=True)
class GatedDeltaNetSpec(Mixer):
    r"""Gated delta rule as in Qwen3-Next.

    Matrices: D(2K + 2V + 2 H_v) + c(2K + V) + VD; vectors: 2 H_v + d_v.

    Attributes:
        n_k_heads, n_v_heads, head_k_dim, head_v_dim: H_k, H_v, d_k, d_v; K = H_k d_k and V = H_v
            d_v.
        conv: c, the length of the short convolution over q, k and v.

    Raises:
        ValueError: a size is not a positive whole number.

    Source: Yang et al. 2024 (arXiv 2412.06464); layer shapes of transformers' Qwen3Next.
    """

    n_k_heads: int
    n_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv: int = 4

    def __post_init__(self):
        whole(
            1,
            n_k_heads=self.n_k_heads,
            n_v_heads=self.n_v_heads,
            head_k_dim=self.head_k_dim,
            head_v_dim=self.head_v_dim,
            conv=self.conv,
        )

    @property
    def _widths(self) -> tuple[int, int]:
        return self.n_k_heads * self.head_k_dim, self.n_v_heads * self.head_v_dim

    def matrices(self, d_model: int) -> int:
        """q, k, v, output gate, two gates a head; the convolution; out."""
        K, V = self._widths
        return (
            d_model * (2 * K + 2 * V + 2 * self.n_v_heads) + self.conv * (2 * K + V) + V * d_model
        )

    def vectors(self, d_model: int) -> int:
        """Decay and time step of every head, and the norm of the output."""
        return 2 * self.n_v_heads + self.head_v_dim

    def state(self) -> int:
        """One matrix a head, and what the convolution has yet to see again."""
        K, V = self._widths
        return self.n_v_heads * self.head_k_dim * self.head_v_dim + (self.conv - 1) * (2 * K + V)


@dataclass(frozen=True)
class KimiDeltaSpec(Mixer):
    r"""Kimi delta attention: delta rule with a decay for every channel; P = H d.

    .. math:: 4DP + 3cP + DH + (Dd + dP) \cdot \text{2 gates} \quad\text{and}\quad P + H + d \text{
        in vectors}

    Attributes:
        n_heads, head_dim: H and d.
        conv: c, the length of the short convolutions over q, k and v.
        full_rank_gate: the gate of the output is one D x P matrix, not a product of two (Kimi-K3).

    Raises:
        ValueError: a size is not a positive whole number.

    Source: Kimi Linear (arXiv 2510.26692); layer shapes of transformers' KimiLinear.
    """

    n_heads: int
    head_dim: int
    conv: int = 4
    full_rank_gate: bool = False

    def __post_init__(self):
        whole(1, n_heads=self.n_heads, head_dim=self.head_dim, conv=self.conv)
        boolean(full_rank_gate=self.full_rank_gate)

    def matrices(self, d_model: int) -> int:
        """q, k, v and out; convolutions; the delta rule's rate; decay and output gate."""
        D, d, P = d_model, self.head_dim, self.n_heads * self.head_dim
        low_rank = D * d + d * P
        return (
            4 * D * P
            + 3 * self.conv * P
            + D * self.n_heads
            + low_rank
            + (D * P if self.full_rank_gate else low_rank)
        )

    def vectors(self, d_model: int) -> int:
        """Bias of the decay, its scale a head, and the norm of the output."""
        return self.n_heads * self.head_dim + self.n_heads + self.head_dim

    def state(self) -> int:
        """One matrix a head, and what the convolutions have yet to see again."""
        return self.n_heads * self.head_dim * (self.head_dim + 3 * (self.conv - 1))


@dataclass(frozen=True)
class MambaSpec(Mixer):
    r"""Mamba-1 with the norms of Jamba.

    Matrices: I(3D + c + 2r + 2S); vectors: I(S + 3) + r + 2S.

    Attributes:
        d_inner, d_state, d_conv, dt_rank: channels I, state S of a channel, length c of the
            convolution, rank r of the time step.

    Raises:
        ValueError: a size is not a positive whole number.

    Source: Gu and Dao 2023 (arXiv 2312.00752); Jamba (arXiv 2403.19887) for the three norms.
    """

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int

    def __post_init__(self):
        whole(
            1, d_inner=self.d_inner, d_state=self.d_state, d_conv=self.d_conv, dt_rank=self.dt_rank
        )

    def matrices(self, d_model: int) -> int:
        """In (twice as wide, for the gate), convolution, (time step, B, C), time step up, out."""
        return self.d_inner * (3 * d_model + self.d_conv + 2 * self.dt_rank + 2 * self.d_state)

    def vectors(self, d_model: int) -> int:
        """A and D, biases of convolution and time step, norms of time step, B and C."""
        return self.d_inner * (self.d_state + 3) + self.dt_rank + 2 * self.d_state

    def state(self) -> int:
        """The state of every channel, and what the convolution has yet to see again."""
        return self.d_inner * (self.d_state + self.d_conv - 1)


@dataclass(frozen=True)
class LightningAttentionSpec(Mixer):
    """Lightning attention as in MiniMax-Text-01; P = H d.

    Linear attention with a fixed decay, and a norm and a gate on its output.

    Attributes:
        n_heads, head_dim: H and d.

    Raises:
        ValueError: a size is not a positive whole number.

    Source: MiniMax-01 (arXiv 2501.08313); layer shapes of transformers' MiniMax.
    """

    n_heads: int
    head_dim: int

    def __post_init__(self):
        whole(1, n_heads=self.n_heads, head_dim=self.head_dim)

    def matrices(self, d_model: int) -> int:
        """q, k, v, gate and out."""
        return 5 * d_model * self.n_heads * self.head_dim

    def vectors(self, d_model: int) -> int:
        """The norm of the output."""
        return self.n_heads * self.head_dim

    def state(self) -> int:
        """One matrix a head."""
        return self.n_heads * self.head_dim**2
