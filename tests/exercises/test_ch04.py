"""Chapter 4: right answers that differ from the checker's own."""

import math

import torch

from moe_book.checks import check, exercises
from moe_core import LanguageModel, LMConfig, MoEConfig


def _model(D, F, E, K, L, V):
    with torch.device("meta"):
        return LanguageModel(
            LMConfig(
                vocab_size=V,
                d_model=D,
                n_layers=L,
                n_heads=4,
                moe=MoEConfig(d_model=D, d_ff=F, n_experts=E, top_k=K),
            )
        )


def active_from_the_model(D, F, E, K, L, V):
    model = _model(D, F, E, K, L, V)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(n * K / E if ".experts." in name else n for name, n in sizes.items())


def active_as_total_minus_idle(D, F, E, K, L, V):
    total = L * (4 * D * D + 3 * D * F * E + D * E + 2 * D) + D + V * D
    return torch.tensor(total - L * (E - K) * 3 * D * F)


def twin_from_the_config(F, K, n_shared):
    moe = MoEConfig(d_model=64, d_ff=F, n_experts=max(8, K), top_k=K, n_shared_experts=n_shared)
    return LMConfig(d_model=64, moe=moe).dense_twin().d_ff


def twin_by_adding(F, K, n_shared):
    return sum([F] * K) + sum([F] * n_shared)


def flops_by_parts(D, N, F, E, K, L, V):
    projections, scores, experts, router, combine = (
        8 * D**2,
        4 * N * D,
        6 * D * F * K,
        2 * D * E,
        2 * K * D,
    )
    return L * (projections + scores + experts + router + combine) + 2 * V * D


def flops_from_the_active_parameters(D, N, F, E, K, L, V):
    norms = (2 * L + 1) * D
    return 2 * (active_as_total_minus_idle(D, F, E, K, L, V) - norms) + L * (4 * N * D + 2 * K * D)


def first_loss_as_a_mean(V, own_logit, repeats):
    total = V - 1 + math.exp(own_logit)
    return -(repeats * math.log(math.exp(own_logit) / total) + (1 - repeats) * math.log(1 / total))


def first_loss_with_logsumexp(V, own_logit, repeats):
    logits = torch.zeros(V, dtype=torch.float64)
    logits[0] = own_logit
    return torch.logsumexp(logits, 0) - repeats * own_logit


def smallest_by_search(F, K, share):
    E = 1
    while 2 * 64 * E <= share * K * 6 * 64 * F:
        E += 1
    return E


def smallest_in_integers(F, K, share):
    return 1 + int(3 * F * K * share // 1)


RIGHT = {
    "4.1": [active_from_the_model, active_as_total_minus_idle],
    "4.2": [twin_from_the_config, twin_by_adding],
    "4.3": [flops_by_parts, flops_from_the_active_parameters],
    "4.4": [first_loss_as_a_mean, first_loss_with_logsumexp],
    "4.5": [smallest_by_search, smallest_in_integers],
}


def test_every_wrong_idea_gets_its_own_name():
    for number, exercise in exercises(4).items():
        for idea in exercise.ideas:
            assert check(number, idea.answer).idea == idea.name


def test_a_flop_count_nobody_foresaw_gets_a_helpful_message():
    verdict = check("4.3", lambda D, N, F, E, K, L, V: D * N)
    assert not verdict.right and verdict.idea is None and "expected" in verdict.message
