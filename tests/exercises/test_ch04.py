"""Chapter 4: right answers that differ from the checker's own, and wrong ones that a class would hand in."""

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


def longer_by_search(D, F, K):
    N = 1
    while 8 * D * D + 4 * N * D <= 6 * D * F * K:
        N += 1
    return N


def longer_in_integers(D, F, K):
    return max(1, (3 * F * K - 4 * D) // 2 + 1)


T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def seeds_by_simulation(effect, spread, draws=4000):
    for S in range(2, 100):
        d = effect + spread * torch.randn(
            draws, S, generator=torch.Generator().manual_seed(S), dtype=torch.float64
        )
        half = T95.get(S, 1.96 + 2.7 / (S - 1)) * d.std(1) / math.sqrt(S)
        if (d.mean(1) > half).double().mean() >= 0.8:
            return S


def seeds_by_rule_of_thumb(effect, spread):
    """The normal approximation, and two more for the t."""
    return torch.tensor(math.ceil(7.85 * (spread / effect) ** 2 + 2.1))


def changes_each_token(layer):
    torch.manual_seed(0)
    for _ in range(5):
        x = torch.randn(2, 6, 3)
        for b in range(2):
            for n in range(6):
                other = x.clone()
                other[b, n] += 20 * torch.randn(3)
                moved = (layer(other) - layer(x)).abs().amax(-1) > 1e-6
                moved[b, n:] = False
                if moved.any():
                    return False
    return True


def by_gradient_and_by_cutting(layer):
    """Cut off what comes later, or the other sequences: nothing may change."""
    torch.manual_seed(1)
    for _ in range(20):
        x = 3 * torch.randn(3, 8, 2)
        y = layer(x)
        for b in range(3):
            for n in range(1, 9):
                assert torch.allclose(layer(x[b : b + 1, :n])[0], y[b, :n], atol=1e-6)


RIGHT = {
    "4.1": [active_from_the_model, active_as_total_minus_idle],
    "4.2": [flops_by_parts, flops_from_the_active_parameters],
    "4.3": [longer_by_search, longer_in_integers],
    "4.4": [seeds_by_simulation, seeds_by_rule_of_thumb],
    "4.5": ["DA", ["a", "d"], {"A", "D"}],
    "4.6": [changes_each_token, by_gradient_and_by_cutting],
    "4.7": ["T F T F F T", [True, False, True, False, False, True]],
}


# What else a class would hand in: answer, and the idea it should be called by (None: refused, and shown with its inputs)


def active_by_hand(
    attention=4, experts=3, router=True, norms=2, last_norm=True, embedding=1, layers=True
):
    def active(D, F, E, K, L, V):
        layer = attention * D * D + experts * D * F * K + D * E * router + norms * D
        return (L if layers else 1) * layer + D * last_norm + V * D * embedding

    return active


def only_the_last_output(layer):
    """Changes the last token and looks at its neighbour only."""
    x = torch.randn(1, 6, 3)
    other = x.clone()
    other[:, -1] += 50
    return torch.allclose(layer(x)[:, -2], layer(other)[:, -2])


def one_sequence(layer):
    torch.manual_seed(0)
    for sign in (-50, 50) * 10:
        x = torch.randn(1, 8, 3)
        other = x.clone()
        other[:, -1] += sign
        if not torch.allclose(layer(x)[:, :-1], layer(other)[:, :-1]):
            return False
    return True


def two_sequences_flipped_alike(layer):
    """Changes the order of the sequences: a mean over the batch does not feel it."""
    if not one_sequence(layer):
        return False
    torch.manual_seed(0)
    x = 5 * torch.randn(2, 8, 3)
    return torch.allclose(layer(x).flip(0), layer(x.flip(0)), atol=1e-6)


def a_change_too_small(layer):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3)
    for b, n in ((0, 7), (1, 7), (0, 3)):
        other = x.clone()
        other[b, n] += 1e-3
        moved = (layer(other) - layer(x)).abs().amax(-1) > 1e-6
        moved[b, n:] = False
        if moved.any():
            return False
    return True


def forbids_the_past(layer):
    """Demands that a token feels itself only."""
    x = torch.randn(1, 6, 3)
    other = x.clone()
    other[:, 0] += 50
    return torch.allclose(layer(x)[:, 1:], layer(other)[:, 1:])


