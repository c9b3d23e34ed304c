"""Chapter 6: right answers that differ from the checker's own."""

from fractions import Fraction

import torch


def places_by_negating_the_floor(T, K, E, factor):
    return -int(-(T * K * factor) // E)


def places_in_fractions(T, K, E, factor):
    exact = Fraction(T * K, E) * Fraction(str(factor))
    return torch.tensor(-(-exact.numerator // exact.denominator))


def first_come_in_a_loop(wants_T, E, C):
    served, kept = [0] * E, []
    for e in wants_T.tolist():
        kept.append(served[e] < C)
        served[e] += 1
    return kept


def first_come_by_comparing_all(wants_T, E, C):
    same_TT = (wants_T.unsqueeze(0) == wants_T.unsqueeze(1)).tril(-1)
    return same_TT.sum(1) < C


def best_first_by_counting(wants_T, logit_T, E, C):
    better_TT = (wants_T.unsqueeze(0) == wants_T.unsqueeze(1)) & (
        logit_T.unsqueeze(0) > logit_T.unsqueeze(1)
    )
    return better_TT.sum(1) < C


def best_first_in_a_table(wants_T, logit_T, E, C):
    table_TE = torch.full((len(wants_T), E), -torch.inf).scatter(
        1, wants_T.unsqueeze(1), logit_T.unsqueeze(1)
    )
    rank_TE = table_TE.argsort(0, descending=True).argsort(0)
    return (rank_TE.gather(1, wants_T.unsqueeze(1)).squeeze(1) < C).int()


def block_slot_by_slot(x_TD, f_TKD, w_TK, kept_TK):
    y_TD = x_TD.clone()
    for t in range(len(x_TD)):
        for k in range(w_TK.shape[1]):
            if kept_TK[t, k]:
                y_TD[t] += w_TK[t, k] * f_TKD[t, k]
    return y_TD


def block_by_einsum(x_TD, f_TKD, w_TK, kept_TK):
    return x_TD + torch.einsum("tkd,tk->td", f_TKD, w_TK.masked_fill(~kept_TK, 0))


RIGHT = {
    "6.1": [places_by_negating_the_floor, places_in_fractions],
    "6.2": [first_come_in_a_loop, first_come_by_comparing_all],
    "6.3": [best_first_by_counting, best_first_in_a_table],
    "6.4": [
        lambda load_E: (load_E / load_E.float().mean()).max(),
        lambda load_E: float(max(load_E)) / (sum(load_E.tolist()) / len(load_E)),
    ],
    "6.5": [block_slot_by_slot, block_by_einsum],
    "6.6": ["FTFTFT", "ftftft "],
}
