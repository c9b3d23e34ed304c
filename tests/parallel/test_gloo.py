"""Real processes (gloo) against the simulation and against one process holding everything: outputs and every gradient."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_core import Experts, MoEConfig, TopKRouter
from moe_core.parallel import SimulatedExchange, by_load, contiguous, round_robin, simulate

from ..core.helpers import close
from .programs import LayerCase, mismatch, plain_experts, run_layers, whole_layer

RANKS = pytest.mark.parametrize("n_ranks", [2, 4])
ROUTERS = {"topk": {}, "loss_free": {}, "expert_choice": {}, "relu": {}, "zero_computation": {}}
slow = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def case(
    n_ranks,
    *,
    router="topk",
    top_k=2,
    placement=contiguous,
    sizes=None,
    pull=0.0,
    seed=0,
    dtype=torch.float64,
    **options,
):
    """sizes: for each rank (B, N); pull drags every token towards the first experts, so that the last ones stay empty."""
    generator = torch.Generator().manual_seed(seed)
    config = MoEConfig(
        d_model=16,
        d_ff=16,
        n_experts=8,
        top_k=top_k,
        router=router,
        **{"n_shared_experts": 1, **options},
    )
    sizes = sizes or [(2, 5)] * n_ranks
    xs = [torch.randn(B, N, 16, generator=generator, dtype=dtype) + pull for B, N in sizes]
    grads = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in xs]
    return LayerCase(config, seed, placement(8, n_ranks), xs, grads)


@st.composite
def cases(draw, n_ranks):
    """Any routing: idle ranks, empty experts, capacity, copies of experts."""
    router = draw(st.sampled_from(sorted(ROUTERS)))
    sizes = [(draw(st.integers(0, 2)), draw(st.integers(1, 6))) for _ in range(n_ranks)]
    options = {"capacity_factor": 1.0} if router == "topk" and draw(st.booleans()) else {}
    load = [draw(st.integers(0, 9)) for _ in range(8)]
    placement = draw(
        st.sampled_from(
            [
                contiguous,
                round_robin,
                lambda E, R: by_load(load, R),
                lambda E, R: by_load(load, R, replicas=R),
            ]
        )
    )
    return case(
        n_ranks,
        router=router,
        top_k=draw(st.integers(1, 3)),
        placement=placement,
        sizes=sizes,
        pull=draw(st.sampled_from([0.0, 2.0])),
        seed=draw(st.integers(0, 99)),
        **options,
    )


def simulated(case, n_ranks):
    """As run_layers returns it, for all ranks at once; the gradients of the experts are those of the whole bank."""
    layer = whole_layer(case)
    xs = [x.clone().requires_grad_() for x in case.xs]
    outputs, _, _ = simulate(layer, xs, case.placement, exchange=SimulatedExchange(n_ranks))
    torch.autograd.backward(outputs, case.grads)
    return (
        [y.detach() for y in outputs],
        [x.grad for x in xs],
        {name: p.grad for name, p in layer.named_parameters()},
    )


def one_process(case):
    layer = whole_layer(case)
    xs = [x.clone().requires_grad_() for x in case.xs]
    outputs = [layer(x)[0] for x in xs]
    torch.autograd.backward(outputs, case.grads)
    return (
        [y.detach() for y in outputs],
        [x.grad for x in xs],
        {name: p.grad for name, p in layer.named_parameters()},
    )


def gathered(case, results):
    """The ranks' expert gradients put back together, the copies of an expert added up; the rest is the same on every rank."""
    parameters = {}
    for name, value in results[0].items():
        if name in ("y", "x", "owned", "shapes"):
            continue
        parameters[name] = value
        if name.startswith("experts."):
            total = torch.zeros(8, *value.shape[1:], dtype=value.dtype)
            for result in results:
                total[list(result["owned"])] += result[name]
            parameters[name] = total
    return [result["y"] for result in results], [result["x"] for result in results], parameters


def gap(found, wanted):
    (ys, xs, parameters), (wanted_ys, wanted_xs, wanted_parameters) = found, wanted
    pairs = [*zip(ys, wanted_ys), *zip(xs, wanted_xs)]
    pairs += [
        (parameters[name], grad) for name, grad in wanted_parameters.items() if grad is not None
    ]
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


