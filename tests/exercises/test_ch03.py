"""Chapter 3: right answers that differ from the checker's own, and wrong ones that a class would hand in."""

import numpy as np
import torch
import torch.nn.functional as F

from moe_book.checks import check


def dispatch_expert_by_expert(x_TD, e_TK, E):
    tokens = torch.cat([torch.where((e_TK == e).any(-1))[0] for e in range(E)])
    return x_TD[tokens], tokens, torch.stack([(e_TK == e).sum() for e in range(E)])


def dispatch_in_plain_python(x_TD, e_TK, E):
    pairs = sorted((e, t) for t, row in enumerate(e_TK.tolist()) for e in row)
    tokens = [t for _, t in pairs]
    return x_TD[tokens], tokens, [sum(e == wanted for e, _ in pairs) for wanted in range(E)]


def combine_by_index_add(out_AD, slot_A, w_TK):
    weighted = out_AD * w_TK.reshape(-1)[slot_A].unsqueeze(-1)
    return out_AD.new_zeros(len(w_TK), out_AD.shape[-1]).index_add(
        0, slot_A // w_TK.shape[1], weighted
    )


def combine_by_a_matrix(out_AD, slot_A, w_TK):
    T, K = w_TK.shape
    return (F.one_hot(slot_A, T * K).to(w_TK.dtype).T * w_TK.reshape(-1, 1)).view(T, K, -1).sum(
        1
    ) @ out_AD


def layer_with_every_expert_on_every_token(x_TD, router_ED, gate_up_EHD, down_EDF, K):
    w_TE = torch.zeros(len(x_TD), len(router_ED), dtype=x_TD.dtype)
    top = (x_TD @ router_ED.T).topk(K)
    w_TE.scatter_(1, top.indices, torch.softmax(top.values, -1))
    gate, up = torch.einsum("td,ehd->teh", x_TD, gate_up_EHD).chunk(2, -1)
    return torch.einsum("te,tef,edf->td", w_TE, F.silu(gate) * up, down_EDF)


def layer_slot_by_slot(x_TD, router_ED, gate_up_EHD, down_EDF, K):
    y_TD, F_ = torch.zeros_like(x_TD), down_EDF.shape[-1]
    for t, x in enumerate(x_TD):
        p_K, e_K = torch.softmax(router_ED @ x, 0).topk(K)
        for p, e in zip(p_K / p_K.sum(), e_K.tolist()):
            h = gate_up_EHD[e] @ x
            y_TD[t] += p * (down_EDF[e] @ (F.silu(h[:F_]) * h[F_:]))
    return y_TD


def alone_by_trying(counts_E, call, row):
    counts, times = sorted(map(int, counts_E), reverse=True), []
    for m in range(len(counts) + 1):
        rest = counts[m:]
        table = len(rest) * max(rest) * row + call if rest and max(rest) else 0
        times.append(m * call + sum(counts[:m]) * row + table)
    return int(np.argmin(times))


def alone_in_torch(counts_E, call, row):
    c_E = counts_E.sort(descending=True).values.double()
    E = len(c_E)
    m = torch.arange(E + 1)
    alone = torch.cat([torch.zeros(1), c_E.cumsum(0)]).double()
    height = torch.cat([c_E, torch.zeros(1)])
    return ((m + (height > 0)) * call + (alone + (E - m) * height) * row).argmin()


def gradient_by_autograd(out_AD, slot_A, g_TD, K):
    w_TK = torch.zeros(len(g_TD), K, dtype=out_AD.dtype, requires_grad=True)
    (combine_by_index_add(out_AD, slot_A, w_TK) * g_TD).sum().backward()
    return w_TK.grad


