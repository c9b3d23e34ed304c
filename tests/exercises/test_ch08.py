"""Chapter 8: right answers that differ from the checker's own, and what a class hands in."""

import math
from bisect import bisect_right
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_book.checks import ch08


def route_with_take_along(scores_TE, bias_E, K, gamma):
    index_TK = torch.argsort(scores_TE + bias_E, dim=-1, descending=True)[:, :K]
    w_TK = torch.take_along_dim(scores_TE, index_TK, -1)
    return index_TK, gamma * w_TK / w_TK.sum(-1, keepdim=True)


def route_token_by_token(scores_TE, bias_E, K, gamma):
    indices, weights = [], []
    for s_E in scores_TE:
        chosen = sorted(range(len(s_E)), key=lambda e: -float(s_E[e] + bias_E[e]))[:K]
        indices.append(chosen)
        weights.append([gamma * float(s_E[e]) / sum(float(s_E[j]) for j in chosen) for e in chosen])
    return indices, weights


def groups_with_repeat(choice_TE, G, M, K):
    score_TG = (
        choice_TE.view(len(choice_TE), G, -1).sort(-1, descending=True).values[..., :2].sum(-1)
    )
    keep_TG = torch.zeros_like(score_TG).scatter(-1, score_TG.topk(M).indices, 1.0).bool()
    keep_TE = keep_TG.repeat_interleave(choice_TE.shape[-1] // G, dim=-1)
    return torch.where(keep_TE, choice_TE, torch.tensor(-math.inf)).topk(K).indices


def groups_in_plain_python(choice_TE, G, M, K):
    out = []
    for row in choice_TE.tolist():
        size = len(row) // G
        groups = sorted(range(G), key=lambda g: -sum(sorted(row[g * size : (g + 1) * size])[-2:]))[
            :M
        ]
        inside = [e for e in range(len(row)) if e // size in groups]
        out.append(sorted(inside, key=lambda e: -row[e])[:K])
    return out


def direction_by_one_hot(indices, real, E):
    counts_E = sum(
        (torch.nn.functional.one_hot(i, E) * r.view(-1, 1, 1)).sum((0, 1))
        for i, r in zip(indices, real)
    )
    return (counts_E.sum() - E * counts_E).sign()


def direction_in_plain_python(indices, real, E):
    counts = [0] * E
    for index_TK, real_T in zip(indices, real):
        for slots, yes in zip(index_TK.tolist(), real_T.tolist()):
            for e in slots if yes else []:
                counts[e] += 1
    return [(E * c < sum(counts)) - (E * c > sum(counts)) for c in counts]


# 8.1: five updates, as the chapter has them


def updates():
    seen_E = torch.zeros(8)

    def a(bias_E, counts_E, tokens, u):
        return bias_E + u * (counts_E.sum() - len(counts_E) * counts_E).sign()

    def b(bias_E, counts_E, tokens, u):
        return bias_E + u * (tokens / len(counts_E) - counts_E).sign()

    def c(bias_E, counts_E, tokens, u):
        return bias_E + u * (counts_E.mean() - counts_E) / counts_E.mean()

    def d(bias_E, counts_E, tokens, u):
        seen_E.add_(counts_E)
        return bias_E + u * (seen_E.mean() - seen_E).sign()

    def e(bias_E, counts_E, tokens, u):
        bias_E = bias_E + u * (counts_E.mean() - counts_E).sign()
        return bias_E - bias_E.max()

    return {"A": a, "B": b, "C": c, "D": d, "E": e}


@pytest.mark.parametrize("letter", "ABCDE")
def test_the_two_broken_updates_are_those_that_do_not_settle(letter):
    draw, update = torch.Generator().manual_seed(0), updates()[letter]
    bias_E, late = torch.zeros(8), []
    for step in range(600):
        score_TE = (torch.linspace(1, -1, 8) + torch.randn(1024, 8, generator=draw)).sigmoid()
        counts_E = (score_TE + bias_E).topk(2).indices.flatten().bincount(minlength=8).float()
        late += [counts_E.max() / counts_E.mean() - 1] if step >= 400 else []
        bias_E = update(bias_E, counts_E, 1024, 0.01)
    assert (torch.stack(late).mean() > 0.5) == (letter in "BD")


# 8.2: more styles


def route_in_numpy(scores_TE, bias_E, K, gamma):
    s, b = scores_TE.numpy(), bias_E.numpy()
    index = np.argsort(-(s + b), axis=-1)[:, :K]
    w = np.take_along_axis(s, index, -1)
    return index, gamma * w / w.sum(-1, keepdims=True)


def route_with_a_mask(scores_TE, bias_E, K, gamma):
    index_TK = torch.topk(scores_TE + bias_E, K).indices
    kept_TE = scores_TE * torch.zeros_like(scores_TE).scatter(1, index_TK, 1)
    kept_TE = gamma * kept_TE / kept_TE.sum(1, keepdim=True)
    return index_TK, kept_TE.gather(1, index_TK)


def route_by_pair(scores_TE, bias_E, K, gamma):
    index_TK = (scores_TE + bias_E).sort(dim=-1, descending=True)[1][..., :K]
    rows = torch.arange(len(scores_TE))[:, None]
    w_TK = F.normalize(scores_TE[rows, index_TK], p=1, dim=-1) * gamma
    return [index_TK, w_TK]


def route_taking_the_bias_off(scores_TE, bias_E, K, gamma):
    value_TK, index_TK = (scores_TE + bias_E).topk(K)
    w_TK = value_TK - bias_E[index_TK]  # exact enough for scores of this size
    return index_TK, w_TK * gamma / w_TK.sum(-1, keepdim=True)


def route_in_double(scores_TE, bias_E, K, gamma):
    return ch08._routed()(scores_TE.double(), bias_E.double(), K, gamma)


def route_with_one_hot(scores_TE, bias_E, K, gamma):
    index_TK = (scores_TE + bias_E).topk(K).indices
    picked_TKE = F.one_hot(index_TK, scores_TE.shape[-1]).float()
    w_TK = torch.einsum("tke,te->tk", picked_TKE, scores_TE)
    return index_TK.int(), torch.stack([gamma * w / w.sum() for w in w_TK])


def as_route(leave, weigh, index=None):
    def route(scores_TE, bias_E, K, gamma):
        index_TK = (scores_TE + bias_E).topk(K).indices
        return leave(index_TK, weigh(scores_TE, bias_E, index_TK, gamma))

    return route


def right_weights(s, b, i, gamma):
    return gamma * s.gather(1, i) / s.gather(1, i).sum(1, keepdim=True)


# 8.3: the best place of a border


def by_counter(d_T):
    count = Counter(d_T.tolist())
    left, T, best = 0, len(d_T), 1.0
    for d in sorted(count):
        left += count[d]
        best = min(best, max(left, T - left) * 2 / T - 1)
    return best


def by_bisect(d_T):
    d = sorted(d_T.tolist())
    cuts = [bisect_right(d, x) for x in d]
    return float(min(Fraction(2 * max(c, len(d) - c), len(d)) - 1 for c in cuts))


def by_pairs(d_T):
    right = (d_T[None] > d_T[:, None]).sum(1).double()
    return (torch.maximum(right, len(d_T) - right) / (len(d_T) / 2) - 1).min()


def by_unique(d_T):
    left = d_T.unique(return_counts=True)[1].cumsum(0).numpy()
    return np.min(np.maximum(left, left[-1] - left)) / (left[-1] / 2) - 1


def between_neighbours(d_T):
    d = d_T.double().sort().values
    places = [float(d[0]) - 1] + [float(a + b) / 2 for a, b in zip(d, d[1:])]
    return min(max((d > x).sum(), (d <= x).sum()).item() / (len(d) / 2) - 1 for x in places)


def by_gap_from_half(d_T):
    off = min(abs(2 * int((d_T >= x).sum()) - len(d_T)) for x in d_T)
    return off / len(d_T)


def by_a_fine_grid(d_T):
    grid = torch.linspace(-2, 2, 4001) + 1e-5
    right_G = (d_T[None] > grid[:, None]).float().mean(1)
    return 2 * torch.maximum(right_G, 1 - right_G).min() - 1


def by_walking(d_T):
    best = 1.0
    for start in d_T.tolist():
        right = [d for d in d_T.tolist() if d > start]
        load = max(len(right), len(d_T) - len(right))
        best = min(best, load / (len(d_T) / 2) - 1)
    return torch.tensor([best])[0]


# 8.4: tests of grouped_topk


def sets(index_TK):
    return [set(row) for row in index_TK.tolist()]


HAND = (
    ([0.9, 0.1, 0.6, 0.55, 0.5, 0.45, 0.7, 0.2], 4, 2, 3, {0, 2, 3}),  # the best sums, no star
    ([0.9, 0.8, 0.0, 0.1, 0.5, 0.49, 0.51, 0.48], 2, 1, 2, {0, 1}),  # the best two, not all
    ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1, 0.1, 0.1], 3, 2, 3, {0, 1, 2}),  # all in one
)


