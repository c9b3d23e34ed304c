"""Two real processes against one: sums, the global balance loss, and the bias of a loss-free router."""

import pytest
import torch

from moe_core import TopKRouter, losses
from moe_core.ranks import mean_over_ranks, n_ranks, sum_over_ranks
from moe_core.routers import (
    LossFreeRouter,
    QuantileBalancingRouter,
    ReLURouter,
    ZeroComputationRouter,
)
from tests.gang import Gang

from .helpers import close, randn, seeded

BIG = 2**53 + 1  # not a float64
X = randn(4, 6, 8, dtype=torch.float64)
LOPSIDED = torch.cat([X[:2], -3 * X[2:].abs()])  # what rank 1 has is far from what rank 0 has
UNEVEN = torch.arange(6) < torch.tensor([6, 4, 1, 0]).view(
    4, 1
)  # 10 real tokens on rank 0, 1 on rank 1


def balance(loss_of):
    """Value and router gradient of loss_of(router), in float64."""
    router = seeded(TopKRouter, 8, 4, 2).double()
    loss = loss_of(router)
    loss.backward()
    return loss.detach(), router.weight.grad


def with_share(r, parts):
    routings = [r(part) for part in parts]
    share = losses.global_share(routings)
    return sum(losses.load_balance(routing, share=share) for routing in routings) / len(routings)


def bias(steps, rule):
    """The bias after these steps, each a list of micro-batches (x, padding_mask)."""
    router = seeded(LossFreeRouter, 8, 4, 2, bias_update=rule).double()
    for parts in steps:
        router.update([router(*part) for part in parts])
    return router.expert_bias


STATEFUL = {
    "relu": lambda: ReLURouter(8, 4, 2.0, l1_weight=0.1),
    "quantile_balancing": lambda: QuantileBalancingRouter(8, 4, 2, ema_decay=0.5),
    "zero_computation": lambda: ZeroComputationRouter(
        8, 4, 2, bias_update_rate=0.1, mean_ffn_experts=1.0
    ),
}


def state_after(name, parts):
    """The buffers of this router after three updates with these micro-batches. A shifted weight makes the ranks disagree."""
    torch.manual_seed(0)
    router = STATEFUL[name]().double()
    for _ in range(3):
        router.update([router(*part) for part in parts])
    return {key: value for key, value in router.state_dict().items() if key != "weight"}


def work(rank, _):
    mine = slice(2 * rank, 2 * rank + 2)
    x, padding_mask = X[mine], UNEVEN[mine]
    count, value = torch.tensor([BIG, rank]), torch.tensor([1.0, rank])
    out = {
        "n_ranks": n_ranks(),
        "sum": sum_over_ranks(count),
        "mean": mean_over_ranks(value),
        "untouched": (count, value),
        "even": balance(lambda r: with_share(r, x.split(1))),
        "global": balance(
            lambda r: losses.global_balance(
                [r(*part) for part in zip(x.split(1), padding_mask.split(1))]
            )
        ),
    }
    for rule in ("sign", "proportional"):
        out[rule] = bias([[(x[:1], padding_mask[:1]), (x[1:], padding_mask[1:])]] * 3, rule)
        out["idle " + rule] = bias([[(x, None)] if rank == 0 else []] * 3, rule)
    for name in STATEFUL:
        out[name] = state_after(name, [(LOPSIDED[mine], padding_mask)])
    return out


@pytest.fixture(scope="module")
def ranks(gangs):
    return gangs(2).run(work)


def test_sums_and_means_are_over_all_ranks_and_exact_for_integers(ranks):
    for rank, out in enumerate(ranks):
        assert out["n_ranks"] == 2
        assert out["sum"].tolist() == [2 * BIG, 1] and out["mean"].tolist() == [1, 0.5]
        assert [t.tolist() for t in out["untouched"]] == [[BIG, rank], [1, rank]]


def test_the_mean_over_ranks_with_the_global_share_is_the_big_batch(ranks):
    value, gradient = balance(lambda r: losses.load_balance(r(X)))
    assert close(sum(out["even"][0] for out in ranks) / 2, value)
    assert close(sum(out["even"][1] for out in ranks) / 2, gradient)


def test_the_mean_over_ranks_of_the_global_loss_is_the_big_batch_with_any_padding(ranks):
    value, gradient = balance(lambda r: losses.load_balance(r(X, UNEVEN)))
    assert close(sum(out["global"][0] for out in ranks) / 2, value)
    assert close(sum(out["global"][1] for out in ranks) / 2, gradient)
    assert not torch.allclose(
        ranks[0]["global"][0], ranks[1]["global"][0], rtol=1e-3
    )  # each has its part


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_bias_is_the_same_on_all_ranks_and_that_of_one_process(ranks, rule):
    alone = bias([[(X, UNEVEN)]] * 3, rule)
    assert alone.abs().max() > 0
    for out in ranks:
        assert torch.equal(out[rule], alone)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_a_rank_without_any_micro_batch_follows_the_others(ranks, rule):
    alone = bias([[(X[:2], None)]] * 3, rule)
    for out in ranks:
        assert torch.equal(out["idle " + rule], alone)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_a_router_learns_outside_the_gradient_is_the_same_on_all_ranks(ranks, name):
    first, second = (out[name] for out in ranks)
    alone = [
        state_after(name, [(LOPSIDED[part], UNEVEN[part])]) for part in (slice(0, 2), slice(2, 4))
    ]
    for key in first:
        assert torch.equal(first[key], second[key]), key
    # Each rank by itself would have learned something else, so they did listen to each other.
    assert any(not torch.equal(alone[0][key], alone[1][key]) for key in first)


def test_with_one_process_nothing_is_summed_and_a_new_tensor_is_returned():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for result in (sum_over_ranks(x), mean_over_ranks(x)):
        assert result.tolist() == [1, 2] and not result.requires_grad
        result += 1
    assert x.tolist() == [1, 2] and n_ranks() == 1


def test_a_mean_of_integers_is_refused():
    with pytest.raises(ValueError, match="dtype torch.int64, must be floating point"):
        mean_over_ranks(torch.tensor([1, 2]))


def fail(rank, _):
    assert rank == 0, "rank 1 fails"
    return sum_over_ranks(torch.ones(1))  # waits for a rank that is gone


def test_when_one_rank_fails_all_end_and_the_reason_is_shown():
    gang = Gang(2)
    with pytest.raises(AssertionError, match="rank 1 fails"):
        gang.run(fail)
    assert gang.closed
