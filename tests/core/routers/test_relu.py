"""ReLURouter: weights that are sparse by themselves, and the L1 coefficient that keeps them so."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core import MixtureOfExperts, ReLURouter

from ..helpers import about, close, config, fast, mask, randn, seeded


def identity(logits, **options) -> tuple[ReLURouter, torch.Tensor]:
    """A router and tokens whose logits are these: (N, E) as nested lists."""
    x = torch.tensor([logits])
    router = ReLURouter(x.shape[-1], x.shape[-1], **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(x.shape[-1]))
    return router, x


def test_a_weight_is_the_logit_where_it_is_positive_and_the_slot_is_not_selected_elsewhere():
    router, x = identity([[2.0, -1.0, 0.0], [-1.0, -2.0, -3.0], [0.5, 3.0, 1.0]])
    routing = router(x).check()
    assert routing.expert_weights[0].tolist() == [[2, 0, 0], [0, 0, 0], [0.5, 3, 1]]
    assert routing.selected_mask[0].tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert torch.equal(routing.logits, x) and torch.equal(routing.scores, x.relu())
    assert routing.capacity is None and not routing.dropless


def test_a_token_that_takes_no_expert_gets_exactly_zero():
    moe = seeded(MixtureOfExperts, config(router="relu", d_model=4))
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(4))
    y, _routing = moe(torch.tensor([[[1.0, 1, 1, 1], [-1, -1, -1, -1]]]))
    assert (y[0, 0] != 0).any() and (y[0, 1] == 0).all()


def test_the_output_is_continuous_where_an_expert_comes_in():
    moe = seeded(MixtureOfExperts, config(router="relu", d_model=4, backend="loop")).double()
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(4))
    x = torch.tensor([[[1.0, 0, -1, -1]]], dtype=torch.float64)
    step = torch.tensor([0, 1e-9, 0, 0], dtype=torch.float64)
    before, after = moe(x - step), moe(x + step)
    assert [routing.selected_mask.sum() for _y, routing in (before, after)] == [1, 2]
    assert (before[0] - after[0]).abs().max() < 1e-8


def test_the_l1_loss_of_a_case_by_hand():
    router, x = identity([[2.0, -1.0], [1.0, 3.0], [4.0, -1.0]], expansion=1.0, l1_weight=0.5)
    # E = 2, k = 1, T = 3; expert 0 has 3 tokens and weights of 7, expert 1 has 1 token and weights of 3
    assert router(x).losses["l1"].item() == about(0.5 * 2 / 9 * (3 * 7 + 1 * 3))
    router, x = identity([[2.0, -1.0], [1.0, 3.0], [4.0, -1.0]], expansion=2.0, l1_weight=0.5)
    assert router(x).losses["l1"].item() == about(0.5 / 9 * (3 * 7 + 1 * 3))


def test_the_weights_of_a_busy_expert_are_pushed_harder_and_its_count_has_no_gradient():
    router, x = identity([[2.0, -1.0], [1.0, 3.0], [4.0, -1.0]], l1_weight=1.0)
    x.requires_grad_()
    router(x).losses["l1"].backward()
    assert close(x.grad[0], 2 / 9 * torch.tensor([[3.0, 0], [3, 1], [3, 0]]))


def test_padding_counts_neither_in_the_loss_nor_in_the_sparsity():
    router, x = identity([[2.0, -1.0], [1.0, 3.0], [4.0, 9.0]], l1_weight=0.5)
    padding_mask = torch.tensor([[True, True, False]])
    assert router(x, padding_mask).losses["l1"] == router(x[:, :2]).losses["l1"]
    router.update(
        [router(x[:, :1], padding_mask[:, :1]), router(x[:, 2:], padding_mask[:, 2:])]
    )  # 1 expert for 1 real token
    assert router.l1_coefficient.item() == about(0.5 / 1.2)


@pytest.mark.parametrize(
    ("logits", "expansion", "factor"),
    [
        ([[1.0, 1.0], [1.0, -1.0]], 1.0, 1.2),  # 3 experts for 2 tokens: too many
        ([[1.0, -1.0], [1.0, -1.0]], 1.0, 1 / 1.2),  # exactly one each: not too many
        ([[-1.0, -1.0], [1.0, -1.0]], 1.0, 1 / 1.2),
        ([[1.0, 1.0], [1.0, -1.0]], 1.5, 1 / 1.2),  # the aim may be a fraction
        ([[1.0, 1.0], [1.0, 1.0]], 1.5, 1.2),
        ([[1.0, 1.0], [1.0, 1.0]], 2.0, 1 / 1.2),  # k = E can never be too many
    ],
)
def test_lambda_rises_when_tokens_take_too_many_experts_and_falls_otherwise(
    logits, expansion, factor
):
    router, x = identity(logits, expansion=expansion, l1_weight=1e-3)
    router.update([router(x)])
    assert router.l1_coefficient.item() == about(1e-3 * factor)


@fast
@given(st.integers(0, 99), st.integers(1, 5), st.integers(0, 5), st.sampled_from([1.0, 1.5, 2.0]))
def test_one_update_counts_all_micro_batches_as_one_batch(seed, n, m, expansion):
    x, padding_mask = randn(1, n + m, 8, seed=seed), mask(1, n + m, seed=seed)
    whole = seeded(ReLURouter, 8, 4, expansion, seed=seed)
    parts = copy.deepcopy(whole)
    whole.update([whole(x, padding_mask)])
    parts.update([parts(x[:, :n], padding_mask[:, :n]), parts(x[:, n:], padding_mask[:, n:])])
    assert torch.equal(whole.l1_coefficient, parts.l1_coefficient)


@pytest.mark.parametrize(
    ("logits", "back"), [([-1.0, -1.0], [1.0, 1.0]), ([1.0, 1.0], [-1.0, -1.0])]
)
def test_lambda_always_finds_its_way_back(logits, back):
    def updates(values, n):
        router, x = identity([values] * 3, l1_weight=1.0)
        router.l1_coefficient.copy_(coefficient)
        for _ in range(n):
            router.update([router(x)])
        return router.l1_coefficient.clone()

    coefficient = torch.tensor(1.0)
    far = coefficient = updates(
        logits, 800
    )  # far past the range of float32, were it not for the limits
    assert far.isfinite() and far > 0
    coefficient = updates(back, 800)
    assert (coefficient / far).log().abs() > 10


def test_reset_starts_lambda_again_also_where_memory_was_empty():
    with torch.device("meta"):
        router = ReLURouter(8, 4, l1_weight=0.25)
    router = router.to_empty(device="cpu")
    router.reset_parameters()
    assert router.l1_coefficient == 0.25


def test_without_a_token_lambda_stays():
    router, x = identity([[1.0, 1.0]], l1_weight=0.5)
    for routings in ([], [router(x[:, :0])], [router(x, torch.zeros(1, 1, dtype=torch.bool))]):
        router.update(routings)
        assert router.l1_coefficient == 0.5


def test_lambda_starts_at_1e_minus_8_as_a_float32_buffer_and_stays_one_in_a_bfloat16_model():
    router = ReLURouter(4, 4)
    assert router.l1_coefficient.item() == about(1e-8) and "l1_coefficient" in router.state_dict()
    router = router.bfloat16()
    assert router.l1_coefficient.dtype == torch.float32 and router.weight.dtype == torch.bfloat16
    router.update([router(randn(1, 8, 4, dtype=torch.bfloat16))])
    assert router.l1_coefficient.dtype == torch.float32


@pytest.mark.parametrize("expansion", [1.0, 2.5])
def test_the_number_of_experts_per_token_swings_round_the_expansion(expansion):
    """A regression that by itself would like to use all experts; only the penalty stands against it."""
    router, x = (
        seeded(ReLURouter, 8, 8, expansion, l1_weight=0.1, l1_multiplier=1.05),
        randn(1, 64, 8),
    )
    x[..., 0] = (
        1  # something to say no with: the logits of tokens around zero are positive half of the time whatever the weights
    )
    optimizer, taken = torch.optim.Adam(router.parameters(), lr=0.01), []
    for _ in range(200):
        routing = router(x)
        loss = (routing.expert_weights - 1).square().mean() + routing.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        router.update([routing])
        taken.append(routing.selected_mask.sum().item() / 64)
    assert taken[0] > 3
    assert sum(taken[40:]) / 160 == pytest.approx(expansion, rel=0.1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("expansion", 0, "above 0 and at most n_experts=4"),
        ("expansion", 4.1, "above 0 and at most n_experts=4"),
        ("expansion", None, "above 0 and at most"),
        ("l1_weight", -1, "at least 0"),
        ("l1_multiplier", 0.9, "at least 1"),
    ],
)
def test_a_wrong_option_is_refused(name, value, message):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be {message}"):
        ReLURouter(8, 4, **{name: value})
