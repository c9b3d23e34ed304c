"""R ranks in one process: what they compute is what each computes alone, and what they say they sent is what was sent."""

from inspect import signature

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moe_core import Experts, MixtureOfExperts
from moe_core.parallel import (
    ExpertShard,
    Placement,
    SimulatedExchange,
    TorchExchange,
    Traffic,
    by_load,
    contiguous,
    round_robin,
    run_rows,
    simulate,
)
from moe_core.routers import ROUTERS
from moe_tools.accounting.network import uniform_bytes

from ..core.helpers import close, config, fast, randn, routing_of, seeded
from ..core.routers.test_every_router import TOP_K, layer

READS_TOKENS_ALONE = [name for name in ROUTERS if name != "hash"]


def tokens(*sizes, D=8, dtype=torch.float64, pull=0.0):
    """For each rank its (B, N, D) tokens, waiting for a gradient; ``pull`` drags all of them the same way."""
    return [
        (randn(B, N, D, seed=rank, dtype=dtype) + pull).requires_grad_()
        for rank, (B, N) in enumerate(sizes)
    ]


def everything(moe, xs, run):
    """Outputs, the tokens' gradients and those of all parameters, for a loss that no two numbers of the outputs enter alike."""
    moe.zero_grad()
    for x in xs:
        x.grad = None
    torch.manual_seed(7)  # routers may draw noise
    outputs, routings = run(moe, xs)
    loss = sum(
        (y * randn(*y.shape, seed=50 + rank, dtype=y.dtype)).sum() for rank, y in enumerate(outputs)
    )
    (loss + sum(routing.aux_loss for routing in routings)).backward()
    return {
        **{f"y{rank}": y.detach() for rank, y in enumerate(outputs)},
        **{f"x{rank}": x.grad for rank, x in enumerate(xs)},
        **{name: parameter.grad for name, parameter in moe.named_parameters()},
    }


def each_alone(moe, xs):
    return zip(*(moe(x) for x in xs))


def assert_same(found, expected, dtype=None):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert close(found[name], value, size=1.0, dtype=dtype), name


class Watched(SimulatedExchange):
    """Also keeps the tensors that went in and came out."""

    def __init__(self, n_ranks):
        super().__init__(n_ranks)
        self.moved = []

    def move(self, rows, send, receive, what="rows"):
        got = super().move(rows, send, receive, what)
        self.moved.append((what, list(rows), got))
        return got


# The exchange by hand.


def test_every_rank_gets_the_rows_meant_for_it_in_the_order_of_the_ranks():
    exchange, rows = (
        SimulatedExchange(2),
        [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]])],
    )
    got = exchange.move(rows, send=[[1, 2], [1, 0]], receive=[[1, 1], [2, 0]])
    assert [g.flatten().tolist() for g in got] == [[1, 4], [2, 3]]
    [transfer] = exchange.transfers
    assert transfer.what == "rows" and transfer.bytes_RR.tolist() == [[4, 8], [4, 0]]


def test_a_gradient_goes_back_to_where_its_row_came_from():
    exchange, rows = (
        SimulatedExchange(2),
        [torch.zeros(3, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)],
    )
    first, second = exchange.all_to_all(rows, [[1, 2], [1, 0]], [[1, 1], [2, 0]])
    (
        first[:, 0] @ torch.tensor([10.0, 40.0]) + second[:, 0] @ torch.tensor([20.0, 30.0])
    ).backward()
    assert rows[0].grad.flatten().tolist() == [10, 20, 30] and rows[1].grad.tolist() == [[40]]
    assert [(t.what, t.bytes_RR.tolist()) for t in exchange.transfers] == [
        ("rows", [[4, 8], [4, 0]]),
        ("gradients", [[4, 4], [8, 0]]),
    ]


