r"""FLOPs of a ModelSpec, per token.

.. math:: \text{forward} = \underbrace{2 \cdot \text{numbers in the matrices a token
    meets}}_{\approx 2 A_{head}} + \underbrace{\textstyle\sum_{layers} 4 c H d}_{\text{attention
    scores}} + \underbrace{\textstyle\sum_{MoE} 2 k D}_{\text{weighting}}

A multiplication and an addition are 2 FLOPs. The embedding is looked up, not multiplied; a tied
head is multiplied. Norms, activations, softmax and rotary positions are not counted. torch's
FlopCounterMode counts products alone: all but the weighting.
"""

from dataclasses import dataclass

from moe_core.validate import boolean, whole

from .spec import ModelSpec


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token, in float because a mean context or a mean top_k may be a fraction.

    Attributes:
        matrices: projections, routers, experts, head. scores: attention beyond its projections.
            weighting: experts' outputs, times their weights and added up.
    """

    matrices: float
    scores: float
    weighting: float

    @property
    def total(self) -> float:
        """All three."""
        return self.matrices + self.scores + self.weighting

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.matrices * factor, self.scores * factor, self.weighting * factor)


def forward_flops(spec: ModelSpec, seq_len: int, *, causal: bool = True) -> Flops:
    """FLOPs of the forward pass, per token of a sequence of ``seq_len``.

    Args:
        seq_len: N, tokens of a sequence.
        causal: a token pays for the positions it sees, (N + 1) / 2 on average. False: for all N, as
            a kernel does that computes what it masks, and as FlopCounterMode counts.

    Raises:
        ValueError: seq_len is not a positive whole number, the model has an encoder (its tokens are
            others than the decoder's), or a mixer whose FLOPs are not known.
    """
    whole(1, seq_len=seq_len)
    boolean(causal=causal)
    spec.check_decoder_only()
    D = spec.d_model
    scores = sum(
        mixer.score_flops(_context(mixer, seq_len, causal))
        for layer in spec.layers
        for mixer in layer.mixers
    )
    weighting = sum(2 * moe.experts_per_token * moe.expert_width(D) for moe in spec.moe_layers)
    return Flops(2 * active_matrices(spec), scores, weighting)


def training_flops(spec: ModelSpec, seq_len: int, *, causal: bool = True) -> Flops:
    """FLOPs of forward and backward: 3 times the forward pass.

    Every product has two gradients of its own size.

    Flash attention computes the scores once more in its backward pass: 3.5 times the scores instead
    of 3. Recomputing whole layers adds one forward pass. Neither is counted.
    """
    return forward_flops(spec, seq_len, causal=causal) * 3


def active_matrices(spec: ModelSpec) -> float:
    """Numbers in the matrices that one token meets: A_head without biases and norms."""
    D = spec.d_model
    matrices = {
        part: numbers[0]
        for part, numbers in spec.numbers.items()
        if part not in ("embedding", "head", "experts")
    }
    experts = sum(
        moe.experts_per_token / moe.n_experts * moe.parts(D)["experts"][0]
        for moe in spec.moe_layers
    )
    return sum(matrices.values()) + experts + D * spec.vocab_size


def _context(mixer, seq_len: int, causal: bool) -> float:
    """Positions a token looks at: all N, or the mean of 1..N; at most the mixer's window."""
    if not causal:
        return seq_len
    window = int(mixer.seen(seq_len))
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
