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


def dispatch_with_index_add(x_TD, w_TK, e_TK, experts):
    order = e_TK.flatten().argsort()
    token_A = order.div(e_TK.shape[1], rounding_mode="floor")
    counts = load_by_comparing(e_TK, len(experts))
    results = torch.cat([f(rows) for f, rows in zip(experts, x_TD[token_A].split(counts))])
    return torch.zeros_like(x_TD).index_add(0, token_A, w_TK.flatten()[order, None] * results)


def dispatch_with_the_inverse_permutation(x_TD, w_TK, e_TK, experts):
    order = e_TK.flatten().sort(stable=True).indices
    rows = x_TD.repeat_interleave(e_TK.shape[1], 0)[order]
    results = torch.stack([experts[e](row) for e, row in zip(e_TK.flatten()[order].tolist(), rows)])
    return torch.einsum("tk,tkd->td", w_TK, results[order.argsort()].unflatten(0, e_TK.shape))


RIGHT = {
    "1.1": [count_by_parts, count_from_modules],
    "1.2": [combine_with_a_loop, combine_by_masking],
    "1.3": [load_by_comparing, load_by_scatter],
    "1.4": [balance_by_scatter, balance_in_plain_python],
    "1.5": [dispatch_with_index_add, dispatch_with_the_inverse_permutation],
}
