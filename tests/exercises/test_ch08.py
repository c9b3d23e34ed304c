"""Chapter 8: right answers that differ from the checker's own."""

import math

import torch


def step_by_comparison(bias_E, counts_E, u):
    mean = counts_E.double().mean()
    new_E = bias_E.clone()
    new_E[counts_E > mean] -= u
    new_E[counts_E < mean] += u
    return new_E - new_E.mean()


def step_in_plain_python(bias_E, counts_E, u):
    counts, total, E = counts_E.tolist(), int(counts_E.sum()), len(counts_E)
    new = [b + u * ((E * c < total) - (E * c > total)) for b, c in zip(bias_E.tolist(), counts)]
    return [b - sum(new) / E for b in new]


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


def violations_with_tensors(counts_SE):
    c = counts_SE.double()
    return (c.max(1).values / c.mean(1) - 1).mean(), c.sum(0).max() / c.sum(0).mean() - 1


def violations_in_plain_python(counts_SE):
    def vio(c):
        mean = sum(c) / len(c)
        return (max(c) - mean) / mean

    rows = counts_SE.tolist()
    return sum(map(vio, rows)) / len(rows), vio([sum(column) for column in zip(*rows)])


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


def steps_by_counting(margin, u):
    n = 0
    while 2 * u * n < margin - 1e-9:
        n += 1
    return n


RIGHT = {
    "8.1": [step_by_comparison, step_in_plain_python],
    "8.2": [route_with_take_along, route_token_by_token],
    "8.3": [violations_with_tensors, violations_in_plain_python],
    "8.4": [groups_with_repeat, groups_in_plain_python],
    "8.5": [direction_by_one_hot, direction_in_plain_python],
    "8.6": [steps_by_counting, lambda margin, u: -(-round(margin * 1e6) // round(2e6 * u))],
}
