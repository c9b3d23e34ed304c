"""The bank of experts: against the formula, and its backends against each other."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core import Experts, FeedForward, TopKRouter
from moe_core.experts import BACKENDS
from moe_core.experts.activations import ACTIVATIONS, PULLBACKS, Activation

from .helpers import (
    cases,
    close,
    experts_token_by_token,
    fast,
    mlp_of_expert,
    randn,
    routing_of,
    seeded,
)


def bank(d_model=8, d_ff=16, n_experts=4, **options) -> Experts:
    return seeded(Experts, d_model, d_ff, n_experts, **options)


def gradients(experts, x, routing):
    """Output and gradients of x, the combine weights and every parameter, for a fixed linear loss."""
    x, weights = x.detach().requires_grad_(), routing.expert_weights.detach().requires_grad_()
    y = experts(x, replace(routing, expert_weights=weights))
    probe = randn(*y.shape, seed=9, dtype=y.dtype)
    return y, *torch.autograd.grad(y, (x, weights, *experts.parameters()), probe)


def gap(experts, x, routing, backend) -> float:
    """How far the backend is from the loop, forward and backward: the largest |a - b| / (1 + |b|); infinite if a dtype or shape differs."""
    loop, gaps = copy.deepcopy(experts), [torch.zeros(1)]
    loop.backend, experts.backend = "loop", backend
    for a, b in zip(gradients(experts, x, routing), gradients(loop, x, routing), strict=True):
        if a.dtype != b.dtype or a.shape != b.shape:
            return torch.inf
        gaps.append(((a.double() - b.double()).abs() / (1 + b.double().abs())).flatten())
    return torch.cat(gaps).max().item()  # NaN if any is


GPT_OSS = {"activation": "quick_gelu", "glu_limit": 0.7, "up_offset": 1.0, "bias": True}
OPTIONS = [
    {},
    {"glu": False, "activation": "relu2"},
    GPT_OSS,
    {"glu_limit": 0.3},
    {"glu": False, "bias": True, "activation": "gelu"},
]
FAST = [backend for backend in BACKENDS if backend != "loop"]
each_fast = pytest.mark.parametrize("backend", FAST)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


# The formula


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_equal_the_formula_token_by_token(activation, glu):
    experts, x = (
        bank(activation=activation, glu=glu, backend="loop").double(),
        randn(2, 5, 8, dtype=torch.float64),
    )
    routing = seeded(TopKRouter, 8, 4, 2)(x)
    assert close(experts(x, routing), experts_token_by_token(experts, x, routing))


@each_backend
@pytest.mark.parametrize("options", OPTIONS[2:])
def test_clamps_offsets_and_biases_equal_the_formula(options, backend):
    experts, x = bank(**options, backend=backend), 3 * randn(2, 5, 8)
    routing = seeded(TopKRouter, 8, 4, 2)(x)
    assert close(experts(x, routing), experts_token_by_token(experts, x, routing))


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivative_of_each_activation_is_that_of_autograd(name, glu):
    clamped = [Activation(name, glu, limit=0.5, up_offset=1.0)] if glu else []
    for activation in (Activation(name, glu), *clamped):
        h, grad = (
            randn(3, 8, dtype=torch.float64).requires_grad_(),
            randn(3, 4 if glu else 8, seed=1, dtype=torch.float64),
        )
        out = activation(h)
        (expected,) = torch.autograd.grad(out, h, grad)
        got, again = activation.pullback(grad.clone(), h.detach())
        assert close(got, expected) and close(again, out)
    assert set(PULLBACKS) == set(ACTIVATIONS)


@fast
@given(cases())
def test_experts_equal_the_formula_whatever_the_routing(case):
    experts, x = bank(case.D, 3, case.E).double(), case.x(torch.float64)
    routing = case.router()(x, case.padding_mask())
    expected = experts_token_by_token(experts, x, routing)
    assert close(experts(x, routing), expected)
    assert (experts(x, routing)[~routing.capacity_mask.any(-1)] == 0).all()


def test_the_activations_are_what_they_are_called():
    h = torch.tensor([-2.0, 0.0, 3.0])
    assert ACTIVATIONS["relu"](h).tolist() == [0, 0, 3] and ACTIVATIONS["relu2"](h).tolist() == [
        0,
        0,
        9,
    ]
    assert close(ACTIVATIONS["silu"](h), h / (1 + (-h).exp()))
    assert close(ACTIVATIONS["gelu"](h), h * 0.5 * (1 + torch.erf(h / 2**0.5)))


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
    assert close(ff(x), experts(x, routing_of(torch.zeros(2, 3, 1), 1)))
    assert close(ff(x)[0, 0], mlp_of_expert(experts, 0, x[0, 0]))


def test_experts_start_different_within_the_bounds_of_linear():
    experts = bank(d_model=16, d_ff=64)
    assert experts.gate_up_proj.abs().max() <= 1 / 4 and experts.down_proj.abs().max() <= 1 / 8
    assert experts.gate_up_proj.abs().max() > 0.99 / 4 and experts.down_proj.abs().max() > 0.99 / 8
    assert not torch.equal(experts.gate_up_proj[0], experts.gate_up_proj[1])


# Backends


@each_fast
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(fast, max_examples=10)
@given(case=cases())
def test_backends_agree_forward_and_backward(backend, options, case):
    experts, x = bank(8, 12, case.E, **options), randn(case.B, case.N, 8, seed=case.seed)
    router = seeded(
        TopKRouter, 8, case.E, case.K, seed=case.seed, capacity_factor=case.capacity_factor
    )
    assert gap(experts, x, router(x, case.padding_mask()), backend) <= 1e-5


@pytest.mark.parametrize("backend", ["padded", "fused", "auto"])
@settings(fast, max_examples=10)
@given(case=cases(), d_ff=st.integers(1, 9))
def test_those_that_know_float64_and_any_width_agree_to_rounding(backend, case, d_ff):
    experts, x = (
        bank(case.D + 1, d_ff, case.E, bias=True).double(),
        randn(case.B, case.N, case.D + 1, seed=case.seed, dtype=torch.float64),
    )
    router = seeded(TopKRouter, case.D + 1, case.E, case.K, capacity_factor=case.capacity_factor)
    assert gap(experts, x, router(x, case.padding_mask()), backend) <= 1e-12


@each_fast
@pytest.mark.parametrize("rows", [1, 2, 15, 17, 60])
def test_backends_agree_from_one_row_an_expert_to_many(backend, rows):
    indices = torch.tensor([0] * rows + [2] * (rows + 1)).view(
        1, -1, 1
    )  # fused takes another order of the product for few rows
    assert gap(bank(bias=True), randn(1, 2 * rows + 1, 8), routing_of(indices, 4), backend) <= 1e-5


@each_fast
def test_every_token_to_every_expert(backend):
    x = randn(2, 3, 8)
    assert gap(bank(), x, seeded(TopKRouter, 8, 4, 4)(x), backend) <= 1e-5


@each_fast
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_expanded_and_scattered_inputs_and_gradients(backend, capacity_factor):
    experts, router = (
        bank(backend=backend),
        seeded(TopKRouter, 8, 4, 2, capacity_factor=capacity_factor),
    )
    for x in (
        randn(1, 1, 8).expand(2, 5, 8),
        randn(8, 5, 2).transpose(0, 2),
        randn(2, 5, 16)[..., ::2],
    ):
        results = []
        for values in (x, x.contiguous().clone()):
            values = values.detach().requires_grad_()
            y = experts(values, router(values))
            y.sum().backward()  # an expanded gradient
            results.append((y, values.grad))
        for a, b in zip(*results):
            assert close(a, b)


@each_fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "indices",
    [
        [[[0, 1], [0, 1], [1, 0]]],  # experts 2 and 3 are empty
        [[[3, 2], [3, 2], [3, 2]]],  # the first ones are
    ],
    ids=["last empty", "first empty"],
)
def test_backends_agree_in_every_dtype_with_empty_experts(indices, dtype, backend):
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (
        gap(bank().to(dtype), randn(1, 3, 8, dtype=dtype), routing_of(indices, 4), backend)
        <= tolerance
    )


@each_backend
def test_bfloat16_experts_are_combined_in_float32(backend):
    experts, x = bank(backend=backend).bfloat16(), randn(1, 6, 8).bfloat16()
    routing = routing_of([[[0, 1, 2, 3]] * 6], 4, weights=randn(1, 6, 4).softmax(-1))
    outputs = [mlp_of_expert(experts, e, x[0].T).T for e in range(4)]  # each rounded to bfloat16
    expected = sum(routing.expert_weights[0, :, e : e + 1] * outputs[e].float() for e in range(4))
    assert (
        experts(x, routing)[0].float() - expected
    ).abs().max() <= 2 * 2**-8 * expected.abs().max()


@each_backend
def test_the_same_bits_every_time(backend):
    experts, x = bank(backend=backend), randn(2, 9, 8)
    routing = seeded(TopKRouter, 8, 4, 2, capacity_factor=1.0)(x)
    first = gradients(experts, x, routing)
    assert all(
        torch.equal(a, b) for _ in range(3) for a, b in zip(first, gradients(experts, x, routing))
    )


@each_backend
def test_dropout_drops_hidden_values_in_training_only(backend):
    experts, x = (
        bank(d_ff=512, dropout=0.25, backend=backend, activation="relu", glu=False),
        randn(1, 4, 8),
    )
    with torch.no_grad():  # every hidden value 1, every output their mean
        experts.gate_up_proj.fill_(0), experts.down_proj.fill_(1 / 512)
    experts.gate_up_bias, experts.down_bias = (
        torch.nn.Parameter(torch.full((4, n), float(n == 512))) for n in (512, 8)
    )
    routing = seeded(TopKRouter, 8, 4, 1, norm_topk_prob=True)(x)
    assert close(experts.eval()(x, routing), torch.ones(1, 4, 8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = experts.train()(x, routing)
    assert (y != 1).all() and torch.allclose(
        y, torch.ones(1, 4, 8), atol=0.12
    )  # standard deviation 0.0255
    agree_experts = bank(dropout=0.5)
    for seed in range(3):  # and all backends draw the same
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            agree_experts.backend = "loop"
            loop = agree_experts(x, routing)
            torch.manual_seed(seed)
            agree_experts.backend = backend
            assert close(agree_experts(x, routing), loop)


@each_backend
def test_all_tokens_to_one_expert_is_that_expert(backend):
    experts, x = bank(backend=backend), randn(2, 3, 8)
    y = experts(x, routing_of(torch.full((2, 3, 1), 2), 4))
    expected = torch.stack([mlp_of_expert(experts, 2, token) for token in x.flatten(0, 1)]).view(
        2, 3, 8
    )
    assert close(y, expected)


@each_backend
def test_an_expert_without_rows_has_a_gradient_of_exactly_zero(backend):
    experts = bank(backend=backend)
    experts(randn(1, 3, 8), routing_of([[[0], [2], [0]]], 4)).square().sum().backward()
    for weight in (experts.gate_up_proj, experts.down_proj):
        busy = weight.grad.abs().sum((1, 2)) > 0
        assert busy.tolist() == [True, False, True, False]


@each_backend
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_without_a_kept_row_output_and_gradients_are_zero_not_none(backend, shape):
    experts, x = bank(backend=backend), randn(*shape, 8).requires_grad_()
    routing = routing_of(torch.zeros(*shape, 1), 4, reasons=torch.ones(*shape, 1), capacity=0)
    y = experts(x, routing)
    y.sum().backward()
    assert y.shape == x.shape and (y == 0).all() and (x.grad == 0).all()
    assert (experts.gate_up_proj.grad == 0).all() and (experts.down_proj.grad == 0).all()


@pytest.mark.parametrize(
    ("device", "d_model", "d_ff", "dtype", "capacity", "chosen", "because"),
    [
        ("meta", 8, 16, torch.float32, None, "grouped", "float32"),
        ("meta", 4, 12, torch.float32, None, "grouped", "float32"),
        ("meta", 8, 16, torch.bfloat16, 3, "grouped", "nothing synchronises"),
        ("meta", 8, 16, torch.float64, None, "loop", "float64"),
        ("meta", 7, 16, torch.float32, None, "loop", "16 bytes"),
        ("meta", 8, 9, torch.float32, 3, "padded", "capacity"),
        ("meta", 4, 12, torch.bfloat16, None, "loop", "16 bytes"),
        ("cpu", 8, 16, torch.float32, None, "fused", "one expert after the other"),
    ],
)
def test_auto_picks_by_device_dtype_and_alignment_and_says_why(
    device, d_model, d_ff, dtype, capacity, chosen, because
):
    backend, why = bank(d_model, d_ff).choose_backend(
        torch.empty(8, d_model, dtype=dtype, device=device), capacity
    )
    assert backend == chosen and because in why


@pytest.mark.parametrize(
    ("rows", "dtype", "d_ff", "chosen"),
    [
        (0, torch.float32, 16, "fused"),
        (31, torch.float32, 16, "fused"),
        (32, torch.float32, 16, "grouped"),
        (256, torch.float32, 16, "grouped"),
        (257, torch.float32, 16, "fused"),
        (128, torch.float64, 16, "fused"),
        (128, torch.float32, 9, "fused"),
    ],
)
def test_on_a_cpu_auto_takes_the_grouped_matmul_for_a_few_dozen_rows_an_expert(
    rows, dtype, d_ff, chosen
):
    assert bank(d_ff=d_ff).choose_backend(torch.empty(rows, 8, dtype=dtype))[0] == chosen


def test_an_explicit_backend_is_not_second_guessed():
    with pytest.raises(RuntimeError):
        bank(backend="grouped").double()(
            randn(1, 2, 8, dtype=torch.float64), routing_of([[[0], [1]]], 4)
        )


@each_backend
def test_renaming_the_experts_changes_no_output(backend):
    experts, x, new_name = bank(backend=backend), randn(2, 5, 8), torch.tensor([2, 0, 3, 1])
    routing = seeded(TopKRouter, 8, 4, 2)(x)
    renamed = copy.deepcopy(experts)
    with torch.no_grad():
        renamed.gate_up_proj[new_name], renamed.down_proj[new_name] = (
            experts.gate_up_proj,
            experts.down_proj,
        )
    y = renamed(x, replace(routing, expert_indices=new_name[routing.expert_indices]))
    assert close(y, experts(x, routing))


# The rest


def test_drop_path_skips_whole_sequences_in_training_and_scales_the_others():
    experts, x = bank(drop_path=0.25), randn(1, 3, 8).expand(400, 3, 8)
    routing = routing_of(torch.zeros(400, 3, 1), 4)
    plain = experts.eval()(x, routing)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = experts.train()(x, routing)
    skipped = (dropped == 0).flatten(1).all(1)
    assert close(dropped[~skipped], plain[~skipped] / 0.75)
    assert 70 <= skipped.sum() <= 130  # 100 on average, standard deviation 8.7
    assert torch.equal(experts.eval()(x, routing), plain)


def test_x_and_routing_must_belong_together():
    for x, routing in [
        (randn(1, 2, 8), routing_of([[[0]]], 4)),
        (randn(1, 1, 7), routing_of([[[0]]], 4)),
        (randn(1, 1, 8), routing_of([[[0]]], 3)),
    ]:
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
    assert close(ff(x), F.gelu(x @ ff.gate_up_proj.weight.T) @ ff.down_proj.weight.T)
    assert ff(x[0, 0]).shape == (8,)
