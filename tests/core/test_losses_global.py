"""Balance over the global batch: cutting it into micro-batches changes neither value nor gradient."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import LanguageModel, LMConfig, TopKRouter, losses

from .helpers import about, close, config, fast, randn, routing_of, seeded


def router():
    return seeded(TopKRouter, 8, 4, 2).double()


def value_and_gradient(make_loss):
    r = router()
    loss = make_loss(r)
    loss.backward()
    return loss.item(), r.weight.grad


def same(one, two) -> bool:
    """Equal values and gradients. At perfect balance the gradients of the tokens cancel; each is of the order of 0.1."""
    values = (torch.tensor(value, dtype=torch.float64) for value in (one[0], two[0]))
    return close(*values) and close(one[1], two[1], size=0.1)


X = randn(8, 5, 8, dtype=torch.float64)
BIG = value_and_gradient(lambda r: losses.load_balance(r(X)))
assert BIG[1].abs().max() > 1e-4, "a gradient that is next to nothing would show nothing"


@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [1] * 8])
def test_the_mean_over_equal_micro_batches_with_the_global_share_is_the_big_batch(sizes):
    def accumulated(r):
        routings = [r(part) for part in X.split(sizes)]
        share = losses.global_share(routings)
        return sum(losses.load_balance(routing, share=share) for routing in routings) / len(sizes)

    assert same(value_and_gradient(accumulated), BIG)


@pytest.mark.parametrize("sizes", [[8], [5, 3], [1, 6, 1]])
def test_the_global_loss_is_the_big_batch_however_it_is_cut(sizes):
    assert same(
        value_and_gradient(lambda r: losses.global_balance([r(part) for part in X.split(sizes)])),
        BIG,
    )


@fast
@given(st.integers(0, 99), st.lists(st.integers(1, 7), max_size=3, unique=True))
def test_with_any_padding_the_global_loss_is_the_big_batch(seed, cuts):
    padding_mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed)) < 0.6
    sizes = [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 8])]
    parts = list(zip(X.split(sizes), padding_mask.split(sizes)))
    big = value_and_gradient(lambda r: losses.load_balance(r(X, padding_mask)))
    assert same(
        value_and_gradient(lambda r: losses.global_balance([r(*part) for part in parts])), big
    )


def test_gradients_can_be_accumulated_one_micro_batch_after_the_other_once_the_share_is_known():
    r = router()
    with torch.no_grad():  # the first pass only counts
        share = losses.global_share([r(part) for part in X.split(2)])
    for part in X.split(2):
        (losses.load_balance(r(part), share=share) / 4).backward()
    assert close(r.weight.grad, BIG[1])


def test_a_trainer_of_a_language_model_gets_the_big_batch_for_every_layer():
    moe = config(aux_loss_weight=0.0)
    model = seeded(
        LanguageModel,
        LMConfig(vocab_size=16, d_model=8, n_layers=2, n_heads=2, max_seq_len=6, moe=moe),
    ).double()
    tokens = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(0))
    routings = [model(part)[1] for part in tokens.split(1)]  # [micro-batch][layer]
    shares = [losses.global_share(layer) for layer in zip(*routings)]
    cut = sum(
        losses.load_balance(r, share=f) for micro in routings for r, f in zip(micro, shares)
    ) / len(routings)
    whole = sum(losses.load_balance(r) for r in model(tokens)[1])
    assert cut.item() == pytest.approx(whole.item(), rel=1e-12)
    parameters = [block.feed_forward.router.weight for block in model.blocks] + [
        model.embedding.weight
    ]
    for a, b in zip(torch.autograd.grad(cut, parameters), torch.autograd.grad(whole, parameters)):
        assert close(a, b) and b.abs().max() > 0


def test_averaging_the_losses_of_micro_batches_is_something_else():
    def micro(r):
        return sum(losses.load_balance(r(part)) for part in X.split(1)) / 8

    assert value_and_gradient(micro)[0] > BIG[0] + 0.01


def test_micro_batches_each_of_one_subject_are_balanced_globally():
    def of_expert(e):
        scores = torch.zeros(1, 3, 2)
        scores[..., e] = 1
        return routing_of(torch.full((1, 3, 1), e), 2, scores=scores)

    routings = [of_expert(0), of_expert(1)]
    assert losses.global_balance(routings) == 1
    assert losses.global_share(routings).tolist() == [0.5, 0.5]
    assert [losses.load_balance(r).item() for r in routings] == [2, 2]


def test_the_share_counts_slots_not_micro_batches():
    routings = [routing_of([[[0]] * 9], 2), routing_of([[[1]]], 2)]
    assert losses.global_share(routings).tolist() == about([0.9, 0.1])


def test_the_share_carries_no_gradient_even_if_it_is_given_one():
    scores = randn(1, 3, 2).softmax(-1).requires_grad_()
    share = torch.tensor([0.5, 0.5], requires_grad=True)
    losses.load_balance(routing_of([[[0]] * 3], 2, scores=scores), share=share).backward()
    assert share.grad is None and scores.grad.abs().max() > 0


def test_relative_scores_work_globally_too():
    r = seeded(TopKRouter, 8, 4, 2, score_func="sigmoid").double()
    whole = losses.load_balance(r(X), relative_scores=True)
    parts = losses.global_balance([r(part) for part in X.split(3)], relative_scores=True)
    assert close(parts, whole)
    assert not torch.allclose(whole, losses.load_balance(r(X)), rtol=1e-3)


def test_the_losses_read_the_routings_and_change_nothing():
    routings = [router()(part) for part in X.split(4)]
    before = copy.deepcopy([r.slots_per_expert() for r in routings])
    losses.global_balance(routings)
    assert all(torch.equal(a, r.slots_per_expert()) for a, r in zip(before, routings))
