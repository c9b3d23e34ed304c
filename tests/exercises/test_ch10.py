"""Right answers of chapter 10, each written in two ways, and what the checkers say to wrong ones."""

import math
from statistics import NormalDist

import numpy as np
import torch

from moe_book.checks import check, exercises


def cutoffs_by_topk(h_TE, G):
    T, E = h_TE.shape
    return h_TE.topk(T * G // E, dim=0).values[-1]


def cutoffs_from_below(h_TE, G):
    T, E = h_TE.shape
    return torch.stack([h_TE[:, e].kthvalue(T - int(T * G / E) + 1).values for e in range(E)])


def step_in_place(c_E, t, micro, beta):
    k = len(micro[0]) // len(c_E)
    q_E = sum(h.topk(k, dim=0).values[-1] for h in micro) / len(micro)
    return c_E + (1 - beta) / (1 - beta ** (t + 1)) * (q_E - c_E)


def step_by_the_sum(c_E, t, micro, beta):
    k = len(micro[0]) // len(c_E)
    m_E = c_E * (1 - beta**t)  # the uncorrected average, as it was
    m_E = beta * m_E + (1 - beta) * torch.stack([h.sort(dim=0).values[-k] for h in micro]).mean(0)
    return m_E / (1 - beta ** (t + 1))


def output_masked(h_TE, c_E, f_TE):
    return (torch.sigmoid(h_TE).masked_fill(h_TE <= c_E, 0) * f_TE).sum(1)


def output_by_loops(h_TE, c_E, f_TE):
    rows = zip(h_TE.tolist(), f_TE.tolist())
    return torch.tensor(
        [
            sum(f / (1 + math.exp(-h)) for h, f, c in zip(hs, fs, c_E.tolist()) if h > c)
            for hs, fs in rows
        ]
    )


def band_by_topk(h_T, c, k, C):
    n = int((h_T > c).sum().clamp(math.ceil((1 - C) * k), math.floor((1 + C) * k)))
    return torch.zeros_like(h_T, dtype=torch.bool).scatter(0, h_T.topk(n).indices, True)


def band_by_rank(h_T, c, k, C):
    rank_T = h_T.argsort(descending=True).argsort()
    return (rank_T < (1 - C) * k) | ((h_T > c) & (rank_T < math.floor((1 + C) * k)))


def memory_by_search(d, s):
    betas = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99]
    return sorted(betas, key=lambda b: (d / (1 - b)) ** 2 + s**2 * (1 - b) / (1 + b))[0]


def memory_by_tensor(d, s):
    beta = torch.tensor([0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99], dtype=torch.float64)
    return beta[torch.hypot(d / (1 - beta), s * ((1 - beta) / (1 + beta)).sqrt()).argmin()]


def cutoffs_in_numpy(h_TE, G):
    h = h_TE.numpy()
    return np.sort(h, axis=0)[-math.floor(h.shape[0] * G / h.shape[1])]


