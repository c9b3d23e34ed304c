"""Chapter 11: right answers that differ from the checker's own."""

import heapq
import itertools
import math

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


def balanced_and_best(assign):
    """Against every permutation of the even assignment."""
    places = [0, 0, 1, 1]
    for seed in range(60):
        h_TE = 2 * torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)).double()
        found = assign(h_TE).tolist()
        assert sorted(found) == places
        value = sum(h_TE[t, e].item() for t, e in enumerate(found))
        for way in itertools.permutations(places):
            assert value >= sum(h_TE[t, e].item() for t, e in enumerate(way)) - 1e-9


def no_swap_helps(assign):
    """With two experts the best even assignment is one in which no pair of tokens gains by changing places."""
    for seed in range(200):
        h_TE = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        e_T = torch.as_tensor(assign(h_TE))
        if e_T.bincount(minlength=2).tolist() != [3, 3]:
            return False
        gain_T = h_TE[:, 0] - h_TE[:, 1]
        if gain_T[e_T == 0].min() < gain_T[e_T == 1].max():
            return False
    return True


def balanced_only(assign):
    for seed in range(50):
        h_TE = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        assert assign(h_TE).bincount(minlength=2).tolist() == [3, 3]


def the_case_by_hand(assign):
    return assign(torch.tensor([[4.0, 1.0], [2.0, 1.0]]).log()).tolist() == [0, 1]


def better_than_in_turn(assign):
    for seed in range(50):
        h_TE = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
        e_T = assign(h_TE)
        assert e_T.bincount(minlength=2).tolist() == [2, 2]
        value = h_TE.gather(1, e_T[:, None]).sum()
        assert value >= h_TE[0, 0] + h_TE[1, 1] + h_TE[2, 0] + h_TE[3, 1] - 1e-6


def each_has_its_favourite(assign):
    h_TE = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    return torch.equal(assign(h_TE), h_TE.argmax(1))


RIGHT = {
    "11.1": [table_with_a_heap, table_as_a_tensor],
    "11.2": [plan_in_logarithms, plan_by_its_scales],
    "11.3": ["EC", ["C", "E"], "c, e"],
    "11.4": [
        lambda K, E, Z, goal: Z / E / (K / goal - 1),
        lambda K, E, Z, goal: torch.tensor(goal * Z / (E * K - E * goal), dtype=torch.float64),
    ],
    "11.5": [balanced_and_best, no_swap_helps],
    "11.6": [
        ["loss_free", "quantile_balancing"],
        {"quantile_balancing", "loss_free"},
        "quantile_balancing, loss_free",
    ],
    "11.7": [
        lambda R, S: sum(2 * 0.5**S for _ in itertools.combinations(range(R), 2)),
        lambda R, S: math.comb(R, 2) * 0.25 * 0.5 ** (S - 3),
    ],
}


# Wrong answers that must not pass, beside the ideas with a name

REFUSED = {
    "11.1": [
        lambda f, E: [0] * len(f),
        lambda f, E: list(range(len(f))),
        lambda f, E: [E] * len(f),
        lambda f, E: [-1 for _ in f],
        lambda f, E: table_with_a_heap(f, E)[:-1],
        lambda f, E: sorted(table_with_a_heap(f, E)),
        lambda f, E: [v * E // len(f) for v in range(len(f))],
        lambda f, E: [min(E - 1, v) for v in range(len(f))],
        lambda f, E: table_with_a_heap([1] * len(f), E),
        lambda f, E: [e + 0.5 for e in table_with_a_heap(f, E)],
        lambda f, E: [hash(str(v)) % E if v else E for v in range(len(f))],
    ],
    "11.2": [
        lambda h, rounds: h.softmax(1),
        lambda h, rounds: h.softmax(0) / h.shape[1],
        lambda h, rounds: plan_in_logarithms(h, 1),
        lambda h, rounds: plan_in_logarithms(h, rounds + 1),
        lambda h, rounds: plan_in_logarithms(h, rounds).argmax(1),
        lambda h, rounds: plan_in_logarithms(h, rounds).log(),
        lambda h, rounds: plan_in_logarithms(2 * h, rounds),
        lambda h, rounds: plan_in_logarithms(h, rounds) * len(h),
        lambda h, rounds: torch.full_like(h, 1 / h.numel()),
        lambda h, rounds: plan_in_logarithms(h.T, rounds).T,
    ],
    "11.3": ["A", "B", "CD", "C", "ABCDE", "", "X", 3, "CDE"],
    "11.4": [
        lambda K, E, Z, goal: 0.75,
        lambda K, E, Z, goal: goal * Z / (E * (goal - K)),
        lambda K, E, Z, goal: goal * Z / (E * K),
        lambda K, E, Z, goal: goal * (E + Z) / (K * E),
        lambda K, E, Z, goal: goal * Z / (E * K - goal),
        lambda K, E, Z, goal: (K - goal) * Z / (goal * E),
        lambda K, E, Z, goal: Z / (E * (K - goal)),
        lambda K, E, Z, goal: goal / (E * (K - goal)),
    ],
    "11.5": [
        balanced_only,
        the_case_by_hand,
        better_than_in_turn,
        each_has_its_favourite,
        lambda assign: True,
        lambda assign: False,
        lambda assign: assign.__name__ == "exact",
    ],
    "11.6": [
        ["loss_free"],
        ["quantile_balancing"],
        ["topk"],
        [],
        ["loss_free", "quantile"],
        ["loss_free", "quantile_balancing", "gshard"],
        ["hash"],
        "loss-free and quantile balancing",
        5,
    ],
    "11.7": [
        lambda R, S: R * (R - 1) / 2 * 0.25,
        lambda R, S: R * (R - 1) / 2 / S,
        lambda R, S: R**2 / 2 ** (S - 1),
        lambda R, S: R * (R - 1) / 2 / 3 ** (S - 1),
        lambda R, S: 19.5,
        lambda R, S: R * (R - 1) / 2 * (1 - 0.5 ** (S - 1)),
        lambda R, S: 2**-S,
    ],
}
