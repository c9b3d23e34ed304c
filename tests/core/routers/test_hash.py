"""HashRouter: the token's id decides, the token's vector does not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core.routers.hash import HashRouter, balanced_table

from ..helpers import cases, close, fast, randn
from .drawn import drawn, survives

VOCAB = 50


def ids(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@fast
@given(
    cases(),
    st.sampled_from(["uniform", "learned"]),
    st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]),
)
def test_every_routing_keeps_the_contract(case, weights, score_func):
    router = drawn(
        HashRouter,
        case.D,
        case.E,
        case.K,
        scale=case.scale,
        seed=case.seed,
        vocab_size=VOCAB,
        weights=weights,
        score_func=score_func,
        norm_topk_prob=case.normalized,
        capacity_factor=case.capacity_factor,
    )
    assert survives(router, case, ids(case.B, case.N, seed=case.seed))


@fast
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 99), st.data())
def test_the_table_gives_every_id_k_different_experts_and_every_expert_as_many_ids(
    vocab_size, n_experts, seed, data
):
    top_k = data.draw(st.integers(1, n_experts))
    table = balanced_table(vocab_size, n_experts, top_k, seed=seed)
    assert table.shape == (vocab_size, top_k)
    assert all(len(set(row)) == top_k for row in table.tolist())
    counts = torch.bincount(table.flatten(), minlength=n_experts)
    assert counts.max() - counts.min() <= 1


def test_the_table_balances_occurrences_when_it_knows_them():
    frequencies = [1 / (rank + 1) for rank in range(1000)]  # Zipf
    table = balanced_table(1000, 4, 1, frequencies=frequencies)
    load = torch.zeros(4, dtype=torch.float64).scatter_add(
        0, table[:, 0], torch.tensor(frequencies, dtype=torch.float64)
    )
    blind = torch.zeros(4, dtype=torch.float64).scatter_add(
        0, balanced_table(1000, 4, 1)[:, 0], torch.tensor(frequencies, dtype=torch.float64)
    )
    assert load.max() - load.min() < 0.002 < 0.2 < blind.max() - blind.min()


def test_the_table_follows_the_seed_and_nothing_else():
    tables = [balanced_table(VOCAB, 4, 2, seed=seed) for seed in (0, 0, 1)]
    torch.manual_seed(5)
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], balanced_table(VOCAB, 4, 2))
    assert not torch.equal(tables[0], tables[2])


def test_two_experts_are_not_always_met_together():
    pairs = {tuple(sorted(row)) for row in balanced_table(400, 4, 2).tolist()}
    assert (
        len(pairs) == 6
    )  # all of them; {0, 1} and {2, 3} alone would be two experts of twice the size


def test_making_a_router_draws_no_more_random_numbers_than_its_weight_needs():
    after = []
    for vocab_size in (10, 1000):
        torch.manual_seed(0)
        HashRouter(8, 4, 2, vocab_size=vocab_size)
        after.append(torch.rand(1))
    assert torch.equal(*after)


def test_the_same_id_goes_to_the_same_experts_wherever_it_stands():
    router, token_ids = HashRouter(8, 4, 2, vocab_size=VOCAB), ids(3, 40)
    routing = router(randn(3, 40, 8), token_ids=token_ids)
    assert torch.equal(routing.expert_indices, router.table[token_ids])
    assert torch.equal(
        routing.expert_indices, router(randn(3, 40, 8, seed=7), None, token_ids).expert_indices
    )


def test_uniform_weights_are_1_over_k_and_nothing_is_learned():
    router = HashRouter(8, 4, 2, vocab_size=VOCAB)
    routing = router(randn(2, 5, 8), None, ids(2, 5)).check()
    assert (routing.expert_weights == 0.5).all() and list(router.parameters()) == []
    assert (routing.logits == 0).all() and (routing.scores == 0.25).all()
    assert (
        router.double()(randn(1, 2, 8, dtype=torch.float64), None, ids(1, 2)).scores.dtype
        == torch.float64
    )


def test_learned_weights_are_the_routers_scores_of_the_looked_up_experts():
    router = drawn(
        HashRouter, 8, 4, 2, vocab_size=VOCAB, weights="learned", routed_scaling_factor=1.5
    )
    x, token_ids = randn(2, 5, 8), ids(2, 5)
    routing = router(x, None, token_ids)
    scores = torch.log1p((x @ router.weight.T).exp()).sqrt()
    chosen = scores.gather(-1, router.table[token_ids])
    assert close(routing.expert_weights, 1.5 * chosen / chosen.sum(-1, keepdim=True))
    assert not torch.equal(
        routing.expert_indices, routing.scores.topk(2).indices
    )  # it weighs, it does not choose


def test_learned_weights_give_the_router_a_gradient():
    router = drawn(HashRouter, 8, 4, 2, vocab_size=VOCAB, weights="learned")
    (
        router(randn(2, 5, 8), None, ids(2, 5)).expert_weights * randn(2, 5, 2, seed=1)
    ).sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


def test_the_table_is_saved_with_the_model():
    one, two = (HashRouter(8, 4, 2, vocab_size=VOCAB, seed=seed) for seed in (0, 1))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.table, two.table)
    assert one.bfloat16().table.dtype == torch.int64


def test_ids_at_padding_are_not_read():
    router, token_ids = HashRouter(8, 4, 2, vocab_size=VOCAB), ids(1, 4)
    token_ids[0, 2:] = -100
    routing = router(randn(1, 4, 8), torch.tensor([[True, True, False, False]]), token_ids).check()
    assert routing.tokens_per_expert.sum() == 4


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_refused(wrong):
    with pytest.raises(IndexError):
        HashRouter(8, 4, 2, vocab_size=VOCAB)(randn(1, 1, 8), None, torch.tensor([[wrong]]))


def test_without_token_ids_the_error_says_what_to_do():
    router = HashRouter(8, 4, 2, vocab_size=VOCAB)
    with pytest.raises(
        ValueError, match=r"token_ids=None must be .B, N. int64: a HashRouter routes by token id"
    ):
        router(randn(1, 3, 8))


@pytest.mark.parametrize(
    "token_ids",
    [torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3)],
)
def test_token_ids_of_another_shape_or_type_are_refused(token_ids):
    with pytest.raises(ValueError, match=r"token_ids must be int64 of shape \(1, 3\)"):
        HashRouter(8, 4, 2, vocab_size=VOCAB)(randn(1, 3, 8), None, token_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be a whole number, at least 1"),
        (
            {"vocab_size": 3, "frequencies": [1, 2]},
            "frequencies has 2 entries, must have vocab_size=3",
        ),
        ({"vocab_size": 2, "frequencies": [1, -2]}, "frequencies=-2 must be at least 0"),
        (
            {"vocab_size": 2, "weights": "random"},
            "weights='random' must be one of 'uniform', 'learned'",
        ),
        ({"vocab_size": 2, "top_k": 5}, "top_k=5 must be between 1 and n_experts=4"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        HashRouter(8, 4, **options)


def test_reset_writes_the_table_again_where_memory_was_empty():
    with torch.device("meta"):
        empty = HashRouter(8, 4, 2, vocab_size=32, seed=3)
    empty = empty.to_empty(device="cpu")
    empty.table.fill_(-7)
    empty.reset_parameters()
    assert torch.equal(empty.table, HashRouter(8, 4, 2, vocab_size=32, seed=3).table)
