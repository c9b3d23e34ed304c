"""Chapter 9: right answers that differ from the checker's own."""

import math

import torch


def choose_by_topk(scores_TE, c):
    nudged_TE = (
        scores_TE.double() - 1e-9 * torch.arange(len(scores_TE))[:, None]
    )  # the earlier token wins a tie
    mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    return mask_TE.scatter_(0, nudged_TE.topk(c, dim=0).indices, True)


def choose_in_plain_python(scores_TE, c):
    T, E = scores_TE.shape
    chosen = [sorted(range(T), key=lambda t: (-float(scores_TE[t, e]), t))[:c] for e in range(E)]
    return [[t in chosen[e] for e in range(E)] for t in range(T)]


def causal_by_noise(route):
    """Many texts, everything from some place on replaced."""
    for seed in range(200):
        x_TD = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        t = 1 + seed % 7
        other_TD = torch.randn(8, 3, generator=torch.Generator().manual_seed(1000 + seed))
        changed_TD = torch.cat([x_TD[:t], 3 * other_TD[t:]])
        assert torch.equal(route(x_TD)[:t], route(changed_TD)[:t])


def causal_by_prefixes(route):
    for seed in range(50):
        x_TD = 2 * torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        whole_TE = route(x_TD)
        for t in range(3, 12):
            if (route(x_TD[:t]) != whole_TE[:t]).any():
                return False
    return True


def left_by_rows(scores_VE, a, taken_E):
    return [
        all(
            bool(scores_VE[a, e] >= scores_VE[v, e]) == bool(taken_E[e])
            for e in range(len(taken_E))
        )
        for v in range(len(scores_VE))
    ]


def left_by_counting_misfits(scores_VE, a, taken_E):
    return ((scores_VE <= scores_VE[a]) != taken_E).sum(-1) == 0


def nobody_by_factors(T, E, c):
    left = 1.0
    for _ in range(E):
        left *= (T - c) / T
    return left


def nobody_by_logs(T, E, c):
    return torch.tensor(E * math.log1p(-c / T), dtype=torch.float64).exp()


def cut_by_topk(scores_TE, new_NE, G):
    c = math.ceil(scores_TE.shape[0] * G / scores_TE.shape[1])
    return new_NE >= scores_TE.topk(c, dim=0).values[-1]


def cut_by_counting(scores_TE, new_NE, G):
    c = math.ceil(len(scores_TE) * G / scores_TE.shape[1])
    return (scores_TE[None] > new_NE[:, None]).sum(1) < c


RIGHT = {
    "9.1": [choose_by_topk, choose_in_plain_python],
    "9.2": [causal_by_noise, causal_by_prefixes],
    "9.3": [left_by_rows, left_by_counting_misfits],
    "9.4": [nobody_by_factors, nobody_by_logs],
    "9.5": [cut_by_topk, cut_by_counting],
    "9.6": ["EC", ["c", "e"], {"C", "E"}],
    "9.7": ["TFFTFT", " t f f t f t", [True, False, False, True, False, True]],
}


# Wrong answers that must not pass, beside the ideas with a name


def one_change(route):
    x_TD = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    changed_TD = x_TD.clone()
    changed_TD[4] += 0.1
    return torch.equal(route(x_TD)[:4], route(changed_TD)[:4])


def one_token_in_the_middle(route):
    for seed in range(100):
        x_TD = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        changed_TD = x_TD.clone()
        changed_TD[4] = 5 - changed_TD[4]
        assert torch.equal(route(x_TD)[:4], route(changed_TD)[:4])


def the_order_only(route):
    for seed in range(50):
        x_TD = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(route(x_TD)[:4], route(torch.cat([x_TD[:4], x_TD[4:].flip(0)]))[:4])


def loads_are_even(route):
    load_E = route(torch.randn(9, 3, generator=torch.Generator().manual_seed(1))).sum(0)
    return bool((load_E == load_E[0]).all())


def compares_the_changed_too(route):
    x_TD = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return torch.equal(route(x_TD), route(torch.cat([x_TD[:4], -x_TD[4:]])))


def by_a_strict_bar(scores_TE, c):
    return scores_TE > scores_TE.sort(0, descending=True).values[c - 1]


REFUSED = {
    "9.1": [
        by_a_strict_bar,
        lambda s, c: s.sort(0, descending=True, stable=True).indices[:c],
        lambda s, c: s >= s.mean(0),
        lambda s, c: s.argsort(0, descending=True) < c,  # indices, not ranks
        lambda s, c: torch.ones_like(s, dtype=torch.bool),
        lambda s, c: choose_by_topk(s, c).T,
        lambda s, c: choose_by_topk(s, max(1, c - 1)),
        lambda s, c: s * choose_by_topk(s, c),
        lambda s, c: choose_by_topk(s / s.sum(1, keepdim=True), c),
        lambda s, c: choose_by_topk(s, c).sum(1),
    ],
    "9.2": [
        one_change,
        one_token_in_the_middle,
        the_order_only,
        loads_are_even,
        compares_the_changed_too,
        lambda route: True,
        lambda route: False,
        lambda route: route.__name__ != "experts_choose",
    ],
    "9.3": [
        lambda s, a, taken: (s[a] > s).all(-1),
        lambda s, a, taken: ((s[a] >= s) == taken).sum(-1),
        lambda s, a, taken: ((s[a] >= s) == taken).all(0),
        lambda s, a, taken: ((s[a] >= s) == taken).float().mean(-1) > 0.5,
        lambda s, a, taken: ((s[a] >= s) == taken).all(-1).nonzero(),
        lambda s, a, taken: ~((s[a] >= s) == taken).all(-1),
        lambda s, a, taken: ((s >= s[a]) == taken).all(-1),
        lambda s, a, taken: ((s[a] >= s) & taken).all(-1),
        lambda s, a, taken: ((s[a] >= s) == taken)[:, taken.bool()].all(-1),
        lambda s, a, taken: ((s[a] >= s) == taken)[:, 0],
    ],
    "9.4": [
        lambda T, E, c: (1 - 1 / E) ** c,
        lambda T, E, c: math.exp(-E * c / T),
        lambda T, E, c: math.comb(T - c, 1) / T,
        lambda T, E, c: (c / T) * E,
        lambda T, E, c: round((1 - c / T) ** E, 1),
        lambda T, E, c: (1 - c / E) ** T,
        lambda T, E, c: 100 * (1 - c / T) ** E,
        lambda T, E, c: 0.1,
    ],
    "9.5": [
        lambda s, n, G: n >= s.quantile(1 - G / s.shape[1]),
        lambda s, n, G: n >= s.min(0).values,
        lambda s, n, G: n >= s.max(0).values,
        lambda s, n, G: n >= s.median(0).values,
        lambda s, n, G: n > n.mean(0),
        lambda s, n, G: cut_by_topk(s, n, 2 * G),
        lambda s, n, G: cut_by_topk(s, s, G),
        lambda s, n, G: ~cut_by_topk(s, n, G),
        lambda s, n, G: cut_by_topk(s, n, G).sum(0),
        lambda s, n, G: n >= s.mean(0) + s.std(0),
    ],
    "9.6": ["A", "ABCDE", "C", "E", "BD", "", "F", 5, "CDE"],
    "9.7": ["TTTTTT", "FFFFFF", "TFFTF", "TFFTFTT", "yes", 5, "TFTTFT", "FTTFTF"],
}
