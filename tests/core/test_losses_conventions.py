"""What the same balance loss is called elsewhere, each written down from its library's definition."""

import pytest
import torch
import torch.nn.functional as F

from moe_core import TopKRouter, losses

from .helpers import about, close, randn, routing_of, seeded


def _one_hot(routing):
    return (
        F.one_hot(routing.expert_indices, routing.n_experts).to(routing.scores.dtype).flatten(0, 1)
    )  # (T, K, E)


def huggingface(routing):
    """Mixtral's: mean over tokens of the one-hot of each slot (K, E), times the mean probability, summed over both, times E."""
    return (
        _one_hot(routing).mean(0) * routing.scores.flatten(0, 1).mean(0)
    ).sum() * routing.n_experts


def megatron(routing):
    """sum(P summed over tokens * tokens per expert) * E / (T^2 K)."""
    scores, T = routing.scores.flatten(0, 1), routing.scores[..., 0].numel()
    return (
        (scores.sum(0) * _one_hot(routing).sum((0, 1))).sum()
        * routing.n_experts
        / (T * T * routing.top_k)
    )


def fairscale(routing):
    """The mean over experts of (mean gate) * (share of first choices)."""
    return (routing.scores.flatten(0, 1).mean(0) * _one_hot(routing)[:, 0].mean(0)).mean()


def gshard(routing):
    """(1/E) sum_e (c_e / S) m_e."""
    S = routing.scores[..., 0].numel()
    count_E = _one_hot(routing)[:, 0].sum(0)
    return (count_E / S * routing.scores.flatten(0, 1).sum(0) / S).sum() / routing.n_experts


WRITTEN = {  # convention -> as its library writes it, and ours that counts the same
    "huggingface": (huggingface, losses.load_balance),
    "megatron": (megatron, losses.load_balance),
    "fairscale": (fairscale, losses.first_choice_balance),
    "gshard": (gshard, losses.first_choice_balance),
}


def uniform(n_experts, top_k):
    return routing_of(
        (torch.arange(n_experts).view(1, -1, 1) + torch.arange(top_k)) % n_experts, n_experts
    )


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (8, 2), (64, 8)])
def test_the_value_at_perfect_balance_is_the_constant_of_each_convention(n_experts, top_k):
    E, K = n_experts, top_k
    constants = {
        "moe_core": 1,
        "switch": 1,
        "megatron": 1,
        "olmo": 1,
        "deepspeed": 1,
        "tutel": 1,
        "huggingface": K,
        "fairscale": 1 / E**2,
        "gshard": 1 / E**2,
    }
    assert {name: losses.balanced_value(name, E, K) for name in losses.CONVENTIONS} == constants
    for name, (written, _) in WRITTEN.items():
        assert written(uniform(E, K)).item() == about(constants[name]), name


@pytest.mark.parametrize("convention", WRITTEN)
@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (8, 2), (8, 8)])
def test_converting_ours_gives_theirs_for_any_routing(convention, n_experts, top_k):
    routing = seeded(TopKRouter, 8, n_experts, top_k)(3 * randn(2, 9, 8))
    written, ours = WRITTEN[convention]
    converted = losses.convert_loss(
        ours(routing), "moe_core", convention, n_experts=n_experts, top_k=top_k
    )
    assert close(converted, written(routing))


@pytest.mark.parametrize("source", losses.CONVENTIONS)
@pytest.mark.parametrize("target", losses.CONVENTIONS)
def test_a_converted_coefficient_pulls_as_hard(source, target):
    sizes = {"n_experts": 8, "top_k": 2}
    coefficient = losses.convert_coefficient(0.01, source, target, **sizes)
    pull = 0.01 * losses.balanced_value(source, 8, 2)
    assert coefficient * losses.balanced_value(target, 8, 2) == pytest.approx(pull)
    assert losses.convert_coefficient(coefficient, target, source, **sizes) == pytest.approx(0.01)


def test_mixtrals_coefficient_is_twice_as_strong_as_it_looks():
    assert losses.convert_coefficient(
        0.02, "huggingface", "moe_core", n_experts=8, top_k=2
    ) == pytest.approx(0.04)
    assert losses.convert_coefficient(
        0.01, "moe_core", "gshard", n_experts=8, top_k=2
    ) == pytest.approx(0.64)


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="convention='mixtral' must be one of 'moe_core'"):
        losses.balanced_value("mixtral", 8, 2)
    with pytest.raises(ValueError, match="top_k=9 must be between 1 and n_experts=8"):
        losses.convert_loss(1.0, "megatron", "huggingface", n_experts=8, top_k=9)
