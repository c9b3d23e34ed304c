"""Right answers of chapter 10, each written in two ways, and what the checkers say to wrong ones."""

import math

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


RIGHT = {
    "10.1": [cutoffs_by_topk, cutoffs_from_below],
    "10.2": [step_in_place, step_by_the_sum],
    "10.3": [output_masked, output_by_loops],
    "10.4": [band_by_topk, band_by_rank],
    "10.5": [memory_by_search, memory_by_tensor],
    "10.6": ["TFFTFF", " tfftff "],
}


def test_every_wrong_idea_gets_its_own_name():
    for number, exercise in exercises(10).items():
        for idea in exercise.ideas:
            assert check(number, idea.answer).idea == idea.name


def test_a_threshold_nobody_foresaw_gets_a_helpful_message():
    verdict = check("10.1", lambda h_TE, G: h_TE.max(0).values)
    assert not verdict.right and verdict.idea is None and "expected" in verdict.message
