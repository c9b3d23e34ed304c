"""DispatchPlan against loops over tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_core import DispatchPlan, DropReason, MixtureOfExperts, ReLURouter

from .helpers import cases, close, config, fast, randn, routing_of, seeded


def random_routing(case, **changes):
    return case.router(**changes).double()(case.x(torch.float64), case.padding_mask())


@fast
@given(cases())
def test_rows_are_the_kept_slots_by_expert_and_in_the_order_of_the_batch(case):
    routing = random_routing(case)
    rows = DispatchPlan(routing).gather(case.x(torch.float64))
    x_TD, expected = case.x(torch.float64).flatten(0, 1), []
    for e in range(case.E):
        for slot, expert in enumerate(routing.expert_indices.flatten().tolist()):
            if expert == e and routing.capacity_mask.flatten()[slot]:
                expected.append(x_TD[slot // case.K])
    assert torch.equal(
        rows, torch.stack(expected) if expected else torch.zeros(0, case.D, dtype=torch.float64)
    )


@fast
@given(cases())
def test_counts_are_the_rows_of_each_expert(case):
    routing = random_routing(case)
    plan = DispatchPlan(routing)
    experts_of_rows = routing.expert_indices.flatten()[plan.slot_A]
    assert torch.equal(experts_of_rows, torch.arange(case.E).repeat_interleave(plan.counts_E))
    assert plan.counts_E.sum() == len(plan.slot_A) == routing.capacity_mask.sum()


@fast
@given(cases())
def test_combine_equals_a_loop_over_tokens_forward_and_backward(case):
    routing = random_routing(case)
    plan = DispatchPlan(routing)
    rows = randn(len(plan.slot_A), 3, seed=case.seed, dtype=torch.float64).requires_grad_()
    weights = routing.expert_weights.detach().requires_grad_()
    expected = torch.zeros(case.B * case.N, 3, dtype=torch.float64)
    for row, slot in enumerate(plan.slot_A.tolist()):
        expected = expected.index_add(
            0, torch.tensor([slot // case.K]), (weights.flatten()[slot] * rows[row]).unsqueeze(0)
        )
    expected, got = expected.view(case.B, case.N, 3), plan.combine(rows, weights)
    assert close(got, expected)
    probe = randn(case.B, case.N, 3, seed=1, dtype=torch.float64)
    if len(rows):
        for a, b in zip(
            torch.autograd.grad(got, (rows, weights), probe),
            torch.autograd.grad(expected, (rows, weights), probe),
        ):
            assert close(a, b)


@fast
@given(cases())
def test_combining_what_was_gathered_gives_each_token_times_the_sum_of_its_kept_weights(case):
    routing, x = random_routing(case), case.x(torch.float64)
    plan = DispatchPlan(routing)
    kept = (routing.expert_weights * routing.capacity_mask).sum(-1, keepdim=True)
    assert close(plan.combine(plan.gather(x), routing.expert_weights), x * kept)


def test_a_token_without_a_kept_slot_gets_exactly_zero_even_from_infinite_rows():
    routing = routing_of([[[0], [1]]], 2, reasons=[[[0], [DropReason.OVER_CAPACITY]]], capacity=1)
    plan = DispatchPlan(routing)
    y = plan.combine(torch.full((1, 3), torch.inf), routing.expert_weights)
    assert y[0, 0].isinf().all() and (y[0, 1] == 0).all()


def test_a_plan_has_no_parameters():
    assert not isinstance(DispatchPlan(routing_of([[[0]]], 1)), torch.nn.Module)


def test_gathered_rows_are_a_copy():
    x = randn(1, 1, 3)
    DispatchPlan(routing_of([[[0]]], 1)).gather(x).zero_()
    assert torch.equal(x, randn(1, 1, 3))


def test_strides_do_not_matter():
    routing = routing_of([[[0, 1], [2, 0], [1, 2]]] * 2, 3, weights=randn(2, 3, 2))
    x, rows, plan = randn(2, 3, 4), randn(12, 4, seed=1), DispatchPlan(routing)
    scattered = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(plan.gather(scattered(x)), plan.gather(x))
    assert torch.equal(
        plan.combine(scattered(rows), scattered(routing.expert_weights)),
        plan.combine(rows, routing.expert_weights),
    )
    indices = scattered(routing.expert_indices)
    assert torch.equal(DispatchPlan(replace(routing, expert_indices=indices)).slot_A, plan.slot_A)


def test_bfloat16_rows_are_summed_in_float32_and_rounded_once():
    routing = routing_of([[list(range(8))]], 8, weights=randn(1, 1, 8).softmax(-1))
    plan, rows = DispatchPlan(routing), randn(8, 64, dtype=torch.bfloat16)
    expected = (routing.expert_weights[0, 0] @ rows.float()).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(plan.combine(rows, routing.expert_weights)[0, 0], expected)


def sparse_routing(T, E, *, share=0.25, seed=0, dtype=torch.float32):
    """T tokens with a slot for each of E experts, about this share of them kept, and drawn weights."""
    taken = torch.rand(1, T, E, generator=torch.Generator().manual_seed(seed)) < share
    return routing_of(
        torch.arange(E).expand(1, T, E),
        E,
        weights=randn(1, T, E, seed=seed, dtype=dtype),
        reasons=torch.where(taken, DropReason.KEPT, DropReason.NOT_SELECTED),
    )


@fast
@given(cases())
def test_a_static_plan_gives_what_an_exact_one_gives_forward_and_backward(case):
    routing, results = random_routing(case), []
    for static in (False, True):
        x = case.x(torch.float64).requires_grad_()
        weights = routing.expert_weights.detach().requires_grad_()
        plan = DispatchPlan(routing, static=static)
        rows = plan.gather(x)
        assert len(rows) == len(plan.slot_A) == plan.counts_E.sum()
        y = plan.combine(rows * 3, weights)
        results.append(
            (y, *torch.autograd.grad(y, (x, weights), randn(*y.shape, seed=7, dtype=torch.float64)))
        )
    assert len(rows) == routing.expert_indices.numel()  # a row for every slot
    for exact, static in zip(*results):
        assert close(exact, static)


def test_a_static_plans_rows_without_a_kept_slot_are_zeros_at_the_end_and_the_last_experts():
    OVER = DropReason.OVER_CAPACITY
    routing = routing_of([[[0, 2], [0, 1]]], 3, reasons=[[[0, 0], [OVER, 0]]], capacity=1)
    plan = DispatchPlan(routing, static=True)
    assert plan.slot_A.tolist() == [0, 3, 1, 2] and plan.counts_E.tolist() == [1, 1, 2]
    assert plan.real_A.tolist() == [True, True, True, False]
    x = torch.full((1, 2, 3), torch.inf)
    assert (plan.gather(x)[3] == 0).all() and plan.gather(x)[:3].isinf().all()


def test_on_a_cpu_a_plan_is_exact_on_other_devices_static_unless_most_slots_may_be_empty():
    routing = routing_of([[[0, 1]]], 3, reasons=[[[0, 1]]], capacity=1)
    assert DispatchPlan(routing).real_A is None and len(DispatchPlan(routing).slot_A) == 1
    on_meta = replace(
        routing,
        **{
            name: getattr(routing, name).to("meta")
            for name in (
                "expert_indices",
                "expert_weights",
                "capacity_mask",
                "logits",
                "scores",
                "drop_reason",
            )
        },
    )
    assert DispatchPlan(on_meta).real_A is not None and len(DispatchPlan(on_meta).slot_A) == 2
    x, relu = randn(2, 3, 8), seeded(ReLURouter, 8, 4)
    assert len(DispatchPlan(relu(x)).slot_A) == relu(x).capacity_mask.sum() < 24


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held that any operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max([self.numel, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_gathering_and_combining_never_make_a_tensor_of_all_slots(share):
    T, E, D = 64, 16, 32
    routing = sparse_routing(T, E, share=share)
    x, weights = randn(1, T, D).requires_grad_(), routing.expert_weights.requires_grad_()
    with LargestTensor() as made:
        plan = DispatchPlan(routing)
        plan.combine(plan.gather(x), weights).square().sum().backward()
    assert made.numel <= max(len(plan.slot_A) * D, T * D, T * E)


def test_combining_by_rows_gives_the_same_bits_every_time():
    plan_of = lambda: DispatchPlan(sparse_routing(50, 8))
    rows = randn(len(plan_of().slot_A), 16)
    first = plan_of().combine(rows, sparse_routing(50, 8).expert_weights)
    assert all(
        torch.equal(plan_of().combine(rows, sparse_routing(50, 8).expert_weights), first)
        for _ in range(5)
    )


def test_by_rows_too_a_token_without_a_kept_slot_gets_exactly_zero_and_bfloat16_is_rounded_once():
    NOT = DropReason.NOT_SELECTED
    plan = DispatchPlan(routing_of([[[0, 1], [0, 1]]], 2, reasons=[[[0, NOT], [NOT, NOT]]]))
    y = plan.combine(torch.full((1, 3), torch.inf), torch.ones(1, 2, 2))
    assert y[0, 0].isinf().all() and (y[0, 1] == 0).all()
    routing = sparse_routing(1, 8, share=1.0)
    plan, rows = DispatchPlan(routing), randn(8, 64, dtype=torch.bfloat16)
    exact = (routing.expert_weights[0, 0].double() @ rows.double()).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(plan.combine(rows, routing.expert_weights)[0, 0], exact)


OPTIONS = [
    {},
    {"capacity_factor": 1.0},
    {"capacity_factor": 1.0, "backend": "padded"},
    {"activation": "relu2"},
    {"bias": True},
    {"dropout": 0.1},
    {"glu_limit": 7.0, "up_offset": 1.0, "activation": "quick_gelu"},
    {"router": "loss_free", "aux_loss_weight": 0.0},
]


def fake_step(options: dict) -> tuple:
    """Forward and backward of a whole bfloat16 layer on a device where reading a value raises; bfloat16 alone has a fake grouped matmul."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("meta"):
            moe = MixtureOfExperts(
                config(**{"n_shared_experts": 1, "aux_loss_weight": 0.01, **options})
            )
            x = torch.randn(2, 3, 8, requires_grad=True)
            y, routing = moe(x)
            (y.square().sum() + routing.aux_loss).backward()
            return moe, x, routing
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_static_size_layer_never_waits_for_a_tensors_value(options):
    moe, x, routing = fake_step(options)
    assert x.grad.shape == x.shape and x.dtype == torch.bfloat16
    assert routing.logits.dtype == routing.expert_weights.dtype == torch.float32
    assert moe.experts.choose_backend(x.flatten(0, 1))[0] == options.get("backend", "grouped")
    assert all(p.grad is not None for p in moe.parameters() if p.requires_grad)


def test_the_instrument_sees_who_waits():
    with pytest.raises(Exception, match="aten._local_scalar_dense|data-dependent|DataDependent"):
        fake_step({"backend": "loop"})
