"""SoftMoE against its formula, and what it is not: causal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core import SoftMoE

from .helpers import close, fast, mask, mlp_of_expert, randn, seeded


def soft(d_model=8, d_ff=12, n_experts=3, **options) -> SoftMoE:
    return seeded(SoftMoE, d_model, d_ff, n_experts, **options)


def by_hand(moe, x, padding_mask=None):
    """One sequence after the other, one slot after the other; padding is cut off before anything is computed."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        real = torch.ones(x.shape[1], dtype=torch.bool) if padding_mask is None else padding_mask[b]
        tokens = x[b, real]
        if len(tokens) == 0:
            continue
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        logits = unit @ (moe.scale * moe.phi / moe.phi.norm(dim=0, keepdim=True))
        outputs = []
        for s in range(moe.phi.shape[1]):
            weights = logits[:, s].exp() / logits[:, s].exp().sum()
            outputs.append(mlp_of_expert(moe.experts, s // moe.slots_per_expert, weights @ tokens))
        combine = logits.exp() / logits.exp().sum(-1, keepdim=True)
        y[b, real] = combine @ torch.stack(outputs)
    return y


@fast
@given(
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
    st.booleans(),
)
def test_soft_moe_equals_its_formula(B, N, E, S, seed, padded):
    moe = seeded(SoftMoE, 4, 6, E, slots_per_expert=S, seed=seed).double()
    moe.scale.data.fill_(3.0)
    x, padding_mask = (
        randn(B, N, 4, seed=seed, dtype=torch.float64),
        mask(B, N, seed=seed) if padded else None,
    )
    assert close(moe(x, padding_mask), by_hand(moe, x, padding_mask))


@fast
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 99), st.sampled_from([0.0, 1.0, 1e4]))
def test_dispatch_sums_to_one_over_real_tokens_and_combine_over_slots(B, N, seed, scale):
    moe, padding_mask = soft(slots_per_expert=2), mask(B, N, seed=seed)
    moe.scale.data.fill_(scale)
    dispatch, combine = moe.mixing_weights(randn(B, N, 8, seed=seed), padding_mask)
    assert close(dispatch.sum(1), padding_mask.any(-1, keepdim=True).float().expand(B, 6))
    assert close(combine.sum(-1), padding_mask.float())
    assert (dispatch[~padding_mask] == 0).all() and (combine[~padding_mask] == 0).all()


def test_a_tokens_length_does_not_change_its_weights():
    moe, x = soft(), randn(1, 5, 8)
    for a, b in zip(moe.mixing_weights(x), moe.mixing_weights(1000 * x)):
        assert close(a, b)


def test_one_slot_gives_every_token_the_same_output():
    y = soft(n_experts=1)(randn(2, 5, 8))
    assert close(y, y[:, :1].expand_as(y)) and not torch.allclose(y[0, 0], y[1, 0], atol=1e-3)


def test_it_is_not_causal_but_a_sequence_sees_only_itself():
    moe, x = soft(), randn(2, 5, 8)
    changed = x.clone()
    changed[0, 4] += 1
    difference = (moe(changed) - moe(x)).abs().amax(-1)
    assert (difference[0, :4] > 1e-5).all()  # earlier tokens of the same sequence feel it
    assert (difference[1] == 0).all()


def test_the_order_of_the_tokens_does_not_matter():
    moe, x = soft(), randn(2, 5, 8)
    assert close(moe(x.flip(1)).flip(1), moe(x))


def test_padding_gets_exactly_zero_and_changes_nothing():
    moe, x = soft(), randn(2, 5, 8).requires_grad_()
    padding_mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    y = moe(x, padding_mask)
    y.sum().backward()
    assert (
        (y[~padding_mask] == 0).all()
        and (x.grad[~padding_mask] == 0).all()
        and x.grad.isfinite().all()
    )
    assert close(y[0, padding_mask[0]], moe(x[:1, [0, 1, 3]])[0])


def test_a_token_of_zeros_is_allowed():
    x = randn(1, 3, 8)
    x[0, 1] = 0
    x.requires_grad_()
    y = soft()(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_gradients_are_right_in_float64():
    moe = soft(d_model=3, d_ff=2, n_experts=2, backend="loop").double()
    names, parameters = zip(*moe.named_parameters())
    run = lambda x, *values: torch.func.functional_call(moe, dict(zip(names, values)), (x,))
    assert torch.autograd.gradcheck(
        run, (randn(1, 3, 3, dtype=torch.float64).requires_grad_(), *parameters)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_output_has_the_inputs_dtype_and_every_parameter_a_gradient(dtype):
    moe, x = soft(slots_per_expert=2).to(dtype), randn(2, 5, 8, dtype=dtype)
    y = moe(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype and moe.mixing_weights(x)[0].dtype == torch.promote_types(
        dtype, torch.float32
    )
    for name, parameter in moe.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert torch.allclose(y.double(), soft(slots_per_expert=2).double()(x.double()), atol=0.02)


def test_autocast_changes_the_experts_only():
    moe, x = soft(), randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, weights = moe(x), moe.mixing_weights(x)
    assert y.dtype == torch.float32 and torch.allclose(y, moe(x), atol=0.01)
    assert all(torch.equal(a, b) for a, b in zip(weights, moe.mixing_weights(x)))


def test_weights_survive_a_state_dict():
    moe, other, x = soft(), SoftMoE(8, 12, 3), randn(1, 4, 8)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))
    assert set(moe.state_dict()) == {"phi", "scale", "experts.gate_up_proj", "experts.down_proj"}


def test_it_never_waits_for_a_tensors_value():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            moe, x = SoftMoE(8, 16, 4, slots_per_expert=2), torch.randn(2, 3, 8, requires_grad=True)
            moe(x, torch.ones(2, 3, dtype=torch.bool)).square().sum().backward()
            assert x.grad.shape == x.shape
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft(slots_per_expert=0), "slots_per_expert=0 must be a whole number, at least 1"),
        (lambda: soft(n_experts=0), "n_experts=0 must be a whole number"),
        (lambda: soft(activation="swish"), "activation='swish' must be one of"),
        (lambda: soft()(randn(2, 3, 7)), r"x has shape \(2, 3, 7\), must be \(B, N, d_model=8\)"),
        (lambda: soft()(randn(2, 3, 8), torch.ones(2, 3)), "padding_mask must be bool of shape"),
        (
            lambda: soft()(randn(2, 3, 8), torch.ones(3, 2, dtype=torch.bool)),
            "padding_mask must be bool of shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
