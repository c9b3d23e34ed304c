"""The dense model that an MoE is compared with: of equal active, or of equal total parameters."""

from dataclasses import replace
from typing import NamedTuple

from .feed_forward import DenseSpec, MoESpec
from .spec import ModelSpec


class DenseEquivalent(NamedTuple):
    """A dense model, and the width F of what replaced its MoE layers.

    Its real size is ``spec.total_params``.
    """

    d_ff: int
    spec: ModelSpec


def dense_of_equal_active(spec: ModelSpec) -> DenseEquivalent:
    """The model with a dense MLP for every MoE, of nearly the same active parameters.

    F is a whole number, so A_all is met as nearly as one unit of width allows.

    A token then multiplies as many numbers as before. Everything else stays: attention, embeddings,
    layers that are dense already.

    Raises:
        ValueError: the model has no MoE layer.
    """
    return _dense(spec, spec.active_params)


def dense_of_equal_total(spec: ModelSpec) -> DenseEquivalent:
    """The same, as near as can be to ``total_params``: as much memory, and far more FLOPs.

    Raises ValueError without an MoE layer.
    """
    return _dense(spec, spec.total_params)


def _dense(spec: ModelSpec, params: int) -> DenseEquivalent:
    if not spec.moe_layers:
        raise ValueError("the model has no MoE layer: it is dense already")
    glu, bias = spec.moe_layers[0].glu, spec.moe_layers[0].bias

    def with_width(d_ff: int) -> ModelSpec:
        """The model with a dense MLP of this width for every MoE."""
        dense = DenseSpec(d_ff, glu, bias)
        layers = (
            replace(
                layer,
                feed_forwards=tuple(
                    dense if isinstance(f, MoESpec) else f for f in layer.feed_forwards
                ),
            )
            for layer in spec.layers
        )
        return replace(spec, layers=tuple(layers), source="")

    # Every unit of width adds the same number of parameters, so two widths give the line that the
    # third lies on.
    one, two = with_width(1).total_params, with_width(2).total_params
    d_ff = max(1, 1 + round((params - one) / (two - one)))
    return DenseEquivalent(d_ff, with_width(d_ff))