@RANKS
@slow
@given(data=st.data())
def test_gloo_and_the_simulation_equal_one_process_to_1e_12_whatever_the_routing(
    gangs, n_ranks, data
):
    drawn = [data.draw(cases(n_ranks)) for _ in range(3)]
    for one, results in zip(drawn, zip(*gangs(n_ranks).run(run_layers, drawn))):
        wanted = one_process(one)
        assert gap(gathered(one, results), wanted) < 1e-12
        assert gap(simulated(one, n_ranks), wanted) < 1e-12


@RANKS
@pytest.mark.own_bits  # the same operations in the same order on the same shapes, on either side
@slow
@given(data=st.data())
def test_gloo_equals_the_simulation_bit_for_bit(gangs, n_ranks, data):
    """Outputs, the tokens' gradients and each rank's expert gradients. (What is summed over ranks may be added in another order.)"""
    one = data.draw(cases(n_ranks))
    results = gangs(n_ranks).run(run_layers, [one])
    ys, xs, parameters = simulated(one, n_ranks)
    for rank, [result] in enumerate(results):
        assert torch.equal(result["y"], ys[rank]) and torch.equal(result["x"], xs[rank])
        for name in result["shapes"]:
            for place, expert in enumerate(result["owned"]):
                if expert not in one.placement.replicated:  # the simulation has added up the copies
                    assert torch.equal(
                        result["experts." + name][place], parameters["experts." + name][expert]
                    )


@RANKS
@pytest.mark.own_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gloo_equals_the_simulation_bit_for_bit_in_lower_precision(gangs, n_ranks, dtype):
    one = case(n_ranks, dtype=dtype, sizes=[(2, 40)] * n_ranks)
    results = gangs(n_ranks).run(run_layers, [one])
    ys, xs, _ = simulated(one, n_ranks)
    assert all(
        torch.equal(result["y"], y) and torch.equal(result["x"], x)
        for [result], y, x in zip(results, ys, xs)
    )


@RANKS
def test_a_rank_holds_its_share_of_the_experts_and_an_idle_rank_takes_part(gangs, n_ranks):
    one = case(n_ranks, sizes=[(3, 4)] * (n_ranks - 1) + [(0, 4)])
    results = [result for [result] in gangs(n_ranks).run(run_layers, [one])]
    assert all(
        shape[0] == 8 // n_ranks for result in results for shape in result["shapes"].values()
    )
    assert results[-1]["y"].shape == (0, 4, 16) and results[-1]["experts.down_proj"].abs().sum() > 0


@RANKS
def test_experts_with_an_ep_size_find_the_other_ranks_by_themselves(gangs, n_ranks):
    x = torch.randn(n_ranks, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    router, experts = (
        TopKRouter(d_model=8, n_experts=4, top_k=2),
        Experts(d_model=8, d_ff=8, n_experts=4),
    )
    for rank, (y, held) in enumerate(gangs(n_ranks).run(plain_experts, x)):
        assert held == 4 // n_ranks and close(y, experts(x[rank], router(x[rank])))


@RANKS
def test_an_expert_without_tokens_has_a_gradient_of_zeros_on_its_rank(gangs, n_ranks):
    one = case(n_ranks, top_k=1, pull=0.0, sizes=[(1, 1)] * n_ranks)
    results = [result for [result] in gangs(n_ranks).run(run_layers, [one])]
    grads = torch.cat([result["experts.down_proj"] for result in results])
    used = grads.flatten(1).abs().sum(1) > 0
    assert 1 <= used.sum() <= n_ranks < 8


@RANKS
@pytest.mark.parametrize(
    ("kind", "says"), [("width", "6 x torch.float32"), ("dtype", "4 x torch.float64")]
)
def test_rows_of_another_width_or_dtype_are_an_error_on_every_rank_before_any_row_moves(
    gangs, n_ranks, kind, says
):
    messages = gangs(n_ranks).run(mismatch, kind)
    for rank, message in enumerate(messages):
        assert (
            message.startswith("expert parallelism: rank ")
            and "rank 1 " in message + " "
            and says in message
        ), (rank, message)
    assert (
        gangs(n_ranks).run(mismatch, "nothing") == ["no error"] * n_ranks
    )  # and the ranks can go on
