"""The bank of experts: against the formula, and its backends against each other."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe_core import Experts, FeedForward, TopKRouter
from moe_core.experts import ACTIVATIONS

from .helpers import cases, experts_token_by_token, fast, mlp_of_expert, randn, routing_of, seeded


def bank(d_model=8, d_ff=16, n_experts=4, **options) -> Experts:
    return seeded(Experts, d_model, d_ff, n_experts, **options)


def gradients(experts, x, routing):
    """Output and gradients of x, both banks and the combine weights, for a fixed linear loss."""
    x, weights = x.detach().requires_grad_(), routing.expert_weights.detach().requires_grad_()
    y = experts(x, replace(routing, expert_weights=weights))
    probe = randn(*y.shape, seed=9, dtype=y.dtype)
    return y, *torch.autograd.grad(y, (x, weights, experts.gate_up_proj, experts.down_proj), probe)


# The formula


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_equal_the_formula_token_by_token(activation, glu):
    experts, x = bank(activation=activation, glu=glu, backend="loop").double(), randn(2, 5, 8, dtype=torch.float64)
    routing = seeded(TopKRouter, 8, 4, 2)(x)
    assert torch.allclose(experts(x, routing), experts_token_by_token(experts, x, routing), atol=1e-12, rtol=0)


@fast
@given(cases())
def test_experts_equal_the_formula_whatever_the_routing(case):
    experts, x = bank(case.D, 3, case.E).double(), case.x(torch.float64)
    routing = case.router()(x, case.padding_mask())
    expected = experts_token_by_token(experts, x, routing)
    assert torch.allclose(experts(x, routing), expected, atol=1e-12, rtol=0)
    assert (experts(x, routing)[~routing.capacity_mask.any(-1)] == 0).all()


def test_the_activations_are_what_they_are_called():
    h = torch.tensor([-2.0, 0.0, 3.0])
    assert ACTIVATIONS["relu"](h).tolist() == [0, 0, 3] and ACTIVATIONS["relu2"](h).tolist() == [0, 0, 9]
    assert torch.allclose(ACTIVATIONS["silu"](h), h / (1 + (-h).exp()))
    assert torch.allclose(ACTIVATIONS["gelu"](h), h * 0.5 * (1 + torch.erf(h / 2**0.5)))


def test_weights_lie_as_the_ecosystem_keeps_them():
    assert bank().gate_up_proj.shape == (4, 32, 8) and bank().down_proj.shape == (4, 8, 16)
    assert bank(glu=False).gate_up_proj.shape == (4, 16, 8)


def test_the_gate_comes_first_and_only_the_gate_is_activated():
    experts = bank(d_model=1, d_ff=1, n_experts=1, activation="relu")
    with torch.no_grad():
        experts.gate_up_proj[0] = torch.tensor([[1.0], [-1.0]])
        experts.down_proj.fill_(1)
    routing = routing_of([[[0], [0]]], 1)
    assert experts(torch.tensor([[[3.0], [-3.0]]]), routing).flatten().tolist() == [-9.0, 0.0]


def test_a_feed_forward_is_one_expert():
    ff, experts = seeded(FeedForward, 8, 16), bank(n_experts=1)
    with torch.no_grad():
        experts.gate_up_proj[0], experts.down_proj[0] = ff.gate_up_proj.weight, ff.down_proj.weight
    x = randn(2, 3, 8)
    assert torch.allclose(ff(x), experts(x, routing_of(torch.zeros(2, 3, 1), 1)), atol=1e-6)
    assert torch.allclose(ff(x)[0, 0], mlp_of_expert(experts, 0, x[0, 0]), atol=1e-6)


def test_experts_start_different_within_the_bounds_of_linear():
    experts = bank(d_model=16, d_ff=64)
    assert experts.gate_up_proj.abs().max() <= 1 / 4 and experts.down_proj.abs().max() <= 1 / 8
    assert experts.gate_up_proj.abs().max() > 0.99 / 4 and experts.down_proj.abs().max() > 0.99 / 8
    assert not torch.equal(experts.gate_up_proj[0], experts.gate_up_proj[1])


# Backends


@fast
@given(cases(), st.booleans(), st.sampled_from(sorted(ACTIVATIONS)))
def test_backends_agree_forward_and_backward(case, glu, activation):
    loop = bank(case.D, 8, case.E, glu=glu, activation=activation, backend="loop")
    grouped = copy.deepcopy(loop)
    grouped.backend = "grouped"
    x = case.x()
    routing = case.router()(x, case.padding_mask())
    for a, b in zip(gradients(loop, x, routing), gradients(grouped, x, routing)):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("indices", [
    [[[0, 1], [0, 1], [1, 0]]],  # experts 2 and 3 are empty
    [[[3, 2], [3, 2], [3, 2]]],  # the first ones are
], ids=["last empty", "first empty"])
def test_backends_agree_in_every_dtype_with_empty_experts(indices, dtype):
    loop, x = bank(backend="loop").to(dtype), randn(1, 3, 8, dtype=dtype)
    grouped = copy.deepcopy(loop)
    grouped.backend = "grouped"
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(gradients(loop, x, routing_of(indices, 4)), gradients(grouped, x, routing_of(indices, 4))):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
def test_all_tokens_to_one_expert_is_that_expert(backend):
    experts, x = bank(backend=backend), randn(2, 3, 8)
    y = experts(x, routing_of(torch.full((2, 3, 1), 2), 4))
    expected = torch.stack([mlp_of_expert(experts, 2, token) for token in x.flatten(0, 1)]).view(2, 3, 8)
    assert torch.allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
def test_an_expert_without_rows_has_a_gradient_of_exactly_zero(backend):
    experts = bank(backend=backend)
    experts(randn(1, 3, 8), routing_of([[[0], [2], [0]]], 4)).square().sum().backward()
    for weight in (experts.gate_up_proj, experts.down_proj):
        busy = weight.grad.abs().sum((1, 2)) > 0
        assert busy.tolist() == [True, False, True, False]


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_without_a_kept_row_output_and_gradients_are_zero_not_none(backend, shape):
    experts, x = bank(backend=backend), randn(*shape, 8).requires_grad_()
    routing = routing_of(torch.zeros(*shape, 1), 4, reasons=torch.ones(*shape, 1), capacity=0)
    y = experts(x, routing)
    y.sum().backward()
    assert y.shape == x.shape and (y == 0).all() and (x.grad == 0).all()
    assert (experts.gate_up_proj.grad == 0).all() and (experts.down_proj.grad == 0).all()


@pytest.mark.parametrize(("d_model", "d_ff", "dtype", "chosen"), [
    (8, 16, torch.float32, "grouped"), (4, 12, torch.float32, "grouped"), (8, 16, torch.bfloat16, "grouped"),
    (8, 16, torch.float64, "loop"), (7, 16, torch.float32, "loop"), (8, 9, torch.float32, "loop"), (4, 12, torch.bfloat16, "loop"),
])
def test_auto_falls_back_to_the_loop_where_the_grouped_matmul_cannot_go(d_model, d_ff, dtype, chosen):
    experts, x = bank(d_model, d_ff).to(dtype), randn(2, 3, d_model, dtype=dtype).requires_grad_()
    assert experts.choose_backend(x.flatten(0, 1)) == chosen
    routing = seeded(TopKRouter, d_model, 4, 2)(x)
    y = experts(x, routing)
    y.float().square().sum().backward()  # and it runs
    assert y.dtype == dtype and x.grad.isfinite().all()


def test_an_explicit_backend_is_not_second_guessed():
    with pytest.raises(RuntimeError):
        bank(backend="grouped").double()(randn(1, 2, 8, dtype=torch.float64), routing_of([[[0], [1]]], 4))


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_renaming_the_experts_changes_no_output(backend):
    experts, x, new_name = bank(backend=backend), randn(2, 5, 8), torch.tensor([2, 0, 3, 1])
    routing = seeded(TopKRouter, 8, 4, 2)(x)
    renamed = copy.deepcopy(experts)
    with torch.no_grad():
        renamed.gate_up_proj[new_name], renamed.down_proj[new_name] = experts.gate_up_proj, experts.down_proj
    y = renamed(x, replace(routing, expert_indices=new_name[routing.expert_indices]))
    assert torch.allclose(y, experts(x, routing), atol=1e-6)


# The rest


def test_drop_path_skips_whole_sequences_in_training_and_scales_the_others():
    experts, x = bank(drop_path=0.25), randn(1, 3, 8).expand(400, 3, 8)
    routing = routing_of(torch.zeros(400, 3, 1), 4)
    plain = experts.eval()(x, routing)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = experts.train()(x, routing)
    skipped = (dropped == 0).flatten(1).all(1)
    assert torch.allclose(dropped[~skipped], plain[~skipped] / 0.75, rtol=1e-6)
    assert 70 <= skipped.sum() <= 130  # 100 on average, standard deviation 8.7
    assert torch.equal(experts.eval()(x, routing), plain)


def test_x_and_routing_must_belong_together():
    for x, routing in [(randn(1, 2, 8), routing_of([[[0]]], 4)), (randn(1, 1, 7), routing_of([[[0]]], 4)),
                       (randn(1, 1, 8), routing_of([[[0]]], 3))]:
        with pytest.raises(ValueError, match="do not fit d_model=8, n_experts=4"):
            bank()(x, routing)


def test_forward_changes_neither_input_nor_weights():
    experts, x = bank(), randn(2, 3, 8)
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    experts(x, routing_of(torch.zeros(2, 3, 1), 4))
    assert torch.equal(x, randn(2, 3, 8))
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())


def test_a_feed_forward_takes_any_leading_shape():
    ff = seeded(FeedForward, 8, 12, activation="gelu", glu=False)
    x = randn(2, 3, 8)
    assert torch.allclose(ff(x), F.gelu(x @ ff.gate_up_proj.weight.T) @ ff.down_proj.weight.T, atol=1e-6)
    assert ff(x[0, 0]).shape == (8,)
