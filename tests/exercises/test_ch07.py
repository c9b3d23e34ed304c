"""Chapter 7: right answers that differ from the checker's own."""

import math

import torch


def noisy_by_masking(h_E, raw_E, epsilon_E, K, training):
    H_E = h_E + float(training) * epsilon_E * torch.log1p(raw_E.exp())
    e_K = H_E.argsort(descending=True)[:K]
    masked_E = torch.full_like(H_E, -math.inf)
    masked_E[e_K] = H_E[e_K]
    return e_K, masked_E.softmax(-1)[e_K]


def noisy_in_plain_python(h_E, raw_E, epsilon_E, K, training):
    H = [
        h + (e * math.log(1 + math.exp(r)) if training else 0)
        for h, r, e in zip(h_E.tolist(), raw_E.tolist(), epsilon_E.tolist())
    ]
    order = sorted(range(len(H)), key=lambda e: -H[e])[:K]
    total = sum(math.exp(H[e]) for e in order)
    return order, [math.exp(H[e]) / total for e in order]


def kth_by_leaving_out(H_TE, K):
    columns = [
        torch.cat([H_TE[:, :e], H_TE[:, e + 1 :]], -1).topk(K).values[:, -1]
        for e in range(H_TE.shape[1])
    ]
    return torch.stack(columns, -1)


def kth_by_rank(H_TE, K):
    ranked_TE, rank_TE = (
        H_TE.sort(-1, descending=True).values,
        H_TE.argsort(-1, descending=True).argsort(-1),
    )
    return ranked_TE.gather(-1, torch.where(rank_TE < K, K, K - 1))


def load_by_leaving_out(h_TE, std_TE, epsilon_TE, K):
    return (
        torch.distributions.Normal(0, 1)
        .cdf((h_TE - kth_by_leaving_out(h_TE + std_TE * epsilon_TE, K)) / std_TE)
        .sum(0)
    )


def load_by_erf(h_TE, std_TE, epsilon_TE, K):
    z_TE = (h_TE - kth_by_rank(h_TE + std_TE * epsilon_TE, K)) / std_TE
    return [
        float(column.sum()) for column in (0.5 * (1 + torch.erf(z_TE / math.sqrt(2)))).unbind(-1)
    ]


def jitter_by_lerp(x_BND, u_BND, epsilon):
    return torch.lerp(x_BND * (1 - epsilon), x_BND * (1 + epsilon), u_BND)


def asked_by_softmax(p_TE):
    gates_T2 = torch.softmax(p_TE.topk(2).values.log(), -1)
    return float((1 + 2 * gates_T2[:, 1]).mean())


RIGHT = {
    "7.1": [noisy_by_masking, noisy_in_plain_python],
    "7.2": [kth_by_leaving_out, kth_by_rank],
    "7.3": [load_by_leaving_out, load_by_erf],
    "7.4": [jitter_by_lerp, lambda x, u, epsilon: x + x * epsilon * (2 * u - 1)],
    "7.5": [
        asked_by_softmax,
        lambda p: sum(1 + 2 * b / (a + b) for a, b in p.topk(2).values.tolist()) / len(p),
    ],
    "7.6": ["TFFTFT", " tfftft "],
}
