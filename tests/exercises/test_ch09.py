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


def seers_by_sets(route, tokens_T, t, new):
    changed_T = torch.cat([tokens_T[:t], torch.tensor([new]), tokens_T[t + 1 :]])
    before, after = route(tokens_T).tolist(), route(changed_T).tolist()
    return sum(before[i] != after[i] for i in range(t))


def seers_by_tensors(route, tokens_T, t, new):
    changed_T = tokens_T.clone()
    changed_T[t] = new
    return (route(tokens_T)[:t] ^ route(changed_T)[:t]).amax(-1).sum()


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


def bits_by_lgamma(T, E, c):
    nats = math.lgamma(T + 1) - math.lgamma(c + 1) - math.lgamma(T - c + 1)
    return E * nats / math.log(2) / T


def bits_by_sums(T, E, c):
    return E / T * sum(math.log2((T - i) / (c - i)) for i in range(c))


def cut_by_topk(scores_TE, new_NE, G):
    c = math.ceil(scores_TE.shape[0] * G / scores_TE.shape[1])
    return new_NE >= scores_TE.topk(c, dim=0).values[-1]


def cut_by_counting(scores_TE, new_NE, G):
    c = math.ceil(len(scores_TE) * G / scores_TE.shape[1])
    return (scores_TE[None] > new_NE[:, None]).sum(1) < c


RIGHT = {
    "9.1": [choose_by_topk, choose_in_plain_python],
    "9.2": [seers_by_sets, seers_by_tensors],
    "9.3": [left_by_rows, left_by_counting_misfits],
    "9.4": [bits_by_lgamma, bits_by_sums],
    "9.5": [cut_by_topk, cut_by_counting],
    "9.6": ["TFFTFT", " tfftft "],
}