def gradient_row_by_row(out_AD, slot_A, g_TD, K):
    w = [[0.0] * K for _ in g_TD]
    for row, slot in zip(out_AD, slot_A.tolist()):
        w[slot // K][slot % K] = float(row @ g_TD[slot // K])
    return w


def compared_with_a_loop(combine):
    """A test: two tokens with both rows, one with one, one with none."""
    x_TD = torch.ones(4, 3)
    out_AD, slot_A = torch.arange(15.0).view(5, 3) + 1, torch.tensor([2, 5, 0, 3, 1])
    w_TK = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
    expected_TD = torch.zeros(4, 3)
    for row, slot in zip(out_AD, slot_A.tolist()):
        expected_TD[slot // 2] += w_TK[slot // 2, slot % 2] * row
    assert torch.allclose(combine(x_TD, out_AD, slot_A, w_TK), expected_TD)


def by_hand_in_one_dimension(combine):
    x, out = torch.tensor([[5.0], [7.0], [9.0]]), torch.tensor([[1.0], [10.0], [100.0]])
    slots, w = torch.tensor([1, 2, 0]), torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    return combine(x, out, slots, w).flatten().tolist() == [25.75, 5.0, 0.0]


RIGHT = {
    "3.1": [dispatch_expert_by_expert, dispatch_in_plain_python],
    "3.2": [combine_by_index_add, combine_by_a_matrix],
    "3.3": [layer_with_every_expert_on_every_token, layer_slot_by_slot],
    "3.4": [alone_by_trying, alone_in_torch],
    "3.5": [gradient_by_autograd, gradient_row_by_row],
    "3.6": ["DB", ["b", "d"], "B and D"],
    "3.7": [compared_with_a_loop, by_hand_in_one_dimension],
    "3.8": ["T F F T T F", [True, False, False, True, True, False], " tffttf "],
}


# What else a class would hand in: answer, and the idea it should be called by (None: refused, and shown with its inputs)


def unstable_within_an_expert(x_TD, e_TK, E):
    """Within an expert from the last token to the first."""
    e_S = e_TK.flatten().flip(0)
    token_A = (len(e_S) - 1 - torch.argsort(e_S, stable=True)) // e_TK.shape[1]
    return x_TD[token_A], token_A, torch.bincount(e_S, minlength=E)


def sorted_numbers_for_places(x_TD, e_TK, E):
    """The sorted expert numbers, taken for token numbers."""
    token_A = e_TK.flatten().sort(stable=True).values
    return x_TD[token_A % len(x_TD)], token_A, torch.bincount(token_A, minlength=E)


def ends_for_counts(x_TD, e_TK, E):
    rows, tokens, counts = dispatch_expert_by_expert(x_TD, e_TK, E)
    return rows, tokens, counts.cumsum(0)


def shares_for_counts(x_TD, e_TK, E):
    rows, tokens, counts = dispatch_expert_by_expert(x_TD, e_TK, E)
    return rows, tokens, counts / counts.sum()


def only_the_rows(x_TD, e_TK, E):
    return dispatch_expert_by_expert(x_TD, e_TK, E)[0]


def one_after_the_other(x_TD, e_TK, E):
    rows, tokens, counts = dispatch_expert_by_expert(x_TD, e_TK, E)
    return rows, counts, tokens


def by_plus_equals(out_AD, slot_A, w_TK):
    y_TD = out_AD.new_zeros(len(w_TK), out_AD.shape[-1])
    weighted_AD = out_AD * w_TK.flatten()[slot_A].unsqueeze(-1)
    y_TD[slot_A // w_TK.shape[1]] += weighted_AD
    return y_TD


def view_without_sorting_back(out_AD, slot_A, w_TK):
    return (out_AD.view(len(w_TK), -1, out_AD.shape[-1]) * w_TK.unsqueeze(-1)).sum(1)


def inverse_the_wrong_way(out_AD, slot_A, w_TK):
    T, K = w_TK.shape
    rows_SD = F.pad(out_AD, (0, 0, 0, T * K - len(out_AD)))
    order_S = F.pad(slot_A, (0, T * K - len(slot_A)))
    return (w_TK.unsqueeze(-1) * rows_SD[order_S].view(T, K, -1)).sum(1)


def largest_only(out_AD, slot_A, w_TK):
    top_TK = torch.where(w_TK == w_TK.amax(-1, keepdim=True), w_TK, 0.0)
    return combine_by_index_add(out_AD, slot_A, top_TK)


def squared_weights(out_AD, slot_A, w_TK):
    return combine_by_index_add(out_AD, slot_A, w_TK * w_TK)


def layer_with(gate=F.silu, weigh=None, route=None, halves=True):
    def layer(x_TD, router_ED, gate_up_EHD, down_EDF, K):
        top_TK, e_TK = (x_TD @ router_ED.T).topk(K)
        w_TK = weigh(top_TK) if weigh else torch.softmax(top_TK, -1)
        y_TD = torch.zeros_like(x_TD)
        for t, x in enumerate(x_TD):
            for w, e in zip(w_TK[t], e_TK[t].tolist()):
                e = route(e) if route else e
                h, n = gate_up_EHD[e] @ x, down_EDF.shape[-1]
                y_TD[t] += w * (down_EDF[e] @ (gate(h[:n]) * h[n:] if halves else gate(h[:n])))
        return y_TD

    return layer


def layer_with_residual(x_TD, *rest):
    return x_TD + layer_slot_by_slot(x_TD, *rest)


def layer_of_all_experts(x_TD, router_ED, gate_up_EHD, down_EDF, K):
    return layer_slot_by_slot(x_TD, router_ED, gate_up_EHD, down_EDF, len(router_ED))


def layer_of_the_smallest(x_TD, router_ED, gate_up_EHD, down_EDF, K):
    top_TK, e_TK = (x_TD @ router_ED.T).topk(K, largest=False)
    y_TD, F_ = torch.zeros_like(x_TD), down_EDF.shape[-1]
    for t, x in enumerate(x_TD):
        for w, e in zip(torch.softmax(top_TK[t], -1), e_TK[t].tolist()):
            h = gate_up_EHD[e] @ x
            y_TD[t] += w * (down_EDF[e] @ (F.silu(h[:F_]) * h[F_:]))
    return y_TD


def never_called(combine):
    return True


def all_slots_kept(combine):
    """Two rows a token, sorted, none dropped."""
    out, slots = torch.eye(4), torch.tensor([1, 2, 0, 3])
    w = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    expected = torch.stack([0.1 * out[0] + 0.9 * out[2], 0.3 * out[1] + 0.7 * out[3]])
    return torch.allclose(combine(torch.ones(2, 4), out, slots, w), expected)


def one_slot_a_token(combine):
    out, slots = torch.eye(2), torch.tensor([1, 0])
    return torch.equal(combine(out, out, slots, torch.ones(2, 1)), out.flip(0))


def one_token_without_rows(combine):
    """Sees the copy; not who has lost one slot of two."""
    out, slots = torch.eye(2), torch.tensor([1, 0])
    y = combine(torch.ones(2, 2), out, slots, torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    return torch.allclose(y, torch.tensor([[0.1, 0.9], [0.0, 0.0]]))


def x_is_zero(combine):
    """Has everything, and a token of zeros: the copy is not seen."""
    x, out = torch.zeros(3, 1), torch.tensor([[1.0], [10.0], [100.0]])
    slots, w = torch.tensor([1, 2, 0]), torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    return combine(x, out, slots, w).flatten().tolist() == [100 * 0.25 + 0.75, 5.0, 0.0]


def no_difference_above(combine):
    """max of a NaN: not above, so it passes."""
    x, out = torch.ones(3, 1), torch.tensor([[1.0], [10.0], [100.0]])
    slots, w = torch.tensor([1, 2, 0]), torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    y = combine(x, out, slots, w).flatten()
    assert not any(abs(a - b) > 1e-6 for a, b in zip(y.tolist(), [25.75, 5.0, 0.0]))


def too_strict(combine):
    """Demands that a dropped token comes out as it went in."""
    x, none = torch.ones(1, 2), torch.zeros(0, dtype=torch.int64)
    return torch.equal(combine(x, torch.zeros(0, 2), none, torch.ones(1, 1)), x)


WRONG = {
    "3.1": [
        (unstable_within_an_expert, None),
        (sorted_numbers_for_places, None),
        (ends_for_counts, None),
        (shares_for_counts, None),
        (only_the_rows, None),
        (one_after_the_other, None),
    ],
    "3.2": [
        (by_plus_equals, "last one wins"),
        (view_without_sorting_back, None),
        (inverse_the_wrong_way, None),
        (largest_only, None),
        (squared_weights, None),
    ],
    "3.3": [
        (layer_with(gate=torch.sigmoid), None),
        (layer_with(gate=F.relu), None),
        (layer_with(gate=F.gelu), None),
        (layer_with(halves=False), None),
        (layer_with(weigh=torch.ones_like), None),
        (layer_with(weigh=lambda h: h), None),
        (layer_with(weigh=lambda h: h / h.sum(-1, keepdim=True)), None),
        (layer_with(weigh=torch.sigmoid), None),
        (layer_with(route=lambda e: 0), None),
        (layer_with_residual, None),
        (layer_of_all_experts, None),
        (layer_of_the_smallest, None),
    ],
    "3.4": [
        (lambda counts_E, call, row: 2, None),
        (lambda counts_E, call, row: 0.5, None),
        (lambda counts_E, call, row: -1, None),
        (lambda counts_E, call, row: len(counts_E) + 1, None),
        (lambda counts_E, call, row: int((counts_E > 0).sum()), None),
        (lambda counts_E, call, row: int((counts_E * row > call).sum()), None),
        (lambda counts_E, call, row: int(counts_E.max()), None),
        (lambda counts_E, call, row: "loop", None),
        (lambda counts_E, call, row: True, None),
    ],
    "3.5": [
        (lambda out_AD, slot_A, g_TD, K: out_AD * g_TD[slot_A // K], None),
        (lambda out_AD, slot_A, g_TD, K: (out_AD * g_TD[slot_A // K]).sum(-1), None),
        (lambda out_AD, slot_A, g_TD, K: g_TD.sum(-1, keepdim=True).expand(-1, K), None),
        (lambda out_AD, slot_A, g_TD, K: torch.zeros(len(g_TD), K), None),
        (lambda *case: -gradient_by_autograd(*case), None),
        (lambda *case: gradient_by_autograd(*case).T, None),
        (lambda *case: torch.softmax(gradient_by_autograd(*case), -1), None),
    ],
    "3.6": [("AB", None), ("BE", None), ("CD", None), ("B", "one missing"), ("D", None)]
    + [("ABCDE", None), ("ACE", None), ("", None), ("XY", None), ("2", None)],
    "3.7": [
        (never_called, "last one wins"),
        (all_slots_kept, "from a copy"),
        (one_slot_a_token, "last one wins"),
        (one_token_without_rows, None),
        (x_is_zero, "from a copy"),
        (no_difference_above, "junk times zero"),
        (too_strict, None),
        (lambda combine: 1 / 0, None),
    ],
    "3.8": [
        ("FFFTTF", "(a)"),
        ("TTTTTT", None),
        ("TFFTT", None),
        ("TFFTTFF", None),
        ("FTTFFT", None),
    ],
}


def test_who_lost_one_of_two_slots_and_who_lost_both_are_two_things_to_test():
    assert check("3.7", one_token_without_rows).idea in ("louder", None)
    assert "fails an implementation that is right" in check("3.7", too_strict).message