def cutoffs_in_lists(h_TE, G):
    columns = [sorted(column, reverse=True) for column in h_TE.T.tolist()]
    return [column[int(len(column) * G // len(columns)) - 1] for column in columns]


def step_with_m(c_E, t, micro, beta):
    """In numpy."""
    q = np.mean([np.sort(h.numpy(), axis=0)[-(len(h) // h.shape[1])] for h in micro], axis=0)
    m = beta * (1 - beta**t) * c_E.numpy() + (1 - beta) * q
    return m / (1 - beta ** (t + 1))


def output_with_where(h_TE, c_E, f_TE):
    return torch.where(h_TE > c_E, h_TE.sigmoid() * f_TE, 0.0).sum(-1)


def output_by_einsum(h_TE, c_E, f_TE):
    return torch.einsum("te,te,te->t", (h_TE > c_E).to(h_TE.dtype), h_TE.sigmoid(), f_TE)


def band_in_lists(h_T, c, k, C):
    best_first = sorted(range(len(h_T)), key=lambda t: -float(h_T[t]))
    low, high = math.ceil((1 - C) * k), math.floor((1 + C) * k)
    n = sorted((low, sum(float(h) > c for h in h_T), high))[1]
    return [t in best_first[:n] for t in range(len(h_T))]


def band_in_numpy(h_T, c, k, C):
    h = h_T.numpy().astype(float)
    n = np.clip((h_T > c).sum().item(), np.ceil((1 - C) * k), np.floor((1 + C) * k))
    kept = np.zeros(len(h), dtype=int)
    kept[np.argsort(-h)[: int(n)]] = 1
    return kept


def hungry_by_logarithm(beta, d, E):
    allowed = NormalDist().inv_cdf(1 - 0.1 / E) - NormalDist().inv_cdf(1 - 1 / E)
    lag = d / (1 - beta)
    return math.ceil(math.log(allowed / lag) / math.log(beta)) if lag > allowed else 0


def hungry_by_tensor(beta, d, E):
    ndtri = lambda p: torch.special.ndtri(torch.tensor(p, dtype=torch.float64))
    lag_S = d / (1 - beta) * torch.tensor(beta, dtype=torch.float64) ** torch.arange(4000)
    return (lag_S > ndtri(1 - 0.1 / E) - ndtri(1 - 1 / E)).sum()


def alone_and_later(route):
    h_TE = torch.randn(160, 4, generator=torch.Generator().manual_seed(5)) * 2
    for low in (0, 6):
        before = route(h_TE - low)
        for t in range(160):
            assert torch.equal(route((h_TE - low)[t : t + 1])[0], before[t])
        route(h_TE + 4)
        assert torch.equal(route(h_TE - low), before)


def that_says_so(route):
    """Returns a boolean, and feeds pieces of several lengths."""
    generator, ok = torch.Generator().manual_seed(1), True
    for scale, shift in ((1.0, 0.0), (4.0, 0.0), (1.0, -4.0), (1.0, 3.0)):
        h_TE = scale * torch.randn(90, 5, generator=generator) + shift
        whole = route(h_TE)
        for size in (1, 7, 90):
            ok &= torch.equal(torch.cat([route(part) for part in h_TE.split(size)]), whole)
    return bool(ok)


RIGHT = {
    "10.1": [cutoffs_by_topk, cutoffs_from_below, cutoffs_in_numpy, cutoffs_in_lists],
    "10.2": [step_in_place, step_by_the_sum, step_with_m],
    "10.3": [output_masked, output_by_loops, output_with_where, output_by_einsum],
    "10.4": [band_by_topk, band_by_rank, band_in_lists, band_in_numpy],
    "10.5": [memory_by_search, memory_by_tensor, lambda d, s: np.float64(memory_by_search(d, s))],
    "10.6": ["TFFTFF", " tfftff ", list("TFFTFF"), [True, False, False, True, False, False]],
    "10.7": [hungry_by_logarithm, hungry_by_tensor],
    "10.8": [alone_and_later, that_says_so],
    "10.9": ["CE", "ec", ["E", "C"], {"C", "E"}, "C, E"],
}


def kth(h_TE, n):
    return h_TE.sort(dim=0, descending=True).values[n - 1]


def one_batch_only(route):
    h_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([route(h_TE[t : t + 1]) for t in range(64)]), route(h_TE))


def twice_the_same(route):
    h_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(route(h_TE), route(h_TE))


def halves(route):
    h_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([route(h_TE[:32]), route(h_TE[32:])]), route(h_TE))


def loads_are_even(route):
    load_E = route(torch.randn(64, 4, generator=torch.Generator().manual_seed(0))).sum(0)
    assert load_E.max() < 2 * load_E.float().mean()


def a_short_batch(route):
    h_TE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([route(h_TE[t : t + 1]) for t in range(3)]), route(h_TE))


REFUSED = {
    "10.1": [
        lambda h, G: h.max(0).values,
        lambda h, G: h.mean(0),
        lambda h, G: h.mean(0) + h.std(0),
        lambda h, G: h.quantile(G / h.shape[1], dim=0),
        lambda h, G: h.topk(G, dim=0).values[-1],
        lambda h, G: h.topk(len(h) * G // h.shape[1], dim=0).values[0],
        lambda h, G: h.topk(len(h) * G // h.shape[1], dim=0).values,
        lambda h, G: h.topk(len(h) * G // h.shape[1], dim=0).indices[-1],
        lambda h, G: h.abs().topk(len(h) * G // h.shape[1], dim=0).values[-1],
        lambda h, G: h.kthvalue(len(h) * G // h.shape[1], dim=0).values,
        lambda h, G: h.sigmoid().topk(len(h) * G // h.shape[1], dim=0).values[-1],
        lambda h, G: kth(h, len(h) * G // h.shape[1]).mean(),
    ],
    "10.2": [
        lambda c, t, micro, beta: torch.stack([kth(h, len(h) // 4) for h in micro]).mean(0),
        lambda c, t, micro, beta: c,
        lambda c, t, micro, beta: beta * c + (1 - beta) * kth(micro[-1], len(micro[-1]) // 4),
        lambda c, t, micro, beta: c + (1 - beta) / (1 - beta ** (t + 1)) * kth(micro[0], 4),
        lambda c, t, micro, beta: c + (1 - beta) / (1 - beta ** (t + 1)) * (kth(micro[-1], 4) - c),
        lambda c, t, micro, beta: c - step_in_place(c, t, micro, beta),
        lambda c, t, micro, beta: (
            c + (1 - beta) / (1 - beta ** (t + 2)) * (step_in_place(c, 0, micro, 0.0) - c)
        ),
        lambda c, t, micro, beta: (
            c + (1 - beta) * (1 - beta ** (t + 1)) * (step_in_place(c, 0, micro, 0.0) - c)
        ),
        lambda c, t, micro, beta: step_in_place(c, t, [micro[0]], beta),
        lambda c, t, micro, beta: step_in_place(c, t * len(micro), micro, beta),
        lambda c, t, micro, beta: step_in_place(c, t, micro, beta).mean(),
        lambda c, t, micro, beta: step_in_place(c, t, micro, 1 - beta),
    ],
    "10.3": [
        lambda h, c, f: (h.sigmoid() * (h < c) * f).sum(-1),
        lambda h, c, f: (h * (h > c) * f).sum(-1),
        lambda h, c, f: ((h - c).sigmoid() * (h > c) * f).sum(-1),
        lambda h, c, f: (h.sigmoid() * (h > c)).sum(-1),
        lambda h, c, f: (h.sigmoid() * (h > c) * f).mean(-1),
        lambda h, c, f: h.sigmoid() * (h > c) * f,
        lambda h, c, f: (h.sigmoid() * (h > c) * f).sum(0),
        lambda h, c, f: (h.sigmoid() * (h > c) * f).max(-1).values,
        lambda h, c, f: (h.sigmoid() * (f > c) * f).sum(-1),
        lambda h, c, f: ((h > c) * f).sum(-1) / (h > c).sum(-1).clamp(min=1),
        lambda h, c, f: (h.masked_fill(h <= c, -torch.inf).softmax(-1).nan_to_num() * f).sum(-1),
        lambda h, c, f: (h.tanh() * (h > c) * f).sum(-1),
        lambda h, c, f: (h.relu() * (h > c) * f).sum(-1),
    ],
    "10.4": [
        lambda h, c, k, C: h >= h.topk(k).values[-1],
        lambda h, c, k, C: torch.ones_like(h, dtype=torch.bool),
        lambda h, c, k, C: (h > c) & (h > c - C),
        lambda h, c, k, C: band_by_topk(h, c, k, 0.0),
        lambda h, c, k, C: band_by_topk(h, c, k, 1.0),
        lambda h, c, k, C: band_by_topk(h, -c, k, C),
        lambda h, c, k, C: band_by_topk(-h, c, k, C),
        lambda h, c, k, C: band_by_topk(h, c, k + 1, C),
        lambda h, c, k, C: ~band_by_topk(h, c, k, C),
        lambda h, c, k, C: torch.arange(len(h)) < band_by_topk(h, c, k, C).sum(),
        lambda h, c, k, C: h[band_by_topk(h, c, k, C)],
        lambda h, c, k, C: h.topk(int(band_by_topk(h, c, k, C).sum())).indices,
        lambda h, c, k, C: band_by_topk(h, c, k, C).sum(),
    ],
    "10.5": [
        lambda d, s: 0.95,
        lambda d, s: 0.99 if d == 0 else 0.9,
        lambda d, s: min(
            (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99), key=lambda b: (d / (1 - b)) ** 2 + s**2 * (1 - b)
        ),
        lambda d, s: max(
            (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99),
            key=lambda b: (d / (1 - b)) ** 2 + s**2 * (1 - b) / (1 + b),
        ),
        lambda d, s: min(
            (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99), key=lambda b: (d / (1 - b)) ** 2 + s**2
        ),
        lambda d, s: min(
            (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99),
            key=lambda b: (d * (1 - b)) ** 2 + s**2 * (1 - b) / (1 + b),
        ),
        lambda d, s: 1 - memory_by_search(d, s),
        lambda d, s: 1 / (1 - memory_by_search(d, s)),
        lambda d, s: (d / (1 - memory_by_search(d, s))) ** 2,
        lambda d, s: min((0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99), key=lambda b: abs(d / (1 - b) - s)),
    ],
    "10.6": ["TFFTFT", "FFFTFF", "TTTTTT", "FTTFTT", "TFFT", "yes", 6],
    "10.7": [
        lambda beta, d, E: 1 / (1 - beta),
        lambda beta, d, E: d / (1 - beta),
        lambda beta, d, E: 0,
        lambda beta, d, E: hungry_by_logarithm(beta, d, E) + 1,
        lambda beta, d, E: hungry_by_logarithm(beta, d, 8),
        lambda beta, d, E: hungry_by_logarithm(beta, 2 * d, E),
        lambda beta, d, E: hungry_by_logarithm(beta, d, 10 * E),
        lambda beta, d, E: math.log(d / (1 - beta)) / math.log(beta),
        lambda beta, d, E: d / (1 - beta) > 1.09,
        lambda beta, d, E: sum(d / (1 - beta) * beta**n > 1.09 for n in range(5000)),
        lambda beta, d, E: sum(d / (1 - beta) * beta**n > 1.09 for n in range(1, 5000)),
        lambda beta, d, E: sum(d * beta**n / (1 - beta) > 0.1 / E for n in range(9000)),
    ],
    "10.8": [
        one_batch_only,
        twice_the_same,
        halves,
        loads_are_even,
        a_short_batch,
        lambda route: None,
        lambda route: False,
        lambda route: route(torch.zeros(4, 4)).any(),
        lambda route: torch.equal(route(torch.eye(4)), route(torch.eye(4))),
    ],
    "10.9": ["C", "E", "CD", "BE", "ABCDE", "AD", "", ["C"], 3],
}


def test_every_wrong_idea_gets_its_own_name():
    for number, exercise in exercises(10).items():
        for idea in exercise.ideas:
            assert check(number, idea.answer).idea == idea.name


def test_a_threshold_nobody_foresaw_gets_a_helpful_message():
    verdict = check("10.1", lambda h_TE, G: h_TE.max(0).values)
    assert not verdict.right and verdict.idea is None and "expected" in verdict.message
