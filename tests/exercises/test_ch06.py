"""Chapter 6: right answers that differ from the checker's own, and wrong ones that it must refuse."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from moe_book.checks import ch06, check


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


def best_first_in_python(wants_T, logit_T, E, C):
    kept, free = [False] * len(wants_T), [C] * E
    for t in sorted(range(len(wants_T)), key=lambda t: -logit_T[t]):
        if free[wants_T[t]]:
            kept[t], free[wants_T[t]] = True, free[wants_T[t]] - 1
    return kept


def best_first_with_topk(wants_T, logit_T, E, C):
    kept_T = np.zeros(len(wants_T), dtype=bool)
    for e in range(E):
        queue = (wants_T == e).nonzero().flatten()
        kept_T[queue[logit_T[queue].topk(min(C, len(queue))).indices].numpy()] = True
    return kept_T


def block_slot_by_slot(x_TD, f_TKD, w_TK, kept_TK):
    y_TD = x_TD.clone()
    for t in range(len(x_TD)):
        for k in range(w_TK.shape[1]):
            if kept_TK[t, k]:
                y_TD[t] += w_TK[t, k] * f_TKD[t, k]
    return y_TD


def block_by_einsum(x_TD, f_TKD, w_TK, kept_TK):
    return x_TD + torch.einsum("tkd,tk->td", f_TKD, w_TK.masked_fill(~kept_TK, 0))


def block_by_bmm(x_TD, f_TKD, w_TK, kept_TK):
    w_T1K = torch.where(kept_TK, w_TK, 0).unsqueeze(1)
    return x_TD + torch.bmm(w_T1K, f_TKD).squeeze(1)


def dropped(load_SE, factor):
    C = math.ceil(load_SE[0].sum().item() / load_SE.shape[1] * factor)
    return ((load_SE - C).clamp(min=0).sum() / load_SE.sum()).item()


def choose_on_a_coarse_grid(load_SE):
    return min(f for f in np.arange(1, 8, 0.05) if dropped(load_SE, f) <= 0.01)


def choose_by_halving(load_SE):
    low, high = 0.5, float(load_SE.shape[1])
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (low, middle) if dropped(load_SE, middle) <= 0.01 else (middle, high)
    return torch.tensor(high)


def choose_with_a_little_air(load_SE):
    return 1.02 * choose_on_a_coarse_grid(load_SE)


def crowd_and_nobody(layer):
    x_TD = torch.tensor([[3.0, 0, 0, 1]] * 6)
    assert (layer(x_TD, 0) == 0).all()
    y_TD = layer(x_TD, 2)
    assert (y_TD != 0).any(-1).sum() == 2


def counted_for_every_capacity(layer):
    x_TD = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
    load_E = x_TD.argmax(-1).bincount(minlength=4)
    return all((layer(x_TD, C) != 0).any(-1).sum() == load_E.clamp(max=C).sum() for C in range(12))


def pull_by_autograd(w_TK, kept_TK, a_TK):
    h_TK = w_TK.log().requires_grad_()
    (h_TK.softmax(-1) * kept_TK * a_TK).sum().backward()
    return h_TK.grad


def pull_for_two_slots(w_TK, kept_TK, a_TK):
    both_T = w_TK[:, 0] * w_TK[:, 1]
    served_TK = torch.where(kept_TK, a_TK, 0.0)
    first_T = both_T * (served_TK[:, 0] - served_TK[:, 1])
    return torch.stack([first_T, -first_T], -1)


RIGHT = {
    "6.1": [(4, 12, 5, 13), [[4, 12], [5, 13]], torch.tensor([4, 12, 5, 13]), [4.0, 12, 5, 13]],
    "6.2": [
        best_first_by_counting,
        best_first_in_a_table,
        best_first_in_python,
        best_first_with_topk,
    ],
    "6.3": [block_slot_by_slot, block_by_einsum, block_by_bmm],
    "6.4": [choose_on_a_coarse_grid, choose_by_halving, choose_with_a_little_air],
    "6.5": ["EB", {"B", "E"}, ["B", "E"], "B and E", "b, e"],
    "6.6": [crowd_and_nobody, counted_for_every_capacity],
    "6.7": [pull_by_autograd, pull_for_two_slots],
    "6.8": ["FTTFTF", "f t t f t f", [False, True, True, False, True, False], list("FTTFTF")],
}


# What a class hands in, beside the ideas with a name


def topk_of_more_than_there_are(wants_T, logit_T, E, C):
    table_TE = torch.full((len(wants_T), E), -torch.inf).scatter(
        1, wants_T.unsqueeze(1), logit_T.unsqueeze(1)
    )
    kept_TE = torch.zeros(len(wants_T), E).scatter(0, table_TE.topk(C, dim=0).indices, 1.0)
    return kept_TE.gather(1, wants_T.unsqueeze(1)).squeeze(1)


def only_capacity_zero(layer):
    assert (layer(torch.randn(9, 4), 0) == 0).all()


def only_a_crowd_that_loses_someone(layer):
    y_TD = layer(torch.tensor([[3.0, 0, 0, 1]] * 6), 2)
    assert (y_TD == 0).all(-1).any()


def a_crowd_that_is_not_all_served(layer):
    y_TD = layer(torch.tensor([[3.0, 0, 0, 1]] * 6), 2)
    assert 0 < (y_TD != 0).any(-1).sum() < 6


def at_most_two(layer):
    y_TD = layer(torch.tensor([[3.0, 0, 0, 1]] * 6), 2)
    assert (y_TD != 0).any(-1).sum() <= 2 and (y_TD == 0).any()


def the_first_come_first(layer):
    x_TD = torch.tensor([[3.0 + t, 0, 0, 1] for t in range(6)])
    y_TD = layer(x_TD, 2)
    assert (y_TD[:2] != 0).any() and (y_TD[2:] == 0).all()


def rows_that_differ_from_plenty(layer):
    x_TD = torch.randn(30, 4)
    return not torch.equal(layer(x_TD, 2), layer(x_TD, 30))


REFUSED = {
    "6.1": [
        (4, 12),
        (4, 12, 5),
        (4, 12, 5, 13, 0),
        (4.5, 10.5, 5, 13),
        (5, 13, 4, 12),
        (0, 0, 0, 0),
        (4, 12, 5, 11),
        (3, 11, 5, 13),
        "4, 12, 5, 13",
        17,
        (6, 6, 6, 6),
        (4, 12, 2.5, 6.5),
    ],
    "6.2": [
        topk_of_more_than_there_are,
        lambda wants_T, logit_T, E, C: logit_T > logit_T.median(),
        lambda wants_T, logit_T, E, C: logit_T > 0,
        lambda wants_T, logit_T, E, C: torch.ones(len(wants_T)),
        lambda wants_T, logit_T, E, C: logit_T.argsort(descending=True) < C,
        lambda wants_T, logit_T, E, C: logit_T.argsort(descending=True)[:C],
        lambda wants_T, logit_T, E, C: ch06._best_first(wants_T, logit_T, E, C + 1),
        lambda wants_T, logit_T, E, C: ch06._best_first(wants_T, logit_T, E, max(C - 1, 0)),
        lambda wants_T, logit_T, E, C: ch06._best_first(wants_T, logit_T, E - 1, C),
        lambda wants_T, logit_T, E, C: F.one_hot(wants_T, E),
        lambda wants_T, logit_T, E, C: (
            ch06._place(wants_T, E)[logit_T.argsort(descending=True)] < C
        ),
        lambda wants_T, logit_T, E, C: ch06._best_first(wants_T, logit_T.softmax(0) // 0.1, E, C),
    ],
    "6.3": [
        lambda x, f, w, kept: x + (f * w.unsqueeze(-1)).sum(1) * kept.any(-1, keepdim=True),
        lambda x, f, w, kept: (x.unsqueeze(1) + f * (w * kept).unsqueeze(-1)).mean(1),
        lambda x, f, w, kept: x + (f * (w * ~kept).unsqueeze(-1)).sum(1),
        lambda x, f, w, kept: x * (w * kept).sum(-1, keepdim=True) + ch06._layer(f, w, kept),
        lambda x, f, w, kept: x * (1 - (w * kept).sum(-1, keepdim=True)) + ch06._layer(f, w, kept),
        lambda x, f, w, kept: x + f.sum(1),
        lambda x, f, w, kept: x + (f * kept.unsqueeze(-1)).mean(1),
        lambda x, f, w, kept: x + f[:, 0] * (w * kept)[:, :1],
        lambda x, f, w, kept: x,
        lambda x, f, w, kept: torch.where(kept.any(-1, keepdim=True), ch06._layer(f, w, kept), x),
    ],
    "6.4": [
        lambda load_SE: ch06._busiest(load_SE).median().item(),
        lambda load_SE: ch06._busiest(load_SE).double().quantile(0.99).item(),
        lambda load_SE: ch06._busiest(load_SE).min().item(),
        lambda load_SE: ch06._busiest(load_SE).mean().item() - 1,
        lambda load_SE: ch06._busiest(load_SE).max().item() - 1,
        lambda load_SE: 1.01,
        lambda load_SE: 1 / 0.99,
        lambda load_SE: 1.5,
        lambda load_SE: float(load_SE.max()),
        lambda load_SE: float(load_SE.shape[1]),
        lambda load_SE: ch06._busiest(load_SE[:1])[0].item(),
        lambda load_SE: (load_SE.max() / load_SE.sum()).item(),
        lambda load_SE: 1 + load_SE.double().std().item() / load_SE.double().mean().item(),
        lambda load_SE: load_SE,
        lambda load_SE: -1.0,
        lambda load_SE: "1.25",
    ],
    "6.5": ["B", "E", "A", "AB", "BC", "CE", "DE", "ABCDE", "BDE", "AC", "F", "", [], 2],
    "6.6": [
        only_capacity_zero,
        only_a_crowd_that_loses_someone,
        a_crowd_that_is_not_all_served,
        at_most_two,
        the_first_come_first,
        rows_that_differ_from_plenty,
        lambda layer: True,
        lambda layer: False,
        lambda layer: layer(torch.zeros(1, 4), 1).shape == (1, 4),
        lambda layer: layer(torch.zeros(1, 4), 0).sum() == 0,
        lambda layer: 1 / 0,
    ],
    "6.7": [
        lambda w, kept, a: torch.zeros_like(w),
        lambda w, kept, a: w * (a - (w * a).sum(-1, keepdim=True)) * kept,
        lambda w, kept, a: w * a,
        lambda w, kept, a: w * kept,
        lambda w, kept, a: a - (w * kept * a).sum(-1, keepdim=True),
        lambda w, kept, a: w * (kept * a - (kept * a).mean(-1, keepdim=True)),
        lambda w, kept, a: w * (kept * a - (w * kept * a).sum()),
        lambda w, kept, a: (w * kept * a).sum(-1),
        lambda w, kept, a: -w.prod(-1, keepdim=True) * a * kept,
    ],
    "6.8": ["FTFTFT", "TFFTFT", "TTTTTT", "FFFFFF", "FTTFT", "FTTFTT", "FTTTTF", 6, "no"],
}


def test_a_factor_that_is_refused_is_told_what_it_costs():
    load = ch06._STREAMS[0][0]
    assert "of the slots of other batches" in check("6.4", lambda load_SE: 1.3).message
    assert ch06._good_factor(ch06._choose(load), load) is True


def test_the_five_queues_of_exercise_5_are_what_the_checker_says():
    """A, C and D keep whom first come, first served keeps; B loses the last place of each queue, and E shows itself only in a long one."""

    def kept_by(name, wants_T, E, C):
        T = len(wants_T)
        one_hot_TE = F.one_hot(wants_T, E)
        if name == "A":
            return (wants_T.view(-1, 1) == wants_T).tril(-1).sum(1) < C
        if name == "B":
            return (one_hot_TE.cumsum(0) * one_hot_TE).sum(1) < C
        if name == "C":
            return (one_hot_TE.cumsum(0) * one_hot_TE).sum(1) <= C
        if name == "D":
            load_E = wants_T.bincount(minlength=E)
            order_T = wants_T.argsort(stable=True)
            start_E = load_E.cumsum(0) - load_E
            kept_T = torch.empty(T, dtype=torch.bool)
            kept_T[order_T] = torch.arange(T) - start_E[wants_T[order_T]] < C
            return kept_T
        count_TE = one_hot_TE.cumsum(0, dtype=torch.int8) - one_hot_TE
        return count_TE.gather(1, wants_T.view(-1, 1)).squeeze(1) < C

    short, long = (ch06._wants, 4, 2), (torch.arange(1200) % 4 // 2, 4, 100)
    for case in (short, long):
        right_T = ch06._first_come(*case)
        same = {name for name in "ABCDE" if torch.equal(kept_by(name, *case), right_T)}
        assert same == (set("ACDE") if case is short else set("ACD"))
