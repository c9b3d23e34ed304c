"""Expert choice: who is chosen, that the balance is perfect, and that it reads the future."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core import DropReason
from moe_core.routers.expert_choice import ExpertChoiceRouter, take_best

from ..helpers import about, cases, close, fast, randn, seeded

pools = st.sampled_from(["batch", "sequence"])
score_funcs = st.sampled_from(["softmax", "sigmoid"])
fractions = st.sampled_from([1.0, 0.5, 0.3])


def router(**changes) -> ExpertChoiceRouter:
    return seeded(ExpertChoiceRouter, **{"d_model": 8, "n_experts": 4, "expansion": 1.0, **changes})


def with_logits(rows, **changes):
    """A router whose logits are its input, and that input (1, T, E)."""
    rows = torch.tensor([rows], dtype=torch.float32)
    r = router(d_model=rows.shape[-1], n_experts=rows.shape[-1], **changes)
    with torch.no_grad():
        r.weight.copy_(torch.eye(rows.shape[-1]))
    return r, rows


@fast
@given(cases(), pools, score_funcs, fractions)
def test_every_routing_keeps_the_contract_and_each_expert_has_exactly_its_share(
    case, scope, score_func, fraction
):
    expansion = case.K * fraction
    r = seeded(
        ExpertChoiceRouter,
        case.D,
        case.E,
        expansion,
        scope=scope,
        score_func=score_func,
        z_loss_weight=0.01,
        seed=case.seed,
    )
    with torch.no_grad():
        r.weight *= case.scale
    routing = r(case.x(), case.padding_mask()).check()
    real = routing.real_tokens.sum(-1).tolist()
    sizes = real if scope == "sequence" else [sum(real)]
    # In tenths, so that the expected share is exact too.
    expected = sum(-(-size * round(expansion * 10) // (10 * case.E)) for size in sizes)
    assert routing.tokens_per_expert.tolist() == [expected] * case.E
    assert not routing.drop_rate


def test_each_expert_takes_exactly_its_c_best_tokens():
    routing = router()(randn(4, 16, 8)).check()  # c = 64 / 4
    scores, taken = routing.scores.flatten(0, 1), routing.capacity_mask.flatten(0, 1)
    assert routing.capacity == 16 and taken.sum(0).tolist() == [16] * 4
    for e in range(4):
        assert scores[taken[:, e], e].min() > scores[~taken[:, e], e].max()


def test_a_case_by_hand():
    # Softmax over the two experts depends on the difference only: 2, 1, 0, -3. Expert 0 wants tokens 0 and 1, expert 1 tokens 3 and 2.
    r, x = with_logits([[2, 0], [6, 5], [1, 1], [0, 3]])
    routing = r(x).check()
    assert routing.capacity_mask[0].tolist() == [
        [True, False],
        [True, False],
        [False, True],
        [False, True],
    ]
    assert routing.expert_weights[0, 0, 0].item() == about(1 / (1 + torch.e**-2))


def test_softmax_ranks_by_probability_and_sigmoid_by_logit():
    rows = [
        [9, 9],
        [1, 0],
        [0, -9],
        [2, 3],
    ]  # expert 0, one token: largest logit is token 0, largest probability token 2
    for score_func, best in (("sigmoid", 0), ("softmax", 2)):
        r, x = with_logits(rows, expansion=0.5, score_func=score_func)
        assert r(x).capacity_mask[0, :, 0].nonzero().flatten().tolist() == [best]


def test_a_token_may_get_every_expert_and_another_none():
    r, x = with_logits([[5, 5], [-5, -5]], score_func="sigmoid")
    assert r(x).capacity_mask[0].tolist() == [[True, True], [False, False]]
    assert r(x).drop_reason[0, 1].tolist() == [DropReason.NOT_SELECTED] * 2


def test_expansion_equal_to_n_experts_takes_every_token():
    assert router(expansion=4)(randn(2, 5, 8)).check().capacity_mask.all()


def test_ties_go_to_the_earlier_token():
    r, x = with_logits([[0, 0]] * 5)
    assert r(x).capacity_mask[0].all(-1).tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]  # c = ceil(5 / 2)


def test_who_is_asked_for_more_tokens_than_there_are_takes_the_real_ones_only():
    real = torch.tensor([[True, False, True]])
    taken = take_best(torch.tensor([[[-9.0, 1], [9, 9], [0, 0]]]), real, torch.tensor([[3, 1]]))
    assert taken[0].tolist() == [[True, True], [False, False], [True, False]]


# It is not causal


def test_a_later_token_changes_the_route_of_an_earlier_one_in_eval_too():
    r, x = with_logits([[1, 0], [0, 1]])  # one token each
    r.eval()
    assert r(x).capacity_mask[0, 0].tolist() == [True, False]
    x[0, 1] = torch.tensor([9.0, 0.0])
    assert r(x).capacity_mask[0, 0].tolist() == [False, True]


@pytest.mark.parametrize(("scope", "leaks"), [("batch", True), ("sequence", False)])
def test_another_sequence_changes_the_route_only_with_the_batch_as_pool(scope, leaks):
    r, x = router(scope=scope), randn(3, 8, 8)
    other = torch.cat([x[:1], 3 * randn(2, 8, 8, seed=1)])
    assert torch.equal(r(x).capacity_mask[0], r(other).capacity_mask[0]) is not leaks


# Padding


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_what_padding_holds_changes_nothing_and_it_is_never_chosen(scope):
    r, real = router(scope=scope, z_loss_weight=1.0), randn(2, 6, 8)
    padding_mask = torch.tensor([[False, False] + [True] * 6] * 2)
    padded = r(torch.cat([100 * randn(2, 2, 8, seed=1), real], dim=1), padding_mask).check()
    alone = r(real)
    assert torch.equal(padded.capacity_mask[:, 2:], alone.capacity_mask)
    assert (padded.drop_reason[:, :2] == DropReason.PADDING).all()
    assert close(padded.aux_loss, alone.aux_loss)


@pytest.mark.parametrize(
    "padding_mask",
    [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3), torch.ones(3, dtype=torch.bool)],
)
def test_a_padding_mask_of_another_shape_or_type_is_refused(padding_mask):
    with pytest.raises(ValueError, match=r"padding_mask must be bool of shape \(2, 3\)"):
        router()(randn(2, 3, 8), padding_mask)


# The rest


def test_gradient_reaches_every_experts_row_and_the_input():
    r, x = router(), randn(2, 8, 8).requires_grad_()
    routing = r(x)
    (routing.expert_weights * routing.capacity_mask * randn(2, 8, 4, seed=1)).sum().backward()
    assert (r.weight.grad.abs().sum(-1) > 1e-4).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_in_the_input_are_refused_by_check(bad):
    x = randn(1, 4, 8)
    x[0, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        router()(x).check()


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_no_tensor_is_read_on_the_way(scope):
    with FakeTensorMode():
        r = ExpertChoiceRouter(8, 4, scope=scope, z_loss_weight=0.01)
        routing = r(torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
        (routing.expert_weights.sum() + routing.aux_loss).backward()
        assert r.weight.grad.shape == r.weight.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion": 0}, "expansion=0 must be above 0 and at most n_experts=4"),
        ({"expansion": 4.5}, "expansion=4.5 must be above 0 and at most n_experts=4"),
        ({"expansion": "2"}, "expansion='2' must be above 0"),
        ({"scope": "group"}, "scope='group' must be one of 'batch', 'sequence'"),
        ({"score_func": "relu"}, "score_func='relu' must be one of 'softmax', 'sigmoid'"),
        ({"jitter_noise": 1.0}, "jitter_noise=1.0 must be at least 0.0 and below 1.0"),
    ],
)
def test_an_argument_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        router(**changes)
