r"""Memory of activations: what the forward pass keeps for the backward pass.

Counted as good kernels do: every product keeps its input, a norm its input, attention q, k, v, its
output and one number a head (flash attention, so nothing grows with the square of the sequence), an
MLP what comes out of its first product, the activation and what goes into the second:

.. math:: \text{gated MLP: } 4F \text{ or } 2F \text{ if the activation is computed again}, \qquad
    \text{MoE: } D + E + K(2D + 4F) + \text{shared}

Whatever is kept twice because of how a layer is written comes on top: the tests add, for our own
``LanguageModel``, what that is, name by name, and then agree to the byte with the tensors that
autograd saves.
"""

from moe_core.validate import at_least, one_of

from .feed_forward import DenseSpec, MoESpec
from .spec import LayerSpec, ModelSpec

RECOMPUTE = ("nothing", "activation", "layer")
FLOAT32, INT64 = 4, 8


def activation_bytes_per_token(
    spec: ModelSpec, bytes_per_number: float = 2, *, recompute: str = "nothing"
) -> dict[str, float]:
    """Bytes kept per token, by part of the model.

    Multiply their sum by the tokens of a micro-batch on a rank.

    A dropless MoE at perfect balance. What a router computes, statistics of norms and attention,
    and the loss are in float32, indices in int64.

    Args:
        bytes_per_number: 2 for bfloat16.
        recompute: "nothing"; "activation": what lies between the two products of an MLP is computed
            again in the backward pass (the backend "fused" does it); "layer": a layer keeps its
            input alone and runs again, so that one whole layer at a time comes on top (the largest
            counts, part "one layer").

    Returns:
        Part -> bytes per token: "norms", "attention", "router", "experts", "shared", "dense",
        "head"; with recompute="layer": "layer inputs", "one layer", "norms" (the last one), "head".

    Raises:
        ValueError: a value is out of its range, the model has an encoder, or a mixer's kernel
            decides what it keeps.
    """
    at_least(0, bytes_per_number=bytes_per_number)
    one_of(RECOMPUTE, recompute=recompute)
    spec.check_decoder_only()
    D, b = spec.d_model, bytes_per_number
    # the last norm, the head's input, and the log-probabilities that the cross-entropy keeps
    end = {"norms": spec.n_final_norms * _norm(D, b), "head": b * D + FLOAT32 * spec.vocab_size}
    layers = [_layer(layer, D, b, recompute == "activation") for layer in spec.layers]
    if recompute == "layer":
        return {
            "layer inputs": b * D * len(layers),
            "one layer": max(sum(layer.values()) for layer in layers),
            **end,
        }
    parts = {
        part: 0.0 for part in ("norms", "attention", "router", "experts", "shared", "dense", "head")
    }
    for counted in (*layers, end):
        for part, value in counted.items():
            parts[part] += value
    return parts


def _norm(d_model: int, b: float) -> float:
    """Its input and one statistic."""
    return b * d_model + FLOAT32


def _mlp(d_ff: int, glu: bool, again: bool) -> int:
    """The first product's output; unless recomputed, also the gate's activation and the product."""
    return (2 * d_ff if glu else d_ff) + (0 if again else (2 * d_ff if glu else d_ff))


def _layer(layer: LayerSpec, D: int, b: float, again: bool) -> dict[str, float]:
    parts = {
        "norms": layer.n_norms * _norm(D, b),
        "attention": 0.0,
        "router": 0.0,
        "experts": 0.0,
        "shared": 0.0,
        "dense": 0.0,
    }
    for mixer in layer.mixers:
        parts["attention"] += (
            b * mixer.saved(D) + FLOAT32 * mixer.n_heads
        )  # the log-sum-exp of a head's scores
    for f in layer.feed_forwards:
        if isinstance(f, DenseSpec):
            parts["dense"] += b * (D + _mlp(f.d_ff, f.glu, again))
        else:
            for part, value in _moe(f, D, b, again).items():
                parts[part] += value
    return parts


def _moe(moe: MoESpec, D: int, b: float, again: bool) -> dict[str, float]:
    k, width, everyone = (
        moe.experts_per_token,
        moe.expert_width(D),
        moe.n_experts + moe.n_zero_experts,
    )
    also_read = (
        moe.n_shared_experts or moe.latent_dim
    ) and b != FLOAT32  # in float32 that is the tensor the router keeps
    return {
        # its input in float32, a score for every expert, a weight and an index for every slot
        "router": (
            FLOAT32 * (D + everyone + moe.top_k) + INT64 * moe.top_k + (b * D if also_read else 0)
        ),
        # rows in, hidden values, rows out (whose product with the gradient is the gradient of the
        # weights); what leads out of a latent
        "experts": (
            k * b * (2 * width + _mlp(moe.d_ff, moe.glu, again))
            + (b * width if moe.latent_dim else 0)
        ),
        "shared": b * _mlp(moe.shared_width, moe.glu, again) if moe.n_shared_experts else 0.0,
    }