def test_rows_go_to_their_expert_and_come_back_in_their_order():
    """Expert e multiplies by 10^e; rank 0 holds 1 and 3, rank 1 holds 0 and 2."""
    placement, seen = Placement(((1, 3), (0, 2))), []

    def bank(experts):
        def run(rows_AD, counts_P):
            seen.append((experts, rows_AD.flatten().tolist(), counts_P.tolist()))
            factor_A = torch.tensor([10.0**e for e in experts]).repeat_interleave(counts_P)
            return rows_AD * factor_A.unsqueeze(-1)

        return run

    rows = [torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([[6.0], [7.0]])]
    counts = [
        torch.tensor([1, 0, 2, 1]),
        torch.tensor([0, 1, 0, 1]),
    ]  # the row with 5 is beyond the counts: it has no expert
    out = run_rows(
        rows,
        counts,
        [bank(experts) for experts in placement.experts_of_rank],
        SimulatedExchange(2),
        placement,
    )
    assert [y.flatten().tolist() for y in out] == [[1, 200, 300, 4000, 0], [60, 7000]]
    assert seen == [((1, 3), [6, 4, 7], [1, 2]), ((0, 2), [1, 2, 3], [1, 2])]


def test_a_rows_copies_of_an_expert_take_turns_and_each_rank_begins_with_another():
    placement = Placement(((0, 1), (0, 2), (0, 3)))
    counts = [torch.tensor([4, 0, 0, 0])] * 3
    exchange = SimulatedExchange(3)
    run_rows([torch.zeros(4, 1)] * 3, counts, [lambda rows, counts: rows] * 3, exchange, placement)
    assert exchange.transfers[1].bytes_RR.tolist() == [
        [8, 4, 4],
        [4, 8, 4],
        [4, 4, 8],
    ]  # four bytes a row


# What is computed.