def shape_only(layer):
    x = torch.randn(2, 4, 3)
    return layer(x).shape == x.shape


WRONG = {
    "4.1": [
        (active_by_hand(attention=3), None),
        (active_by_hand(attention=1), None),
        (active_by_hand(norms=1), None),
        (active_by_hand(last_norm=False), None),
        (active_by_hand(layers=False), None),
        (active_by_hand(experts=2), "two matrices"),
        (lambda D, F, E, K, L, V: active_by_hand()(D, F, E, K, L, V) * K / E, None),
        (lambda D, F, E, K, L, V: L * (E - K) * 3 * D * F, None),
        (lambda D, F, E, K, L, V: 3 * D * F * K, None),
    ],
    "4.2": [
        (lambda D, N, F, E, K, L, V: 3 * flops_by_parts(D, N, F, E, K, L, V), None),
        (lambda D, N, F, E, K, L, V: N * flops_by_parts(D, N, F, E, K, L, V), None),
        (lambda D, N, F, E, K, L, V: flops_by_parts(D, N, F, E, K, L, V) + 2 * D * V, None),
        (lambda D, N, F, E, K, L, V: flops_by_parts(D, N, F, E, K, L, V) - 2 * L * N * D, None),
        (lambda D, N, F, E, K, L, V: flops_by_parts(D, N * N, F, E, K, L, V), None),
        (lambda D, N, F, E, K, L, V: flops_by_parts(D, N, F, E, K, 1, V), None),
        (lambda D, N, F, E, K, L, V: 2 * active_as_total_minus_idle(D, F, E, K, L, V), None),
        (lambda D, N, F, E, K, L, V: flops_by_parts(D, N, F, K, K, L, V), None),
    ],
    "4.3": [
        (lambda D, F, K: (3 * F * K - 4 * D) / 2 + 1, None),
        (lambda D, F, K: 2 * D, None),
        (lambda D, F, K: max(1, math.floor((3 * F * K - 4 * D) / 2) + 2), None),
        (lambda D, F, K: max(1, 3 * F * K // 4 - 2 * D + 1), None),
        (lambda D, F, K: max(1, (9 * F * K - 4 * D) // 2 + 1), None),
        (lambda D, F, K: max(0, (3 * F * K - 4 * D) // 2 + 1), None),
    ],
    "4.4": [
        (lambda effect, spread: 2, None),
        (lambda effect, spread: 10, None),
        (lambda effect, spread: 30, None),
        (lambda effect, spread: 1000, None),
        (lambda effect, spread: 1, None),
        (lambda effect, spread: effect / spread, None),
        (lambda effect, spread: math.ceil(spread / effect) + 1, None),
        (lambda effect, spread: max(2, math.ceil(4 * spread / effect)), None),
        (lambda effect, spread: max(2, math.ceil(16 * (spread / effect) ** 2)), None),
        (lambda effect, spread: "three", None),
    ],
    "4.5": [("AB", None), ("CD", None), ("DE", None), ("A", "one missing"), ("D", None)]
    + [("ABCDE", None), ("BCE", None), ("", None), ("Q", None)],
    "4.6": [
        (only_the_last_output, "one position looks far ahead"),
        (one_sequence, "one queue for the batch"),
        (two_sequences_flipped_alike, "mean of the batch"),
        (a_change_too_small, "the expert chooses"),
        (forbids_the_past, None),
        (shape_only, "looks at the next token"),
        (lambda layer: True, "looks at the next token"),
        (lambda layer: False, None),
    ],
    "4.7": [
        ("FFTFFT", "(a)"),
        ("TTTTTT", None),
        ("TFTFF", None),
        ("FTFTTF", None),
        ("maybe", None),
    ],
}


def test_every_wrong_idea_gets_its_own_name():
    for number, exercise in exercises(4).items():
        for idea in exercise.ideas:
            assert check(number, idea.answer).idea == idea.name


def test_a_flop_count_nobody_foresaw_gets_a_helpful_message():
    verdict = check("4.2", lambda D, N, F, E, K, L, V: D * N)
    assert not verdict.right and verdict.idea is None and "expected" in verdict.message


def test_too_few_seeds_and_too_many_are_told_with_their_share():
    assert "too few" in check("4.4", lambda effect, spread: 2).message
    assert "fewer seeds would have done" in check("4.4", lambda effect, spread: 40).message
