"""The other forms of the balance loss: first choices, per sequence as DeepSeek-V3 has it, relative scores, per layer, per device."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core import DropReason, TopKRouter, losses

from .helpers import about, cases, close, fast, randn, routing_of, seeded

PAD = DropReason.PADDING


def uniform(n_experts, top_k, B=2):
    """Each expert gets K slots of each of B sequences, neighbours together; even scores."""
    return routing_of(
        ((torch.arange(n_experts).view(1, -1, 1) + torch.arange(top_k)) % n_experts).expand(
            B, -1, -1
        ),
        n_experts,
    )


def collapsed(n_experts, top_k=1):
    """All five tokens choose experts 0..K-1, and expert 0 has all the score."""
    scores = torch.zeros(1, 5, n_experts)
    scores[..., 0] = 1
    return routing_of(torch.arange(top_k).expand(1, 5, top_k), n_experts, scores=scores)


def route(E=4, K=2, B=3, N=7, padded=False, **options):
    padding_mask = torch.arange(N) < torch.arange(1, B + 1).view(B, 1) if padded else None
    return seeded(TopKRouter, 8, E, K, **options)(2 * randn(B, N, 8), padding_mask)


# Every form


FORMS = {
    "load_balance": losses.load_balance,
    "first_choice": losses.first_choice_balance,
    "sequence": losses.sequence_balance,
    "global": lambda r: losses.global_balance([r]),
    "global share": lambda r: losses.load_balance(r, share=losses.global_share([r])),
    "device": lambda r: losses.device_balance(r, r.n_experts),
    "device per sequence": lambda r: losses.device_balance(r, r.n_experts, scope="sequence"),
    "communication": lambda r: losses.communication_balance(r, r.n_experts, r.top_k),
    "communication per sequence": lambda r: losses.communication_balance(
        r, r.n_experts, r.top_k, scope="sequence"
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (8, 3), (8, 8)])
def test_each_form_is_1_when_uniform(form, n_experts, top_k):
    assert FORMS[form](uniform(n_experts, top_k)).item() == about(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_experts", [1, 2, 8])
def test_each_form_is_e_when_one_expert_gets_everything(form, n_experts):
    assert FORMS[form](collapsed(n_experts)).item() == about(n_experts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_each_form_is_0_without_a_real_token(form, shape):
    routing = routing_of(
        torch.zeros(*shape, 1),
        4,
        reasons=torch.full((*shape, 1), PAD),
        padding_mask=torch.zeros(shape, dtype=torch.bool),
    )
    assert FORMS[form](routing) == 0 and FORMS[form](routing).shape == ()


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_every_expert_of_the_router_a_gradient(form):
    router = seeded(TopKRouter, 8, 6, 1)
    x = randn(1, 5, 8)
    routing = router(x)
    assert (
        routing.slots_per_expert() == 0
    ).any()  # also those that no token chose: the loss sees all scores, not the top K
    FORMS[form](routing).backward()
    assert (router.weight.grad.abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
def test_no_form_sees_padding(form):
    x, padding_mask = randn(2, 6, 8), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    router = seeded(TopKRouter, 8, 4, 2)
    moved = torch.where(padding_mask.unsqueeze(-1), x, 50 * randn(2, 6, 8, seed=3))
    assert torch.equal(
        FORMS[form](router(x, padding_mask)), FORMS[form](router(moved, padding_mask))
    )
    assert not torch.allclose(
        FORMS[form](router(x)), FORMS[form](router(moved))
    )  # unmasked they would count


@fast
@given(cases())
def test_each_form_is_finite_and_differentiable_whatever_the_routing(case):
    router = case.router(aux_loss_weight=0.0, z_loss_weight=0.0, jitter_noise=0.0)
    routing = router(case.x(), case.padding_mask())
    for form in FORMS.values():
        router.zero_grad()
        loss = form(routing)
        loss.backward(retain_graph=True)
        assert loss.isfinite() and router.weight.grad.isfinite().all()
        assert loss <= case.E + 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_no_form_waits_for_the_device(form):
    with FakeTensorMode():  # any read of a value raises here
        router = TopKRouter(8, 4, 2)
        FORMS[form](router(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))).backward()
        assert router.weight.grad.shape == router.weight.shape


# One by one


def test_two_layers_that_collapse_in_opposite_ways_are_each_seen():
    def layer(expert):
        scores = torch.zeros(1, 4, 2)
        scores[..., expert] = 1
        return routing_of(torch.full((1, 4, 1), expert), 2, scores=scores)

    layers = [layer(0), layer(1)]
    pooled = routing_of(
        torch.cat([r.expert_indices for r in layers], 1),
        2,
        scores=torch.cat([r.scores for r in layers], 1),
    )
    assert losses.load_balance(pooled) == 1  # what pooling would report
    assert [losses.load_balance(r).item() for r in layers] == [2, 2]


def test_scores_are_averaged_as_they_are_not_softmaxed_again():
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])
    # f = (1, 0), P = (0.85, 0.15); a second softmax would pull P to (0.67, 0.33)
    assert losses.load_balance(routing_of([[[0], [0]]], 2, scores=scores)).item() == about(1.7)


def test_first_choices_alone_count_where_the_others_do_not():
    routing = routing_of([[[0, 1], [0, 2], [0, 3]]], 4, scores=[[[0.4, 0.2, 0.2, 0.2]] * 3])
    assert losses.first_choice_balance(routing).item() == about(4 * 0.4)
    assert losses.load_balance(routing).item() == about(4 * (0.5 * 0.4 + 0.5 * 0.2))


@pytest.mark.parametrize("padded", [False, True])
def test_for_an_unbiased_softmax_router_the_sequence_loss_is_the_balance_per_sequence(padded):
    routing = route(padded=padded)
    assert close(losses.sequence_balance(routing), losses.load_balance(routing, scope="sequence"))


def test_the_sequence_loss_counts_what_the_scores_would_choose_not_what_a_bias_chose():
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])
    biased = routing_of([[[0], [1]]], 2, scores=scores)  # a bias sent the second token away
    assert losses.sequence_balance(biased).item() == about(2 * 0.85)
    assert losses.load_balance(biased).item() == about(1)


def test_the_sequence_loss_of_sigmoid_scores_by_hand():
    scores = torch.tensor([[[0.6, 0.2], [0.1, 0.3]]])  # relative: (0.75, 0.25), (0.25, 0.75)
    routing = routing_of([[[0], [1]]], 2, scores=scores)
    assert losses.sequence_balance(routing).item() == about(1)
    scores = torch.tensor([[[0.6, 0.2], [0.4, 0.1]]])  # relative: (0.75, 0.25), (0.8, 0.2)
    assert losses.sequence_balance(routing_of([[[0], [0]]], 2, scores=scores)).item() == about(
        2 * 0.775
    )


def test_the_sequence_loss_takes_its_own_k_for_routers_without_one():
    scores = randn(2, 6, 4).sigmoid()
    every = routing_of(torch.arange(4).expand(2, 6, 4), 4, scores=scores)
    two = routing_of(scores.topk(2).indices, 4, scores=scores)
    assert torch.equal(losses.sequence_balance(every, top_k=2), losses.sequence_balance(two))


def test_relative_scores_make_balance_1_where_scores_do_not_sum_to_1():
    routing = uniform(4, 2)
    routing = replace(routing, scores=torch.full_like(routing.scores, 0.9))
    assert losses.load_balance(routing).item() == about(3.6)
    assert losses.load_balance(routing, relative_scores=True).item() == about(1)
    nothing = replace(routing, scores=torch.zeros_like(routing.scores))
    assert losses.load_balance(nothing, relative_scores=True) == 0


@pytest.mark.parametrize("score_func", ["sigmoid", "sqrt_softplus", "softmax"])
def test_a_routers_balance_loss_is_on_one_scale_for_all_score_functions(score_func):
    router = seeded(TopKRouter, 8, 4, 4, score_func=score_func, aux_loss_weight=1.0)
    torch.nn.init.zeros_(router.weight)
    assert router(randn(1, 5, 8)).losses["load_balance"].item() == about(1)


# Devices (E_d = E / D neighbours each)


def test_device_balance_by_hand():
    scores = torch.tensor([[[0.4, 0.2, 0.3, 0.1], [0.6, 0.2, 0.1, 0.1]]])
    routing = routing_of([[[0, 2], [0, 1]]], 4, scores=scores)
    # slots: 2 1 1 0 of 4; device shares 3/4 and 1/4; P' = (0.7, 0.3)
    assert losses.device_balance(routing, 2).item() == about(2 * (0.75 * 0.7 + 0.25 * 0.3))


def test_device_balance_does_not_care_which_expert_of_a_device_works():
    one_of_each = routing_of([[[0], [2], [0], [2]]], 4)
    assert losses.device_balance(one_of_each, 2) == 1
    scores = torch.tensor([1.0, 0, 0, 0]).expand(1, 4, 4)
    assert losses.device_balance(routing_of(torch.zeros(1, 4, 1), 4, scores=scores), 2) == 2
    assert losses.device_balance(routing_of(torch.zeros(1, 4, 1), 4, scores=scores), 1) == 1


def test_with_one_expert_a_device_it_is_the_balance_loss():
    routing = route(padded=True)
    for scope in ("batch", "sequence"):
        assert close(
            losses.device_balance(routing, 4, scope=scope),
            losses.load_balance(routing, scope=scope),
        )


def test_communication_balance_by_hand():
    scores = torch.tensor([[[0.4, 0.2, 0.3, 0.1], [0.6, 0.2, 0.1, 0.1]]])
    routing = routing_of([[[0, 2], [0, 1]]], 4, scores=scores)
    # visits: both tokens to device 0, one to device 1; f'' = 2/(2*2) * (2, 1) at M = 2; P' = (0.7, 0.3)
    assert losses.communication_balance(routing, 2, 2).item() == about(1 * 0.7 + 0.5 * 0.3)
    assert losses.communication_balance(routing, 2, 1).item() == about(2 * (1 * 0.7 + 0.5 * 0.3))


def test_a_token_with_two_experts_on_a_device_is_sent_there_once():
    together, apart = routing_of([[[0, 1]]], 4), routing_of([[[0, 2]]], 4)
    assert losses.communication_balance(together, 2, 2).item() == about(
        0.5
    )  # one of the two visits allowed
    assert losses.communication_balance(apart, 2, 2).item() == about(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda r: losses.sequence_balance(r, top_k=5),
            "top_k=5 must be between 1 and n_experts=4",
        ),
        (lambda r: losses.device_balance(r, 3), "n_devices=3 must divide n_experts=4"),
        (lambda r: losses.device_balance(r, 0), "n_devices=0 must be a whole number, at least 1"),
        (lambda r: losses.device_balance(r, 2, scope="token"), "scope='token' must be one of"),
        (
            lambda r: losses.communication_balance(r, 2, 3),
            "max_devices=3 must be between 1 and n_devices=2",
        ),
        (
            lambda r: losses.communication_balance(r, 2, 1, scope="token"),
            "scope='token' must be one of",
        ),
        (
            lambda r: losses.load_balance(r, share=torch.ones(3)),
            r"share has shape \(3,\), must be \(E,\) = \(4,\)",
        ),
        (
            lambda r: losses.load_balance(r, share=torch.ones(4), scope="sequence"),
            "with scope='batch'",
        ),
        (lambda r: losses.global_share([]), "routings must hold at least one Routing"),
        (lambda r: losses.global_balance([]), "routings must hold at least one Routing"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(uniform(4, 2))