@st.composite
def spread(draw):
    """(sizes, placement, E, K, pull, seed): idle ranks, empty experts, one rank, as many ranks as experts, copies of experts."""
    R, P = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = [(draw(st.integers(0, 2)), draw(st.integers(1, 5))) for _ in range(R)]
    kind = draw(st.sampled_from(["contiguous", "round robin", "any order", "by load", "copies"]))
    E = R * P
    if kind == "copies":
        E = draw(st.integers(P, R * P))
        placement = by_load(
            draw(st.lists(st.integers(0, 9), min_size=E, max_size=E)), R, replicas=R * P - E
        )
    elif kind == "by load":
        placement = by_load(draw(st.lists(st.integers(0, 9), min_size=E, max_size=E)), R)
    elif kind == "any order":
        order = draw(st.permutations(range(E)))
        placement = Placement([order[rank * P : (rank + 1) * P] for rank in range(R)])
    else:
        placement = {"contiguous": contiguous, "round robin": round_robin}[kind](E, R)
    return (
        sizes,
        placement,
        draw(st.integers(1, E)),
        draw(st.sampled_from([0.0, 3.0])),
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("name", READS_TOKENS_ALONE)
@fast
@given(
    drawn=spread(),
    options=st.fixed_dictionaries(
        {
            "capacity_factor": st.sampled_from([None, 0.0, 0.5, 1.0, 1.25]),
            "n_shared_experts": st.integers(0, 1),
            "bias": st.booleans(),
        }
    ),
    training=st.booleans(),
)
def test_ranks_together_compute_what_each_computes_alone(name, drawn, options, training):
    sizes, placement, K, pull, seed = drawn
    if placement.n_experts < TOP_K.get(name, 1):
        return
    if "capacity_factor" not in signature(ROUTERS[name]).parameters:
        del options["capacity_factor"]
    moe = layer(name, E=placement.n_experts, K=K, d_ff=4, **options).double().train(training)
    with torch.no_grad():
        moe.router.weight.mul_(1 + seed / 10)  # from nearly tied to sure of itself
    xs = tokens(*sizes, pull=pull)
    found = everything(moe, xs, lambda moe, xs: simulate(moe, xs, placement)[:2])
    assert_same(found, everything(moe, xs, each_alone))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 4},
        {
            "router_options": {"weights_on": "input", "score_func": "sigmoid"},
            "norm_topk_prob": False,
        },
        {"glu": False, "activation": "relu"},
        {"backend": "loop"},
        {"backend": "padded"},
        {"backend": "padded", "capacity_factor": 1.0},
        {"n_shared_experts": 2},
    ],
    ids=str,
)
def test_it_holds_for_every_kind_of_experts(options):
    moe, xs = (
        seeded(MixtureOfExperts, config(**options)).double(),
        tokens((2, 5), (0, 3), (1, 4), (3, 1)),
    )
    for placement in (contiguous(4, 4), by_load([9, 1, 1, 1], 4, replicas=4)):
        found = everything(moe, xs, lambda moe, xs: simulate(moe, xs, placement)[:2])
        assert_same(found, everything(moe, xs, each_alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_holds_in_lower_precision(dtype):
    moe, xs = layer("topk").to(dtype), tokens((2, 5), (0, 3), (1, 4), (3, 1), dtype=dtype)
    found = everything(moe, xs, lambda moe, xs: simulate(moe, xs, round_robin(4, 4))[:2])
    assert found["y0"].dtype == dtype
    assert_same(found, everything(moe, xs, each_alone))


def test_under_autocast_rows_go_out_in_float32_and_come_back_in_bfloat16():
    moe, xs, exchange = (
        layer("topk"),
        tokens((2, 5), (1, 4), dtype=torch.float32),
        SimulatedExchange(2),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(moe, xs, lambda moe, xs: simulate(moe, xs, exchange=exchange)[:2])
        assert_same(found, everything(moe, xs, each_alone), torch.bfloat16)
    _, there, back, *_ = exchange.transfers
    assert torch.equal(2 * back.bytes_RR.T, there.bytes_RR)


def test_the_layout_of_the_tokens_does_not_matter():
    moe, xs = (
        layer("topk").double(),
        [
            randn(8, 3, 2, dtype=torch.float64).permute(2, 1, 0),
            randn(4, 3, 16, dtype=torch.float64)[::2, :, ::2],
        ],
    )
    assert not xs[0].is_contiguous() and not xs[1].is_contiguous()
    for y, same in zip(
        simulate(moe, xs).outputs, simulate(moe, [x.contiguous() for x in xs]).outputs
    ):
        assert torch.equal(y, same)


def test_no_token_at_all_gives_empty_outputs_and_gradients_of_zeros():
    moe, xs = layer("topk", n_shared_experts=1).double(), tokens((0, 3), (2, 0), (0, 0), (0, 1))
    found = everything(moe, xs, lambda moe, xs: simulate(moe, xs)[:2])
    assert [found[f"y{rank}"].shape for rank in range(4)] == [
        (0, 3, 8),
        (2, 0, 8),
        (0, 0, 8),
        (0, 1, 8),
    ]
    assert all((gradient == 0).all() for name, gradient in found.items() if "experts." in name)
    assert simulate(moe, xs).traffic.imbalance == 1.0


def test_experts_of_a_rank_that_gets_no_row_have_gradients_of_zeros_not_none():
    moe, xs = (
        layer("topk", K=1).double(),
        [x.detach().abs().requires_grad_() for x in tokens((1, 6), (1, 6))],
    )
    with torch.no_grad():
        moe.router.weight.zero_()[0] = 1  # every token is positive: everything to expert 0
    simulation = simulate(moe, xs)
    assert simulation.traffic.rows_per_rank.tolist() == [12, 0]
    sum(y.square().sum() for y in simulation.outputs).backward()
    used_E = moe.experts.down_proj.grad.flatten(1).abs().sum(1) > 0
    assert used_E.tolist() == [True, False, False, False]


def test_without_gradients_nothing_is_kept_for_a_backward_pass():
    exchange = SimulatedExchange(2)
    with torch.no_grad():
        outputs = simulate(
            layer("topk").double(), tokens((1, 2), (1, 2)), exchange=exchange
        ).outputs
    assert [transfer.what for transfer in exchange.transfers] == ["counts", "rows", "rows"]
    assert not any(y.requires_grad for y in outputs)


def test_the_rest_of_a_compiled_step_stays_compiled_and_gives_the_same():
    moe, xs = layer("topk").double(), tokens((2, 3), (1, 4))
    run = lambda moe, xs: simulate(moe, xs, round_robin(4, 2))[:2]
    assert_same(
        everything(moe, xs, torch.compile(run, backend="aot_eager")), everything(moe, xs, run)
    )


def test_ranks_that_hold_only_their_experts_compute_the_same():
    """The banks of real ranks, each with its own shard, over the simulated exchange."""
    placement, whole = (
        by_load([5, 1, 1, 2, 3, 1], 4, replicas=2),
        seeded(Experts, 8, 4, 6, bias=True).double(),
    )
    banks = [
        seeded(Experts, 8, 4, 6, bias=True, ep_size=4, shard=ExpertShard(placement, rank)).double()
        for rank in range(4)
    ]
    routings = [routing_of(randn(2, 3, 6, seed=rank).topk(2).indices, 6) for rank in range(4)]
    xs = [randn(2, 3, 8, seed=rank, dtype=torch.float64) for rank in range(4)]
    plans, rows = zip(*(whole.gather(x, routing) for x, routing in zip(xs, routings)))
    outs = run_rows(
        rows,
        [plan.counts_E for plan in plans],
        [bank.run_rows for bank in banks],
        SimulatedExchange(4),
        placement,
    )
    total = sum(
        whole.combine(out, x, plan, routing).square().sum()
        for out, x, plan, routing in zip(outs, xs, plans, routings)
    )
    total.backward()
    sum(whole(x, routing).square().sum() for x, routing in zip(xs, routings)).backward()
    for name, parameter in whole.named_parameters():
        summed = torch.zeros_like(parameter)
        for bank in banks:
            mine = bank.get_parameter(name)
            assert mine.shape[0] == placement.places_per_rank == 2 and torch.equal(
                mine, parameter[list(bank.owned)]
            )
            summed[list(bank.owned)] += mine.grad
        assert close(summed, parameter.grad), name


# What was sent.


@fast
@given(drawn=spread(), capacity_factor=st.sampled_from([None, 0.5, 1.0]))
def test_the_bytes_are_those_of_the_tensors_that_moved(drawn, capacity_factor):
    sizes, placement, K, pull, _ = drawn
    moe, xs = (
        layer("topk", E=placement.n_experts, K=K, capacity_factor=capacity_factor).double(),
        tokens(*sizes, pull=pull),
    )
    exchange = Watched(placement.n_ranks)
    outputs, routings, traffic = simulate(moe, xs, placement, exchange=exchange)
    sum(y.sum() for y in outputs).backward()
    assert [what for what, *_ in exchange.moved] == [
        "counts",
        "rows",
        "rows",
        "gradients",
        "gradients",
    ]
    for transfer, (what, rows, got) in zip(exchange.transfers, exchange.moved, strict=True):
        assert transfer.what == what and transfer.bytes_RR.shape == (
            placement.n_ranks,
            placement.n_ranks,
        )
        assert transfer.bytes_RR.sum(1).tolist() == [t.nbytes for t in rows]
        assert transfer.bytes_RR.sum(0).tolist() == [t.nbytes for t in got]
    counts, dispatch, combine, to_experts, back = (
        transfer.bytes_RR for transfer in exchange.transfers
    )
    assert (counts == 8 * (placement.places_per_rank + 2)).all()
    assert (
        torch.equal(combine, dispatch.T)
        and torch.equal(to_experts, dispatch)
        and torch.equal(back, combine)
    )
    assert torch.equal(traffic.rows_RR * traffic.row_bytes, dispatch) and traffic.row_bytes == 8 * 8
    assert torch.equal(traffic.bytes_RR, dispatch - torch.diag(dispatch.diagonal()))
    for rank, routing in enumerate(routings):
        owned_by = torch.zeros(
            placement.n_experts, placement.n_ranks
        )  # an expert's rows go to where it stands, shared out evenly
        for expert, places in enumerate(placement.places_of_expert):
            owned_by[expert, [place // placement.places_per_rank for place in places]] = 1 / len(
                places
            )
        rows_R = routing.tokens_per_expert.float() @ owned_by
        assert (traffic.rows_RR[rank] - rows_R).abs().max() < len(placement.replicated) + 1e-3
        assert traffic.rows_RR[rank].sum() == routing.tokens_per_expert.sum()


@fast
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_with_uniform_routing_forward_moves_2_v_and_a_step_4_v(R, P, B, N):
    E, exchange = R * P, SimulatedExchange(R)
    moe, xs = (
        layer("topk", E=E, K=E).double(),
        tokens(*[(B, N)] * R),
    )  # every token visits every expert
    outputs, _, traffic = simulate(moe, xs, round_robin(E, R), exchange=exchange)
    uniform_RR = uniform_bytes(B * N, E, 8 * 8, R)
    assert torch.equal(traffic.bytes_RR.double(), uniform_RR) and traffic.imbalance == 1.0
    V = B * N * E * 8 * 8 * (R - 1) / R

    def volume():
        return sum(
            (t.bytes_RR.sum(1) - t.bytes_RR.diagonal()).double()
            for t in exchange.transfers
            if t.what != "counts"
        ).tolist()

    assert volume() == [2 * V] * R
    sum(y.sum() for y in outputs).backward()
    assert volume() == [4 * V] * R


def test_random_routing_moves_on_average_what_uniform_routing_moves():
    total, n_runs = torch.zeros(4, 4, dtype=torch.float64), 60
    for seed in range(n_runs):
        moe = seeded(MixtureOfExperts, config(n_experts=8, top_k=2, d_ff=2), seed=seed)
        xs = [randn(1, 64, 8, seed=1000 + 4 * seed + rank) for rank in range(4)]
        total += simulate(moe, xs).traffic.bytes_RR
    assert torch.allclose(total / n_runs, uniform_bytes(64, 2, 4 * 8, 4), rtol=0.1)


def test_traffic_by_hand():
    traffic = Traffic(torch.tensor([[5, 1], [3, 3]]), row_bytes=10)
    assert traffic.bytes_RR.tolist() == [[0, 10], [30, 0]] and traffic.rows_RR.tolist() == [
        [5, 1],
        [3, 3],
    ]
    assert traffic.rows_per_rank.tolist() == [8, 4]
    assert traffic.straggler == 0 and traffic.imbalance == pytest.approx(8 / 6)


def test_copies_of_the_hot_expert_take_the_straggler_away():
    moe, xs = layer("topk", K=1).double(), [x.detach().abs() for x in tokens(*[(1, 8)] * 4)]
    with torch.no_grad():
        moe.router.weight.zero_()[0] = 1  # every token is positive: everything to expert 0
    alone = simulate(moe, xs).traffic
    assert alone.imbalance == 4.0 and alone.straggler == 0
    copied = simulate(
        moe, xs, by_load([32, 0, 0, 0], 4, replicas=4)
    ).traffic  # P = 2: expert 0 stands on every rank
    assert copied.rows_per_rank.tolist() == [8, 8, 8, 8] and copied.imbalance == 1.0


def test_an_exchange_that_is_used_again_goes_on_with_its_log_and_traffic_is_of_this_run():
    moe, exchange = layer("topk").double(), SimulatedExchange(2)
    first = simulate(moe, tokens((1, 2), (1, 2)), exchange=exchange).traffic
    second = simulate(moe, tokens((1, 4), (1, 4)), exchange=exchange).traffic
    assert (first.rows_RR.sum(), second.rows_RR.sum()) == (8, 16) and len(exchange.transfers) == 6
    exchange.transfers.clear()
    assert simulate(moe, tokens((1, 1), (1, 1)), exchange=exchange).traffic.rows_RR.sum() == 4


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: simulate(layer("topk"), []), "n_ranks=0 must be a whole number, at least 1"),
        (
            lambda: simulate(layer("topk").double(), tokens((1, 1), (1, 1), (1, 1))),
            "n_ranks=3 must divide n_experts=4",
        ),
        (
            lambda: simulate(layer("topk").double(), tokens((1, 1), (1, 1)), contiguous(4, 4)),
            "2 ranks .* must fit the placement: 4 ranks, 4 experts",
        ),
        (
            lambda: simulate(layer("topk").double(), tokens((1, 1), (1, 1)), contiguous(8, 2)),
            "experts must fit the placement: 2 ranks, 8 experts",
        ),
        (
            lambda: simulate(
                layer("topk").double(), tokens((1, 1), (1, 1)), exchange=SimulatedExchange(4)
            ),
            "4 ranks .* must fit the placement: 2 ranks",
        ),
        (
            lambda: simulate(layer("topk").double(), [*tokens((1, 1)), *tokens((1, 1), D=7)]),
            r"x has shape \(1, 1, 7\)",
        ),
        (
            lambda: simulate(
                layer("topk").double(), [*tokens((1, 1)), *tokens((1, 1), dtype=torch.float32)]
            ),
            "rank 1 sends rows of 8 x torch.float32, but rank 0 has rows of 8 x torch.float64; all ranks must have the same width and dtype",
        ),
        (
            lambda: simulate(layer("hash"), tokens((1, 1), (1, 1), dtype=torch.float32)),
            "token_ids=None .* a HashRouter routes by token id",
        ),
        (lambda: SimulatedExchange(0), "n_ranks=0 must be a whole number"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_rows_of_another_width_or_dtype_are_refused_before_any_row_moves():
    exchange, counts = SimulatedExchange(2), [torch.tensor([1, 1])] * 2
    for rows in (
        [torch.zeros(2, 4), torch.zeros(2, 3)],
        [torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bfloat16)],
    ):
        with pytest.raises(ValueError, match="all ranks must have the same width and dtype"):
            run_rows(rows, counts, [lambda rows, counts: rows] * 2, exchange, contiguous(2, 2))
    with pytest.raises(ValueError, match="rows have dtype torch.int64, must be one of"):
        run_rows(
            [torch.zeros(2, 4, dtype=torch.int64)] * 2,
            counts,
            [lambda rows, counts: rows] * 2,
            exchange,
            contiguous(2, 2),
        )
    assert [transfer.what for transfer in exchange.transfers] == ["counts", "counts"]


def test_experts_that_reach_nobody_say_so():
    experts = Experts(8, 4, 4, ep_size=2, shard=ExpertShard(contiguous(4, 2), 0))
    with pytest.raises(
        ValueError,
        match="shard.exchange=None: these experts cannot be reached from other ranks; see parallel.simulate",
    ):
        experts(randn(1, 1, 8), routing_of([[[0, 3]]], 4))


@pytest.mark.parametrize("ep_size", [1, 4])
def test_a_shard_of_another_size_is_refused(ep_size):
    with pytest.raises(
        ValueError,
        match=f"ep_size={ep_size} and n_experts=4 must be those of the shard's placement: 2 ranks, 4 experts",
    ):
        Experts(8, 4, 4, ep_size=ep_size, shard=ExpertShard(contiguous(4, 2), 0))


def test_real_processes_are_asked_for_where_there_are_none():
    for make in (TorchExchange, lambda: Experts(8, 4, 4, ep_size=2)):
        with pytest.raises(RuntimeError, match="needs torch.distributed: start under torchrun"):
            make()


def test_one_real_process_is_one_rank_and_no_more():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="ep_size=2 must be the number of processes, 1"):
            Experts(8, 4, 4, ep_size=2)
        shard = ExpertShard(contiguous(4, 1), 0, TorchExchange())
        ours, alone = (
            seeded(MixtureOfExperts, config(), shard=one).double() for one in (shard, None)
        )
        [x] = tokens((2, 3))
        assert_same(everything(ours, [x], each_alone), everything(alone, [x], each_alone))
    finally:
        dist.destroy_process_group()
