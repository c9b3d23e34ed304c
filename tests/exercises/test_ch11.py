"""Chapter 11: right answers that differ from the checker's own."""

import heapq

import torch


def table_with_a_heap(frequencies, E):
    heap, table = [(0, e) for e in range(E)], [None] * len(frequencies)
    for frequency, token in sorted(((f, v) for v, f in enumerate(frequencies)), reverse=True):
        load, expert = heapq.heappop(heap)
        table[token] = expert
        heapq.heappush(heap, (load + frequency, expert))
    return table


def table_as_a_tensor(frequencies, E):
    load_E, table_V = torch.zeros(E), torch.zeros(len(frequencies), dtype=torch.long)
    for v in torch.tensor(frequencies).argsort(descending=True):
        e = E - 1 - int(load_E.flip(0).argmin())
        table_V[v] = e
        load_E[e] += frequencies[v]
    return table_V


def plan_in_logarithms(logits_TE, rounds):
    T, E = logits_TE.shape
    log_p = logits_TE.double()
    for _ in range(rounds):
        log_p = log_p - log_p.logsumexp(1, keepdim=True) - torch.tensor(float(T)).log()
        log_p = log_p - log_p.logsumexp(0, keepdim=True) - torch.tensor(float(E)).log()
    return log_p.exp()


def plan_by_its_scales(logits_TE, rounds):
    M, (T, E) = logits_TE.exp(), logits_TE.shape
    v_E = torch.ones(E)
    for _ in range(rounds):
        u_T = 1 / (T * (M @ v_E))
        v_E = 1 / (E * (u_T @ M))
    return u_T[:, None] * M * v_E


def soft_moe_by_einsum(x_ND, phi_DS, experts):
    h = torch.einsum("nd,ds->ns", x_ND, phi_DS)
    slots = torch.einsum("ns,nd->sd", torch.softmax(h, 0), x_ND)
    answers = torch.stack([experts[s](slots[s]) for s in range(len(experts))])
    return torch.einsum("ns,sd->nd", torch.softmax(h, 1), answers)


def soft_moe_token_by_token(x_ND, phi_DS, experts):
    h, out = x_ND @ phi_DS, []
    slots = [
        sum(w * x for w, x in zip(torch.softmax(h[:, s], 0), x_ND)) for s in range(len(experts))
    ]
    for n in range(len(x_ND)):
        out.append(sum(w * f(slot) for w, f, slot in zip(torch.softmax(h[n], 0), experts, slots)))
    return torch.stack(out)


RIGHT = {
    "11.1": [table_with_a_heap, table_as_a_tensor],
    "11.2": [plan_in_logarithms, plan_by_its_scales],
    "11.3": [1.2**3 / 1.2**2, torch.tensor(1.2)],
    "11.4": [
        lambda K, E, Z, tau: K / (1 + Z / (tau * E)),
        lambda K, E, Z, tau: K - K * Z / (tau * E + Z),
    ],
    "11.5": [soft_moe_by_einsum, soft_moe_token_by_token],
    "11.6": [["loss_free", "quantile_balancing"], {"quantile_balancing", "loss_free"}],
}
