"""The bank of experts as one operation, made for a processor's caches; on any device and dtype.

``python -m moe_tools.bench layer`` measures it. torch.compile sees one opaque operation, so reading
the counts inside it breaks no graph.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .activations import Activation

# torch.library.custom_op would do the same, and load torch._dynamo (3 s) with the first call.
_LIBRARY = torch.library.Library("moe_core", "DEF")
_BANK = "Tensor rows, Tensor counts, Tensor gate_up, Tensor down"
_ACTIVATION = "str name, bool glu, float? limit, float up_offset"
_BIASES = "Tensor? gate_up_bias, Tensor? down_bias"
_BACKWARD = f"Tensor grad, Tensor projected, {_BANK}, Tensor? keep, bool bias, {_ACTIVATION}"
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_LIBRARY.define(f"experts({_BANK}, {_BIASES}, Tensor? keep, {_ACTIVATION}) -> (Tensor, Tensor)")
_LIBRARY.define(f"experts_backward({_BACKWARD}) -> {_FIVE}")


def fused(
    rows_AD: Tensor,
    counts_E: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    keep_AF: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Rows (A, D) sorted by expert, counts (E,) -> (A, D). The others as in ``backends``."""
    weights = gate_up_proj, down_proj, gate_up_bias, down_bias
    act = activation.name, activation.glu, activation.limit, activation.up_offset
    return torch.ops.moe_core.experts(rows_AD, counts_E, *weights, keep_AF, *act)[0]


def _forward(rows_AD, counts_E, gate_up_proj, down_proj, gate_up_bias, down_bias, keep_AF, *act):
    activation = Activation.known(*act)
    out_AD = _like(rows_AD)
    projected_AH = rows_AD.new_empty(rows_AD.shape[0], gate_up_proj.shape[1])  # H is 2F, or F
    # One expert at a time through both products: what lies between is still in the cache.
    for e, group in _groups(counts_E):
        _project(rows_AD[group], gate_up_proj[e], gate_up_bias, e, out=projected_AH[group])
        hidden_nF = activation(projected_AH[group])
        if keep_AF is not None:
            hidden_nF = hidden_nF * keep_AF[group]
        _project(hidden_nF, down_proj[e], down_bias, e, out=out_AD[group])
    return out_AD, projected_AH


def _backward(
    grad_AD, projected_AH, rows_AD, counts_E, gate_up_proj, down_proj, keep_AF, bias, *act
):
    activation = Activation.known(*act)
    grads = _gradients_like(rows_AD, gate_up_proj, down_proj, bias)
    grad_rows_AD, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias = grads
    for e, group in _groups(counts_E):
        grad_nD, grad_hidden_nF = grad_AD[group], grad_AD[group] @ down_proj[e]
        if keep_AF is not None:
            grad_hidden_nF *= keep_AF[group]
        # Only the first product was kept; the activation is computed again.
        grad_projected_nH, hidden_nF = activation.pullback(grad_hidden_nF, projected_AH[group])
        if keep_AF is not None:
            hidden_nF *= keep_AF[group]
        # Every gradient is written where it belongs, once; zeros where there are no rows.
        torch.mm(grad_nD.t(), hidden_nF, out=grad_down[e])
        torch.mm(grad_projected_nH.t(), rows_AD[group], out=grad_gate_up[e])
        torch.mm(grad_projected_nH, gate_up_proj[e], out=grad_rows_AD[group])
        if bias:
            grad_gate_up_bias[e], grad_down_bias[e] = grad_projected_nH.sum(0), grad_nD.sum(0)
    return grads


def _gradients_like(rows_AD, gate_up_proj, down_proj, bias: bool) -> tuple[Tensor, ...]:
    E, width, D = gate_up_proj.shape
    biases = (E, width if bias else 0), (E, D if bias else 0)
    zeros = [rows_AD.new_zeros(shape) for shape in biases]
    return _like(rows_AD), _like(gate_up_proj), _like(down_proj), *zeros


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    rows_AD, counts_E, gate_up_proj, down_proj, gate_up_bias, _, keep_AF, *ctx.activation = inputs
    ctx.set_materialize_grads(False)  # else zeros are made as the gradient of what was kept
    ctx.save_for_backward(output[1], rows_AD, counts_E, gate_up_proj, down_proj, keep_AF)
    ctx.bias = gate_up_bias is not None


def _autograd(ctx, grad_AD, _grad_projected):
    if grad_AD is None:
        return (None,) * 11
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError('backend="fused" has no second derivative: take "loop" or "padded"')
    inputs = grad_AD.contiguous(), *ctx.saved_tensors, ctx.bias, *ctx.activation
    rows, gate_up, down, *biases = torch.ops.moe_core.experts_backward(*inputs)
    return rows, None, gate_up, down, *(biases if ctx.bias else (None, None)), *(None,) * 5


def _groups(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows."""
    start = 0
    for e, count in enumerate(counts_E.tolist()):
        yield e, slice(start, start + count)
        start += count


def _project(rows_nI: Tensor, weight_OI: Tensor, bias_EO: Tensor | None, e: int, out: Tensor):
    """x W^T (+ b) into ``out`` (n, O)."""
    n = len(rows_nI)
    if n * n * 64 > weight_OI.numel():  # measured: from here on the copy costs more than it saves
        torch.mm(rows_nI, weight_OI.t(), out=out)
    elif n > 0:  # few rows: reading the weight takes the time, and W x^T streams it
        # One row would become a matrix-vector product, three times slower than two rows.
        columns_In = rows_nI.t() if n > 1 else rows_nI.expand(2, -1).contiguous().t()
        out.copy_(torch.mm(weight_OI, columns_In)[:, :n].t())
    if bias_EO is not None:
        out += bias_EO[e]


_LIBRARY.impl("experts", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("experts_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_autograd("moe_core::experts", _autograd, setup_context=_setup, lib=_LIBRARY)


@torch.library.register_fake("moe_core::experts", lib=_LIBRARY)
def _(rows_AD, counts_E, gate_up_proj, *rest):
    return _like(rows_AD), rows_AD.new_empty(rows_AD.shape[0], gate_up_proj.shape[1])


@torch.library.register_fake("moe_core::experts_backward", lib=_LIBRARY)
def _(grad_AD, projected_AH, rows_AD, counts_E, gate_up_proj, down_proj, keep_AF, bias, *act):
    return _gradients_like(rows_AD, gate_up_proj, down_proj, bias)


# Shapes in, what FlopCounterMode adds up out: two for each multiplication of the two products.
@register_flop_formula(torch.ops.moe_core.experts)
def _(rows, counts, gate_up, down, *rest, out_shape=None, **kwargs) -> int:
    return 2 * rows[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.moe_core.experts_backward)
def _(grad, projected, rows, counts, gate_up, down, *rest, out_shape=None, **kwargs) -> int:
    return 4 * rows[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])
