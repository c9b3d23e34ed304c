"""Chapter 1: right answers that differ from the checker's own."""

import torch


def count_by_parts(D, F, E, K):
    gate = up = down = D * F
    router = D * E
    return [E * (gate + up + down) + router, K * (gate + up + down) + router]


def count_from_modules(D, F, E, K):
    expert = sum(torch.empty(shape, device="meta").numel() for shape in ((F, D), (F, D), (D, F)))
    return torch.tensor([E, K]) * expert + D * E


def combine_with_a_loop(p_E, outputs_ED, K):
    order = sorted(range(len(p_E)), key=lambda e: -p_E[e])[:K]
    total = sum(p_E[e] for e in order)
    return sum(p_E[e] / total * outputs_ED[e] for e in order)


def combine_by_masking(p_E, outputs_ED, K):
    masked_E = torch.where(p_E >= p_E.topk(K).values[-1], p_E, 0)
    return masked_E / masked_E.sum() @ outputs_ED


def load_by_comparing(indices_TK, E):
    return [int((indices_TK == e).sum()) for e in range(E)]


def load_by_scatter(indices_TK, E):
    return torch.zeros(E).scatter_add_(0, indices_TK.flatten(), torch.ones(indices_TK.numel()))


def balance_by_scatter(p_TE, indices_TK):
    E = p_TE.shape[1]
    return (load_by_scatter(indices_TK, E) * p_TE.mean(0)).sum() * E / indices_TK.numel()


def balance_in_plain_python(p_TE, indices_TK):
    E, slots = p_TE.shape[1], indices_TK.flatten().tolist()
    return E * sum(slots.count(e) / len(slots) * float(p_TE[:, e].mean()) for e in range(E))


RIGHT = {
    "1.1": [count_by_parts, count_from_modules],
    "1.2": [combine_with_a_loop, combine_by_masking],
    "1.3": [load_by_comparing, load_by_scatter],
    "1.4": [balance_by_scatter, balance_in_plain_python],
}
