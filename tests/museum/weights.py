"""Weights that come from elsewhere: which way round they lie."""

import torch
import torch.nn.functional as F

from moe_tools.interop import layouts

from .bug import Bug


# 20 ------------------------------------------------------------------------------------------------------------------------------
def turned_if_the_shape_says_so(stored, d_model, d_ff):
    expected = len(stored), 2 * d_ff, d_model
    return stored if stored.shape == expected else stored.transpose(1, 2)


def turned_as_declared(stored, d_model, d_ff):
    return layouts.transposed("gate_up_proj").read([stored])


def a_weight_does_the_same_before_and_after(load):
    """A weight stored as (E, D, 2F), to be multiplied from the right, does the same once it is loaded; also if D = 2F."""
    for d_model, d_ff in ((6, 4), (4, 6), (8, 4)):
        stored, x = torch.randn(3, d_model, 2 * d_ff), torch.randn(5, d_model)
        weight = load(stored, d_model, d_ff)
        for e in range(3):
            error = (F.linear(x, weight[e]) - x @ stored[e]).abs().max().item()
            assert error < 1e-5, f"with D={d_model}, F={d_ff} expert {e} is off by {error:.1f}"


BUGS = [
    Bug(
        20,
        "the layout of a weight is guessed from its shape",
        "a model loads without a word and answers nonsense",
        "if D = 2F, a matrix and its transpose have the same shape",
        "transformers #47031; unsloth-zoo #849",
        turned_if_the_shape_says_so,
        turned_as_declared,
        a_weight_does_the_same_before_and_after,
        r"^AssertionError: with D=8, F=4",
    )
]