def test_with_cases_by_hand(f):
    for row, G, M, K, want in HAND:
        for shift in (0, -3):
            assert sets(f(torch.tensor([row]) + shift, G, M, K)) == [want]


test_with_cases_by_hand.__test__ = False  # an answer, not a test of ours


def against_plain_python(f):
    for seed in range(30):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)) - 1
        for G, M, K in ((3, 2, 3), (3, 1, 2), (4, 2, 4), (6, 3, 5)):
            if sets(f(x, G, M, K)) != [set(r) for r in groups_in_plain_python(x, G, M, K)]:
                return False
    return True


def against_repeat(f):
    x = torch.randn(400, 12)
    for y in (x, x - 5):
        a, b = f(y, 3, 2, 3), groups_with_repeat(y, 3, 2, 3)
        torch.testing.assert_close(a.sort().values, b.sort().values)


def by_one_hot(f):
    x = torch.rand(300, 16) - 2
    want = torch.tensor(groups_in_plain_python(x, 4, 2, 5))
    got, want = (F.one_hot(i, 16).sum(1) for i in (f(x, 4, 2, 5), want))
    return bool((got == want).all())


def every_choice(f):
    """Of all sets of K experts in at most M groups, those inside the best."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3)) - 2
    for row, got in zip(x.tolist(), sets(f(x, 2, 1, 3))):
        sums = [sum(sorted(row[:4])[-2:]), sum(sorted(row[4:])[-2:])]
        inside = range(4) if sums[0] > sums[1] else range(4, 8)
        assert got == set(max(combinations(inside, 3), key=lambda c: sum(row[e] for e in c)))
    row = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1, 0.1, 0.1]])
    assert sets(f(row, 3, 2, 3)) == [{0, 1, 2}]


def numpy_allclose(f):
    x = np.random.default_rng(0).normal(-2, 1, (200, 12)).astype(np.float32)
    got = np.sort(f(torch.from_numpy(x), 3, 2, 4).numpy(), -1)
    want = np.sort(np.array(groups_in_plain_python(torch.from_numpy(x), 3, 2, 4)), -1)
    return np.array_equal(got, want)


def lists_of_failures(f):
    bad = []
    for row, G, M, K, want in HAND:
        for shift in (0.0, -2.0):
            got = f(torch.tensor([row]).add(shift), G, M, K)[0]
            bad += [] if set(map(int, got)) == want else [(row, shift)]
    return not bad


def raising(f):
    for row, G, M, K, want in HAND:
        for shift in (1.0, -4.0):
            if sorted(f(torch.tensor([row]) + shift, G, M, K).flatten().tolist()) != sorted(want):
                raise ValueError("wrong experts")


def one_row(row, G, M, K, want, shift=0.0):
    return lambda f: sets(f(torch.tensor([row]) + shift, G, M, K)) == [set(want)]


def shape_only(f):
    assert f(torch.randn(5, 8), 4, 2, 3).shape == (5, 3)


def shifting_changes_nothing(f):
    x = torch.randn(100, 8)
    return sets(f(x, 4, 2, 3)) == sets(f(x - 10, 4, 2, 3))


def at_most_m_groups(f):
    i = f(torch.randn(100, 8), 4, 2, 3)
    assert all(len(set(row)) <= 2 for row in (i // 2).tolist())


def best_first(f):
    x = torch.randn(100, 12)
    i = f(x, 3, 2, 3)
    v = x.gather(1, i)
    assert (v[:, :-1] >= v[:, 1:]).all()


def exact_order(f):
    assert f(torch.tensor([HAND[0][0]]), 4, 2, 3).tolist() == [[0, 2, 3]]
    assert f(torch.tensor([HAND[0][0]]).flip(-1), 4, 2, 3).tolist() == [[7, 5, 4]]


def no_group_of_four(f):
    x = torch.randn(200, 8) - 3
    return sets(f(x, 4, 2, 3)) == [set(r) for r in groups_in_plain_python(x, 4, 2, 3)]


# 8.5: more styles


def direction_with_cat(indices, real, E):
    chosen = torch.cat([i[r] for i, r in zip(indices, real)]).flatten()
    c = torch.histc(chosen.float(), bins=E, min=-0.5, max=E - 0.5)
    return torch.sign(c.mean() - c)


def direction_in_numpy(indices, real, E):
    c = sum(np.bincount(i.numpy()[r.numpy()].ravel(), minlength=E) for i, r in zip(indices, real))
    return np.sign(c.mean() - c)


def direction_by_scatter(indices, real, E):
    c = torch.zeros(E, dtype=torch.long)
    for i, r in zip(indices, real):
        c.scatter_add_(0, i.flatten(), r.repeat_interleave(i.shape[1]).long())
    return torch.where(c * E < c.sum(), 1, torch.where(c * E > c.sum(), -1, 0))


def direction_by_counter(indices, real, E):
    c = Counter(e for i, r in zip(indices, real) for e in i[r].flatten().tolist())
    mean = Fraction(sum(c.values()), E)
    return [int(mean > c[e]) - int(mean < c[e]) for e in range(E)]


def direction_by_comparing(indices, real, E):
    c = torch.stack([sum((i[r] == e).sum() for i, r in zip(indices, real)) for e in range(E)])
    return torch.sign(c.double().mean() - c).int()


def direction_with_weights(indices, real, E):
    w = [r[:, None].expand_as(i).flatten().double() for i, r in zip(indices, real)]
    flat = torch.cat([i.flatten() for i in indices])
    c = torch.bincount(flat, weights=torch.cat(w), minlength=E)
    return (c.mean() - c).sign()


def counted(indices, real, E):
    return sum(ch08._count(i, r, E) for i, r in zip(indices, real))


def without_minlength(indices, real, E):
    c = torch.cat([i[r].flatten() for i, r in zip(indices, real)]).bincount().float()
    return (c.mean() - c).sign()


def mean_of_shares(indices, real, E):
    s = sum(ch08._count(i, r, E) / ch08._count(i, r, E).sum() for i, r in zip(indices, real))
    return (s.mean() - s).sign()


def padding_at_expert_0(indices, real, E):
    return ch08._direction(
        [i * r[:, None] for i, r in zip(indices, real)], [r | True for r in real], E
    )


# 8.6: a step for a run


def slowest(steps, delta, vio):
    u = 1.03 * delta / 2 / (steps / 10)
    return u if u < vio / 4 else 0


def quietest_and_fastest(steps, delta, vio):
    low, high = 1.03 * delta / (0.2 * steps), vio / 4
    return math.sqrt(low * high) if low < high else 0


def in_the_middle(steps, delta, vio):
    low, high = 5.15 * delta / steps, 0.25 * vio
    return torch.tensor((low + high) / 2 if low <= high else 0.0)


def with_slack(steps, delta, vio):
    """There is early enough within vio."""
    low = (1.03 * delta - vio / 2) / (2 * (steps // 10))
    return 1.05 * low if 4.2 * low <= vio else 0.0


def as_fast_as_is_quiet(steps, delta, vio):
    u = vio / 4
    return u if 2 * u * (steps // 10) >= 1.03 * delta else 0


def in_fractions(steps, delta, vio):
    low = Fraction(delta) * Fraction(103, 100) / (2 * (steps // 10))
    return low if 4 * low <= Fraction(vio) else Fraction(0)


def by_trial(steps, delta, vio):
    for k in range(200):
        u = 1e-5 * 1.1**k
        arrived = 2 * u * (steps // 10) >= delta * 1.03
        if arrived:
            return u if 4 * u <= vio else 0
    return 0


def in_numpy(steps, delta, vio):
    u = np.float64(1.04) * delta / (2 * (steps // 10))
    return np.where(4 * u <= vio, u, 0.0)


RIGHT = {
    "8.1": ["DB", "b d", ["B", "D"], {"D", "B"}, ("b", "d"), "B and D", "B, D", lambda: "BD"],
    "8.2": [
        route_with_take_along,
        route_token_by_token,
        route_in_numpy,
        route_with_a_mask,
        route_by_pair,
        route_taking_the_bias_off,
        route_in_double,
        route_with_one_hot,
    ],
    "8.3": [
        by_counter,
        by_bisect,
        by_pairs,
        by_unique,
        between_neighbours,
        by_gap_from_half,
        by_a_fine_grid,
        by_walking,
    ],
    "8.4": [
        test_with_cases_by_hand,
        against_plain_python,
        against_repeat,
        by_one_hot,
        every_choice,
        numpy_allclose,
        lists_of_failures,
        raising,
    ],
    "8.5": [
        direction_by_one_hot,
        direction_in_plain_python,
        direction_with_cat,
        direction_in_numpy,
        direction_by_scatter,
        direction_by_counter,
        direction_by_comparing,
        direction_with_weights,
    ],
    "8.6": [
        slowest,
        quietest_and_fastest,
        in_the_middle,
        with_slack,
        as_fast_as_is_quiet,
        in_fractions,
        by_trial,
        in_numpy,
    ],
}

WRONG = {  # with the idea that is named
    "8.1": [
        ("AB", None),
        ("BC", None),
        ("BE", None),
        ("AD", "A named"),
        ("CD", "C named"),
        ("DE", "E named"),
    ],
    "8.2": [
        (ch08._routed(weigh=lambda s, b: s + b), "bias leaks"),
        (ch08._routed(choose=lambda s, b: s - b), "score minus bias"),
        (ch08._routed(choose=lambda s, b: s), "bias forgotten"),
        (as_route(lambda i, w: (i, w), lambda s, b, i, g: g * s.gather(1, i)), "not renormalised"),
        (
            as_route(lambda i, w: (i, w), lambda s, b, i, g: right_weights(s, b, i, 1)),
            "gamma forgotten",
        ),
    ],
    "8.3": [
        (lambda d_T: 0.0 if len(d_T) % 2 == 0 else 1 / len(d_T), "lumps ignored"),
        (
            lambda d_T: max(0, max(Counter(d_T.tolist()).values()) / (len(d_T) / 2) - 1),
            "largest lump",
        ),
        (ch08._at_median, "border at the median"),
        (ch08._at_mean, "border at the mean"),
        (ch08._at_zero, "border at zero"),
        (lambda d_T: by_counter(d_T) + 1, "load instead of excess"),
        (lambda d_T: (by_pairs(d_T) + 1) / 2, "share"),
    ],
    "8.4": [
        (shifting_changes_nothing, "best expert"),
        (one_row(*HAND[0]), "filled with zero"),
        (one_row(*HAND[0], shift=-2.0), "whole group"),
        (shape_only, None),
        (at_most_m_groups, None),
        (no_group_of_four, "whole group"),
    ],
    "8.5": [
        (
            lambda i, r, E: ch08._missing_sign(
                sum(ch08._count(a, b | True, E) for a, b in zip(i, r)).float()
            ),
            "padding counted",
        ),
        (
            lambda i, r, E: torch.stack([ch08._direction([a], [b], E) for a, b in zip(i, r)]).sum(
                0
            ),
            "per micro-batch",
        ),
        (lambda i, r, E: ch08._direction([i[-1]], [r[-1]], E), "last micro-batch"),
        (lambda i, r, E: (counted(i, r, E) - counted(i, r, E).float().mean()).sign(), "wrong way"),
    ],
    "8.6": [
        (lambda steps, delta, vio: delta / steps / 2, "at the end"),
        (lambda steps, delta, vio: 1e-3, "the paper's"),
        (lambda steps, delta, vio: 1.03 * delta / 2 / (steps // 10), "always a step"),
        (lambda steps, delta, vio: 0.25 * vio, "always the quiet step"),
    ],
}

REFUSED = {
    "8.1": ["B", "D", "BCD", "ABCDE", "AC", "none"],
    "8.2": [
        as_route(lambda i, w: (w, i), right_weights),  # the pair swapped
        as_route(lambda i, w: i, right_weights),
        as_route(lambda i, w: w, right_weights),
        as_route(lambda i, w: (i.flip(1), w), right_weights),
        as_route(lambda i, w: (i + 1, w), right_weights),
        as_route(lambda i, w: (i, w), lambda s, b, i, g: g * s.softmax(-1).gather(1, i)),
        as_route(
            lambda i, w: (i, w), lambda s, b, i, g: g * s.gather(1, i) / s.sum(1, keepdim=True)
        ),
        as_route(lambda i, w: (i, w), lambda s, b, i, g: g * s.gather(1, i).softmax(-1)),
        as_route(lambda i, w: (i, w), lambda s, b, i, g: right_weights(s, b, i, g) + b[i]),
        ch08._routed(choose=lambda s, b: s * b),
        ch08._routed(choose=lambda s, b: -(s + b)),
        lambda s, b, K, g: ch08._routed()(s, b, K + 1, g),
    ],
    "8.3": [
        lambda d_T: max((d_T > 0).sum().item(), (d_T < 0).sum().item()) / (len(d_T) / 2) - 1,
        lambda d_T: by_counter(d_T) * 2,
        lambda d_T: by_counter(d_T) / 2,
        lambda d_T: len(d_T) - d_T.unique().numel(),
        lambda d_T: 1 - d_T.unique().numel() / len(d_T),
        lambda d_T: ch08._vio_right((d_T >= d_T.median()).sum().item(), len(d_T)),
        lambda d_T: max(ch08._vio_right((d_T > x).sum().item(), len(d_T)) for x in d_T),
        lambda d_T: ch08._vio_right((d_T > d_T.unique().median()).sum().item(), len(d_T)),
        lambda d_T: min(abs((d_T > x).sum().item() - len(d_T) / 2) for x in d_T),
        lambda d_T: min((d_T > x).sum().item() for x in d_T) / (len(d_T) / 2),
        lambda d_T: d_T.var().item(),
        lambda d_T: str(by_counter(d_T)),
    ],
    "8.4": [
        best_first,  # the order is free
        exact_order,
        lambda f: True,
        lambda f: False,
        lambda f: f(torch.randn(3, 8), 4, 2, 3) is not None,
        lambda f: torch.equal(
            f(torch.rand(50, 8), 4, 2, 3), groups_with_repeat(torch.rand(50, 8), 4, 2, 3)
        ),
        lambda f: sets(f(torch.rand(99, 8), 4, 4, 3)) is not None,
        one_row(*HAND[1]),
        one_row(*HAND[2]),
        lambda f: len(set(f(torch.randn(1, 8), 4, 2, 3)[0].tolist())) == 3,
        lambda f: (f(torch.randn(9, 8), 4, 2, 3) < 8).all(),
        lambda f: f(torch.randn(9, 8), 4, 2, 3).tolist() == f(torch.randn(9, 8), 4, 2, 3).tolist(),
    ],
    "8.5": [
        without_minlength,
        mean_of_shares,
        padding_at_expert_0,
        ch08._never_zero,
        lambda i, r, E: ch08._direction(i[:1], r[:1], E),
        lambda i, r, E: counted(i, r, E).float().mean() - counted(i, r, E),
        lambda i, r, E: ch08._direction(i, [~one for one in r], E),
        lambda i, r, E: (counted(i, r, E).median() - counted(i, r, E)).sign(),
        lambda i, r, E: ch08._direction([one[:, :1] for one in i], r, E),
        lambda i, r, E: (counted(i, r, E).sum() // E - counted(i, r, E)).sign(),
        lambda i, r, E: ch08._direction(i, r, E + 1)[:E],
        lambda i, r, E: counted(i, r, E),
        lambda i, r, E: 0.001 * ch08._direction(i, r, E),
    ],
    "8.6": [
        lambda steps, delta, vio: 0,
        lambda steps, delta, vio: 0.01,
        lambda steps, delta, vio: delta,
        lambda steps, delta, vio: delta / 5,
        lambda steps, delta, vio: vio / 2,
        lambda steps, delta, vio: vio,
        lambda steps, delta, vio: -slowest(steps, delta, vio),
        lambda steps, delta, vio: math.inf,
        lambda steps, delta, vio: float("nan"),
        lambda steps, delta, vio: str(slowest(steps, delta, vio)),
        lambda steps, delta, vio: 2 * slowest(steps, delta, vio),
        lambda steps, delta, vio: slowest(steps, delta, vio) / 2,
        lambda steps, delta, vio: math.ceil(delta / (2 * steps)),
    ],
}
