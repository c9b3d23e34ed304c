"""The whole layer: router, plan, experts and shared experts together."""

import copy

import pytest
import torch
from hypothesis import given

from moe_core import FeedForward, MixtureOfExperts

from .helpers import cases, close, config, experts_token_by_token, fast, randn, seeded


def layer(**changes) -> MixtureOfExperts:
    return seeded(MixtureOfExperts, config(**changes))


def grads(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@fast
@given(cases())
def test_the_layer_is_the_weighted_sum_of_experts_and_the_shared_ones(case):
    moe = layer(
        d_model=case.D,
        d_ff=3,
        n_experts=case.E,
        top_k=case.K,
        capacity_factor=case.capacity_factor,
        norm_topk_prob=case.normalized,
        n_shared_experts=2,
    ).double()
    x = case.x(torch.float64)
    y, routing = moe(x, case.padding_mask())
    expected = experts_token_by_token(moe.experts, x, routing.check()) + moe.shared_experts(x)
    assert close(y, expected)


def test_one_expert_is_a_feed_forward_layer():
    ff, moe = seeded(FeedForward, 8, 16), layer(n_experts=1, top_k=1)
    with torch.no_grad():
        moe.experts.gate_up_proj[0], moe.experts.down_proj[0] = (
            ff.gate_up_proj.weight,
            ff.down_proj.weight,
        )
    x, x2 = randn(2, 3, 8).requires_grad_(), randn(2, 3, 8).requires_grad_()
    ff(x).square().sum().backward()
    y, _routing = moe(x2)
    y.square().sum().backward()
    assert close(y, ff(x)) and close(x2.grad, x.grad)
    assert close(moe.experts.down_proj.grad[0], ff.down_proj.weight.grad)


def test_experts_that_are_all_alike_make_the_router_irrelevant():
    moe, x = layer(), randn(2, 3, 8)
    with torch.no_grad():
        moe.experts.gate_up_proj[:], moe.experts.down_proj[:] = (
            moe.experts.gate_up_proj[0],
            moe.experts.down_proj[0],
        )
    before = moe(x)[0]
    torch.nn.init.normal_(moe.router.weight)
    assert close(moe(x)[0], before)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_capacity_zero_gives_output_exactly_zero_and_gradients_of_zero(backend):
    moe, x = layer(capacity_factor=0.0, backend=backend), randn(2, 3, 8).requires_grad_()
    y, routing = moe(x)
    y.sum().backward()
    assert (y == 0).all() and routing.drop_rate == 1
    assert (x.grad == 0).all() and all((gradient == 0).all() for gradient in grads(moe).values())


def test_a_dropped_token_gets_exactly_zero():
    moe = layer(n_experts=2, top_k=1, capacity_factor=0.5)
    y, routing = moe(randn(4, 8, 8))
    kept = routing.capacity_mask.any(-1)
    assert 0 < kept.sum() < 32
    assert (y[~kept] == 0).all() and (y[kept] != 0).any(-1).all()


def test_padding_gets_exactly_zero_and_sends_no_gradient():
    moe, x = layer(), randn(2, 3, 8).requires_grad_()
    padding_mask = torch.tensor([[True, True, False], [True, False, False]])
    y, _routing = moe(x, padding_mask)
    y.sum().backward()
    assert (y[~padding_mask] == 0).all() and (x.grad[~padding_mask] == 0).all()
    assert close(y[padding_mask], moe(x)[0][padding_mask])


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("glu", [True, False])
def test_gradients_are_right_in_float64(norm_topk_prob, glu):
    moe = layer(
        d_model=3,
        d_ff=2,
        n_experts=3,
        norm_topk_prob=norm_topk_prob,
        glu=glu,
        n_shared_experts=1,
        aux_loss_weight=0.1,
        z_loss_weight=0.1,
        capacity_factor=1.0,
        backend="loop",
    ).double()
    names, parameters = zip(*moe.named_parameters())

    def run(x, *parameters):
        y, routing = torch.func.functional_call(moe, dict(zip(names, parameters)), (x,))
        return y, routing.aux_loss

    assert torch.autograd.gradcheck(
        run, (randn(1, 4, 3, dtype=torch.float64).requires_grad_(), *parameters)
    )


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_a_tokens_output_does_not_depend_on_its_neighbours_when_dropless(backend):
    moe, x = layer(backend=backend), randn(3, 5, 8)
    together = moe(x)[0]
    for b in range(3):
        assert close(moe(x[b : b + 1])[0][0], together[b])
    assert close(moe(x[:, 2:3])[0], together[:, 2:3])
    assert close(moe(x.flip(0, 1))[0].flip(0, 1), together)


def test_experts_see_no_jitter():
    moe, x = layer(n_experts=1, top_k=1, jitter_noise=0.5), randn(2, 3, 8)
    assert torch.equal(moe.train()(x)[0], moe.eval()(x)[0])


def test_evaluation_is_deterministic_whatever_noise_training_has():
    moe, x = layer(jitter_noise=0.5, drop_path=0.5).eval(), randn(4, 3, 8)
    assert torch.equal(moe(x)[0], moe(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_output_has_the_inputs_dtype_and_every_parameter_a_finite_gradient(dtype):
    moe = layer(
        aux_loss_weight=0.01, z_loss_weight=0.01, n_shared_experts=1, capacity_factor=1.0
    ).to(dtype)
    x = randn(2, 3, 8, dtype=dtype).requires_grad_()
    y, routing = moe(x)
    (y.sum() + routing.check().aux_loss).backward()
    assert y.dtype == x.grad.dtype == dtype
    assert all(gradient.isfinite().all() for gradient in grads(moe).values())


def test_bfloat16_is_close_to_float32():
    moe, x = layer(d_model=32, d_ff=64), randn(2, 8, 32)
    low = copy.deepcopy(moe).bfloat16()
    y, routing = moe(x)
    y_low, routing_low = low(x.bfloat16())
    same_experts = (routing.expert_indices == routing_low.expert_indices).all(-1)
    assert same_experts.sum() >= 12  # of 16; a near tie may flip
    assert torch.allclose(y_low.float()[same_experts], y[same_experts], atol=0.02)


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_the_experts_in_bfloat16_and_returns_the_inputs_dtype(backend, dtype):
    moe, x = layer(backend=backend), randn(2, 3, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _routing = moe(x)
    y.float().square().sum().backward()
    exact = layer(backend="loop")(x.float())[0]
    assert y.dtype == dtype and torch.allclose(y.float(), exact, atol=0.01)
    assert not torch.equal(y.float(), exact)  # bfloat16 really was used
    assert moe.experts.down_proj.grad.dtype == torch.float32


def test_strides_do_not_matter():
    moe, x = layer(n_shared_experts=1), randn(2, 3, 8)
    assert torch.equal(moe(x.transpose(0, 2).contiguous().transpose(0, 2))[0], moe(x)[0])
    assert close(moe(x[:, :1].expand(2, 3, 8))[0], moe(x[:, :1].repeat(1, 3, 1))[0])


def test_no_grad_gives_the_same_numbers_and_no_graph():
    moe, x = layer(aux_loss_weight=0.01), randn(2, 3, 8)
    with torch.no_grad():
        y, routing = moe(x)
    assert torch.equal(y, moe(x)[0]) and not y.requires_grad and not routing.aux_loss.requires_grad


def test_weights_survive_a_state_dict():
    moe, other, x = layer(n_shared_experts=1), layer(n_shared_experts=1), randn(2, 3, 8)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    assert other.load_state_dict(moe.state_dict()).missing_keys == []
    assert torch.equal(other(x)[0], moe(x)[0])
    assert set(moe.state_dict()) == {
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.gate_up_proj.weight",
        "shared_experts.down_proj.weight",
    }


def test_a_layer_that_has_run_can_be_copied_and_holds_no_new_state():
    moe, x = layer(aux_loss_weight=0.01, capacity_factor=1.0), randn(2, 3, 8)
    attributes = {name: set(vars(module)) for name, module in moe.named_modules()}
    y, _routing = moe(x)
    assert attributes == {name: set(vars(module)) for name, module in moe.named_modules()}
    assert torch.equal(copy.deepcopy(moe)(x)[0], y)


def test_shared_experts_are_one_feed_forward_of_their_joint_width():
    assert layer().shared_experts is None
    shared = layer(n_shared_experts=3, activation="relu", glu=False).shared_experts
    assert shared.down_proj.weight.shape == (8, 48) and (shared.activation, shared.glu) == (
        "relu",
        False,
    )


def test_every_number_of_the_config_arrives_where_it_is_used():
    moe = layer(
        capacity_factor=1.5,
        norm_topk_prob=False,
        aux_loss_weight=0.1,
        z_loss_weight=0.2,
        jitter_noise=0.3,
        activation="gelu",
        glu=False,
        drop_path=0.4,
        backend="loop",
    )
    router, experts = moe.router, moe.experts
    assert (router.capacity_rule.factor, router.norm_topk_prob, router.aux_loss_weight) == (
        1.5,
        False,
        0.1,
    )
    assert (router.z_loss_weight, router.jitter_noise, router.top_k) == (0.2, 0.3, 2)
    assert (experts.activation, experts.glu, experts.drop_path, experts.backend) == (
        "gelu",
        False,
        0.4,
        "loop",
    )
    assert moe.config == config(
        **{
            "capacity_factor": 1.5,
            "norm_topk_prob": False,
            "aux_loss_weight": 0.1,
            "z_loss_weight": 0.2,
            "jitter_noise": 0.3,
            "activation": "gelu",
            "glu": False,
            "drop_path": 0.4,
            "backend": "loop",
        }
    )


def test_token_ids_reach_the_router_that_reads_them_and_are_asked_for():
    moe, x = layer(router="hash", router_options={"vocab_size": 32}), randn(2, 3, 8)
    token_ids = torch.tensor([[1, 2, 3], [3, 2, 1]])
    indices = moe(x, None, token_ids)[1].expert_indices
    assert torch.equal(indices[0], indices[1].flip(0)) and torch.equal(
        indices, moe(x * 2, None, token_ids)[1].expert_indices
    )
    assert not torch.equal(indices, moe(x, None, token_ids + 7)[1].expert_indices)
    with pytest.raises(ValueError, match="token_ids=None must be .B, N. int64: a HashRouter"):
        moe(x)


def test_other_routers_leave_token_ids_alone():
    moe, x = layer(), randn(2, 3, 8)
    assert torch.equal(moe(x, None, torch.ones(2, 3, dtype=torch.int64))[0], moe(x)[0])


@pytest.mark.parametrize("backend", ["loop", "padded"])
@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 0.5}, {"n_shared_experts": 1}], ids=str
)
def test_second_derivatives_are_right_in_float64(backend, options):
    moe = seeded(MixtureOfExperts, config(d_ff=3, backend=backend, **options)).double()
    x = randn(2, 3, 8, dtype=torch.float64).requires_grad_()
    weights = [moe.router.weight, moe.experts.down_proj]

    def output(x, *weights):
        named = dict(zip(("router.weight", "experts.down_proj"), weights))
        return torch.func.functional_call(moe, named, (x,))[0]

    assert torch.autograd.gradgradcheck(output, (x, *weights))


def test_the_fused_bank_says_that_it_has_no_second_derivative():
    moe, x = seeded(MixtureOfExperts, config(backend="fused")), randn(2, 3, 8).requires_grad_()
    y = moe(x)[0].square().sum()
    with pytest.raises(RuntimeError, match='"fused" has no second derivative: take "loop"'):
        torch.autograd.grad(y, x, create_graph=True)
