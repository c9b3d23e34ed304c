"""Chapter 3: experts, dispatch and combine."""

import torch
import torch.nn.functional as F

from .exercise import Exercise, Idea, statements, which, write_test

_generator = torch.Generator().manual_seed(3)


def _randn(*shape):
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


# 3.1: to the experts
_e6 = torch.tensor(
    [[2, 0], [0, 2], [2, 3], [0, 3], [3, 2], [2, 0]]
)  # expert 1 has no token, expert 4 neither
_e4 = torch.tensor([[1, 2, 0], [3, 1, 2], [2, 0, 1], [1, 3, 2]])
_DISPATCH = ((_randn(6, 3), _e6, 5), (_randn(4, 2), _e4, 4))


def _dispatch(
    token_of=lambda slot, T, K: slot // K,
    order=lambda e: torch.argsort(e, stable=True),
    count=lambda e, E: torch.bincount(e, minlength=E),
):
    def dispatch(x_TD, e_TK, E):
        e_S = e_TK.flatten()
        token_A = token_of(order(e_S), *e_TK.shape)
        return x_TD[token_A], token_A, count(e_S, E)

    return dispatch


def _slots_for_tokens(x_TD, e_TK, E):
    slot_A = torch.argsort(e_TK.flatten(), stable=True)
    return x_TD[slot_A // e_TK.shape[1]], slot_A, torch.bincount(e_TK.flatten(), minlength=E)


def _dispatch_by_columns(x_TD, e_TK, E):
    e_S = e_TK.T.flatten()
    token_A = torch.argsort(e_S, stable=True) % len(x_TD)
    return x_TD[token_A], token_A, torch.bincount(e_S, minlength=E)


# 3.2: and back
_slots = torch.argsort(_e6.flatten(), stable=True)
_w6, _w4 = torch.softmax(_randn(6, 2), -1), torch.softmax(_randn(4, 3), -1)
_some = torch.argsort(_e4.flatten(), stable=True)[
    [0, 2, 3, 5, 6, 8, 9, 11]
]  # four slots were dropped
_COMBINE = ((_randn(12, 3), _slots, _w6), (_randn(8, 2), _some, _w4))


def _combine(out_AD, slot_A, w_TK):
    T, K = w_TK.shape
    all_SD = out_AD.new_zeros(T * K, out_AD.shape[-1]).index_copy(0, slot_A, out_AD)
    return (w_TK.unsqueeze(-1) * all_SD.view(T, K, -1)).sum(1)


def _unweighted(out_AD, slot_A, w_TK):
    return _combine(out_AD, slot_A, torch.ones_like(w_TK))


def _weights_not_sorted(out_AD, slot_A, w_TK):
    y_TD = out_AD.new_zeros(len(w_TK), out_AD.shape[-1])
    return y_TD.index_add(
        0, slot_A // w_TK.shape[1], out_AD * w_TK.flatten()[: len(out_AD)].unsqueeze(-1)
    )


def _last_wins(out_AD, slot_A, w_TK):
    y_TD = out_AD.new_zeros(len(w_TK), out_AD.shape[-1])
    for row, slot in zip(out_AD, slot_A.tolist()):
        y_TD[slot // w_TK.shape[1]] = w_TK.flatten()[slot] * row
    return y_TD


def _divided_by_k(out_AD, slot_A, w_TK):
    return _combine(out_AD, slot_A, w_TK) / w_TK.shape[1]


def _token_by_remainder(out_AD, slot_A, w_TK):
    weighted_AD = out_AD * w_TK.flatten()[slot_A].unsqueeze(-1)
    y_TD = out_AD.new_zeros(len(w_TK), out_AD.shape[-1])
    return y_TD.index_add(0, slot_A % len(w_TK), weighted_AD)


def _unsorted_rows(out_AD, slot_A, w_TK):
    """Takes row i for slot i: nothing is sorted back."""
    return _combine(out_AD, torch.arange(len(out_AD)), w_TK)


def _weighted_at_the_token(out_AD, slot_A, w_TK):
    """Divides by the kept weights: a token with a dropped slot is scaled up."""
    kept = torch.zeros_like(w_TK).flatten().index_fill(0, slot_A, 1.0).view_as(w_TK)
    return _combine(out_AD, slot_A, w_TK) / (w_TK * kept).sum(-1, keepdim=True).clamp(min=1e-12)


# 3.3: the whole layer
_LAYER = (
    (_randn(7, 4), _randn(5, 4), _randn(5, 12, 4), _randn(5, 4, 6), 2),
    (_randn(3, 2), _randn(4, 2), _randn(4, 4, 2), _randn(4, 2, 2), 3),
)


def _halves(h):
    return h.chunk(2, -1)


def _layer(*, weigh=lambda h, top: torch.softmax(top, -1), split=_halves, before=False):
    def layer(x_TD, router_ED, gate_up_EHD, down_EDF, K):
        h_TE = x_TD @ router_ED.T
        top_TK, e_TK = h_TE.topk(K)
        w_TK = weigh(h_TE, top_TK)
        y_TD = torch.zeros_like(x_TD)
        for e in range(len(router_ED)):
            t, k = torch.where(e_TK == e)
            w_n1 = w_TK[t, k].unsqueeze(-1)
            gate, up = split((x_TD[t] * w_n1 if before else x_TD[t]) @ gate_up_EHD[e].T)
            out = (F.silu(gate) * up) @ down_EDF[e].T
            y_TD = y_TD.index_add(0, t, out if before else w_n1 * out)
        return y_TD

    return layer


# 3.4: some experts alone, the others in a table
_MIXED = (
    (torch.tensor([40, 2, 3, 2, 1, 3, 2, 3]), 10.0, 1.0),
    (torch.tensor([2, 9, 2, 7, 2, 2, 1, 2]), 1.5, 1.0),
    (torch.tensor([6, 6, 6, 6]), 5.0, 1.0),
    (torch.tensor([0, 30, 0, 12, 0, 5]), 0.5, 1.0),
    (torch.tensor([1, 0, 2, 64, 1, 32, 2, 2, 16, 1, 1, 0]), 20.0, 0.5),
)


def _mixed_time(m, counts_E, call, row):
    """Microseconds with the m busiest experts alone and the others in one table."""
    c_E = sorted(counts_E.tolist(), reverse=True)
    alone, table = c_E[:m], c_E[m:]
    height = max(table, default=0)
    return call * (m + (height > 0)) + row * (sum(alone) + len(table) * height)


def _alone(counts_E, call, row):
    return min(range(len(counts_E) + 1), key=lambda m: _mixed_time(m, counts_E, call, row))


def _alone_accepts(m, counts_E, call, row):
    E = len(counts_E)
    if isinstance(m, torch.Tensor):
        m = m.item()
    if isinstance(m, bool) or int(m) != m or not 0 <= m <= E:
        return f"The number of experts that run alone is a whole number from 0 to {E}."
    mine = _mixed_time(int(m), counts_E, call, row)
    best = _mixed_time(_alone(counts_E, call, row), counts_E, call, row)
    if mine <= best + 1e-9:
        return True
    return f"With {int(m)} of {E} experts alone the bank takes {mine:g} microseconds, and {best:g} are possible."


def _above_the_mean(counts_E, call, row):
    return int((counts_E > counts_E.double().mean()).sum())


def _all_or_nothing(counts_E, call, row):
    return min((0, len(counts_E)), key=lambda m: _mixed_time(m, counts_E, call, row))


def _free_calls(counts_E, call, row):
    return _alone(counts_E, 0.0, row)


def _free_padding(counts_E, call, row):
    """Takes the rows of the table to be those that are real: then every call alone is a loss."""
    return 0


# 3.5: the gradient of the weights
_G6, _G4 = _randn(6, 3), _randn(4, 2)
_WEIGHT_GRADIENT = ((_COMBINE[0][0], _slots, _G6, 2), (_COMBINE[1][0], _some, _G4, 3))


def _weight_gradient(out_AD, slot_A, g_TD, K):
    dots_A = (out_AD * g_TD[slot_A // K]).sum(-1)
    return dots_A.new_zeros(len(g_TD) * K).index_copy(0, slot_A, dots_A).view(-1, K)


def _gradient_in_row_order(out_AD, slot_A, g_TD, K):
    dots_A = (out_AD * g_TD[slot_A // K]).sum(-1)
    return F.pad(dots_A, (0, len(g_TD) * K - len(dots_A))).view(-1, K)


def _gradient_of_a_stranger(out_AD, slot_A, g_TD, K):
    g_AD = g_TD.repeat_interleave(K, 0)[: len(out_AD)]
    dots_A = (out_AD * g_AD).sum(-1)
    return dots_A.new_zeros(len(g_TD) * K).index_copy(0, slot_A, dots_A).view(-1, K)


def _gradient_without_g(out_AD, slot_A, g_TD, K):
    return _weight_gradient(out_AD, slot_A, torch.ones_like(g_TD), K)


def _gradient_mean(out_AD, slot_A, g_TD, K):
    return _weight_gradient(out_AD, slot_A, g_TD, K) / out_AD.shape[-1]


def _gradient_softmaxed(out_AD, slot_A, g_TD, K):
    w_TK = _weight_gradient(out_AD, slot_A, g_TD, K)
    return w_TK - w_TK.mean(-1, keepdim=True)


# 3.7: combine, as a test meets it
def _by_index_add(x_TD, out_AD, slot_A, w_TK):
    w_A1 = w_TK.flatten()[slot_A].unsqueeze(-1)
    return torch.zeros_like(x_TD).index_add(0, slot_A // w_TK.shape[1], w_A1 * out_AD)


def _by_table(x_TD, out_AD, slot_A, w_TK):
    return _combine(out_AD, slot_A, w_TK)


def _by_loop(x_TD, out_AD, slot_A, w_TK):
    y_TD = torch.zeros_like(x_TD)
    for row, slot in zip(out_AD, slot_A.tolist()):
        t, k = divmod(slot, w_TK.shape[1])
        y_TD[t] = y_TD[t] + w_TK[t, k] * row
    return y_TD


def _from_a_copy(x_TD, out_AD, slot_A, w_TK):
    """Tokens that no expert took come out as they went in."""
    y_TD = _combine(out_AD, slot_A, w_TK)
    taken_T = torch.zeros(len(x_TD), dtype=torch.bool).index_fill(0, slot_A // w_TK.shape[1], True)
    return torch.where(taken_T.unsqueeze(-1), y_TD, x_TD)


def _louder(x_TD, out_AD, slot_A, w_TK):
    return _weighted_at_the_token(out_AD, slot_A, w_TK)


def _keeps_one(x_TD, out_AD, slot_A, w_TK):
    return _last_wins(out_AD, slot_A, w_TK)


def _weights_by_row(x_TD, out_AD, slot_A, w_TK):
    return _weights_not_sorted(out_AD, slot_A, w_TK)


def _masked_junk(x_TD, out_AD, slot_A, w_TK):
    """Slots without a row read memory that nobody wrote, times a weight of 0."""
    T, K = w_TK.shape
    table_SD = out_AD.new_full((T * K, out_AD.shape[-1]), torch.nan)
    table_SD = table_SD.index_copy(0, slot_A, out_AD)
    kept_S = torch.zeros(T * K, dtype=w_TK.dtype).index_fill(0, slot_A, 1.0)
    return ((w_TK.flatten() * kept_S).unsqueeze(-1) * table_SD).view(T, K, -1).sum(1)


EXERCISES = (
    Exercise(
        "3.1",
        right=_dispatch(),
        cases=_DISPATCH,
        praise="One stable sort, one gather, one count: this is all of dispatch.",
        ideas=(
            Idea(
                "not sorted",
                _dispatch(order=lambda e: torch.arange(len(e))),
                "Your rows stand in the order of the batch. Then the rows of "
                "an expert do not stand together, and no expert can take its own in one piece. Sort the slots by expert. Reread section 3.2.",
            ),
            Idea(
                "remainder",
                _dispatch(token_of=lambda slot, T, K: slot % T),
                "You took the remainder of the slot by T. Flattening (T, K) puts "
                "the K slots of a token side by side, so slot s belongs to token s // K. Reread section 3.2.",
            ),
            Idea(
                "slots as tokens",
                _dispatch(token_of=lambda slot, T, K: slot % K),
                "You took the remainder of the slot by K: that is which of "
                "the token's slots it is, and not which token. The token is s // K. Reread section 3.2.",
            ),
            Idea(
                "empty experts left out",
                _dispatch(count=lambda e, E: torch.unique(e, return_counts=True)[1]),
                "You counted only the experts "
                "that somebody chose. Behind the first empty one, all later experts would get the rows of a neighbour. Count all E, with zeros. "
                "Reread section 3.5.",
            ),
            Idea(
                "first choices only",
                lambda x_TD, e_TK, E: _dispatch()(x_TD, e_TK[:, :1], E),
                "You dispatched each token to its first expert only. A token goes to all K of its experts, so there are T * K rows. "
                "Reread section 3.1.",
            ),
            Idea(
                "slots in place of tokens",
                _slots_for_tokens,
                "The second thing you return is the slot of each row. Asked is its token, slot // K. Reread section 3.2.",
            ),
            Idea(
                "the last expert is missing",
                _dispatch(count=lambda e, E: torch.bincount(e)),
                "bincount stops at the largest expert that somebody chose, so an idle last expert is missing from your counts. "
                "Give it minlength=E. Reread section 3.2.",
            ),
            Idea(
                "column by column",
                _dispatch_by_columns,
                "Within an expert your rows stand by choice: first all first choices, then all second ones. Asked is the order of the batch, by "
                "token. Flatten e_TK as it lies, token by token. Reread section 3.2.",
            ),
            Idea(
                "largest expert first",
                _dispatch(order=lambda e: torch.argsort(e, descending=True, stable=True)),
                "Your rows stand the other way round, the last expert first. The counts go from expert 0 on, so the slices "
                "would not fit. Reread section 3.2.",
            ),
        ),
    ),
    Exercise(
        "3.2",
        right=_combine,
        cases=_COMBINE,
        differentiable="w_TK",
        praise="Each row went back to its token with its own weight, and a slot without a row added nothing at all.",
        ideas=(
            Idea(
                "no weights",
                _unweighted,
                "You added the rows up without their weights. The output of each expert is multiplied by the weight of "
                "its slot; without it no gradient reaches the router. Reread section 3.3.",
            ),
            Idea(
                "weights not sorted",
                _weights_not_sorted,
                "You multiplied row i by weight i. The rows are sorted by expert, the weights are not: "
                "row i belongs to slot slot_A[i]. Every weight went to a stranger. Reread section 3.3.",
            ),
            Idea(
                "last one wins",
                _last_wins,
                "You wrote each row over the last one of the same token. A token has K rows, and they are added up. "
                "With an index on the left, y[t] = ... keeps one of them; use a sum. Reread section 3.3.",
            ),
            Idea(
                "renormalised over the kept",
                _weighted_at_the_token,
                "You divided by the weights of the slots that were kept. Then a dropped slot "
                "makes the others louder. Combine does not know about that: a slot without a row adds 0, no more. Reread section 3.6.",
            ),
            Idea(
                "row i is slot i",
                _unsorted_rows,
                "You took row i for slot i. The rows are sorted by expert; slot_A says which slot each of them is. Nothing of your output went "
                "to the right token but by chance. Reread section 3.3.",
            ),
            Idea(
                "remainder",
                _token_by_remainder,
                "You took the remainder of the slot by T for the token. Slot s belongs to token s // K. Reread section 3.2.",
            ),
            Idea(
                "mean over K",
                _divided_by_k,
                "Your output is K times too small: you took a mean over the slots. The weights are the mean already; their products are added "
                "up. Reread section 3.3.",
            ),
        ),
    ),
    Exercise(
        "3.3",
        right=_layer(),
        cases=_LAYER,
        differentiable="router_ED",
        praise="Router, dispatch, experts, combine: that is a whole MoE layer, and you wrote it.",
        ideas=(
            Idea(
                "not renormalised",
                _layer(weigh=lambda h, top: torch.softmax(h, -1).topk(top.shape[-1]).values),
                "Your weights are the "
                "probabilities over all experts. Here the K weights must sum to 1: divide by their sum, or take the softmax of the K logits. "
                "Reread section 2.2.",
            ),
            Idea(
                "gate and up swapped",
                _layer(split=lambda h: _halves(h)[::-1]),
                "You let the second half through the silu. The layout is "
                "[gate; up]: the first F rows are the gate. Reread section 3.4.",
            ),
            Idea(
                "interleaved",
                _layer(split=lambda h: (h[..., ::2], h[..., 1::2])),
                "You took every second number for the gate. Some models do "
                "lie so in memory; here the first F numbers are the gate and the next F the up path. Reread section 3.4.",
            ),
            Idea(
                "weights on the input",
                _layer(before=True),
                "You multiplied the token by its weight before the expert. An expert is not linear, "
                "so f(w x) is not w f(x). Multiply what comes out. Reread section 3.9.",
            ),
            Idea(
                "equal weights",
                _layer(weigh=lambda h, top: torch.full_like(top, 1 / top.shape[-1])),
                "All your weights are 1 / K. Then the "
                "output does not depend on the router's numbers, and the router learns nothing. Reread section 2.7.",
            ),
        ),
    ),
    Exercise(
        "3.4",
        right=_alone,
        cases=_MIXED,
        accepts=_alone_accepts,
        praise="A call buys the right to be as high as one likes. It pays for an expert that would otherwise set the height for all.",
        ideas=(
            Idea(
                "always the table",
                _free_padding,
                "You put every expert into the table, always. One busy expert then sets the height for all of them, and "
                "the padding is multiplied like any row. Write the time for each m and compare. Reread section 3.5.",
            ),
            Idea(
                "always the loop",
                lambda counts_E, call, row: len(counts_E),
                "You run every expert alone, always. That wastes no row and pays a call for each expert, also for those with hardly "
                "a row. Write the time for each m and compare. Reread section 3.5.",
            ),
            Idea(
                "all or nothing",
                _all_or_nothing,
                "You chose between the loop and the table, the better of the two in each case. Something between them can be faster "
                "than both: the busiest experts alone, the rest in a low table.",
            ),
            Idea(
                "busier than the mean",
                _above_the_mean,
                "You run alone whoever has more than the mean. Whether that pays depends on what a call costs and what a row costs: "
                "both are given. Write the time for each m and compare.",
            ),
            Idea(
                "calls for nothing",
                _free_calls,
                "Your choice is the best one where a call costs nothing. Each expert that runs alone costs a call of its own, and the table one more.",
            ),
            Idea(
                "busiest alone",
                lambda counts_E, call, row: 1,
                "You run the one busiest expert alone, always. Sometimes two or three are busy, and sometimes none. Write the time for "
                "each m and compare.",
            ),
        ),
    ),
    Exercise(
        "3.5",
        right=_weight_gradient,
        cases=_WEIGHT_GRADIENT,
        praise="A weight is pulled up where the expert's output points along the gradient's way, and a slot without a row is not pulled at "
        "all. This dot product is all a router ever hears from the loss.",
        ideas=(
            Idea(
                "rows are not sorted back",
                _gradient_in_row_order,
                "Your dot products are right and stand in the order of the rows. The gradient has the shape of the weights: row a "
                "belongs at slot slot_A[a]. Reread section 3.3.",
            ),
            Idea(
                "a stranger's gradient",
                _gradient_of_a_stranger,
                "You paired row i with the gradient of slot i. Row i is slot slot_A[i], so its token is slot_A[i] // K. Reread section 3.2.",
            ),
            Idea(
                "without g",
                _gradient_without_g,
                "You added up each expert's output. That would be the gradient of the sum of all outputs; the loss says with g_TD how "
                "much each of them counts. Use the chain rule: dL/dw = dL/dy times dy/dw.",
            ),
            Idea(
                "mean over D",
                _gradient_mean,
                "You took the mean over the D numbers. The weight multiplies each of them, so their contributions are added up.",
            ),
            Idea(
                "through the softmax",
                _gradient_softmaxed,
                "You took the mean of each token off, as a softmax would. Asked is the gradient of the weights themselves, before it goes "
                "back through the router.",
            ),
        ),
    ),
    which(
        "3.6",
        options="ABCDE",
        right="BD",
        says={
            "A": "A is right. Let it add up two rows of one token: index_add takes every row, also those of the same token. (Its order is "
            "not fixed on a GPU, which is another question.) Reread section 3.8.",
            "C": "C is right: a matrix with the weight of row a at its token is the combine of section 3.3. It costs more, and gives the same.",
            "E": "E is right. A slot has at most one row, so nothing is overwritten when rows go to slots, and the table starts with zeros.",
        },
        praise="B keeps one row for each token: with an index on the left, += does not add up what has the same index. D reads memory that "
        "nobody wrote, wherever a slot has no row. Both pass a test in which every token has one slot and none is dropped.",
    ),
    write_test(
        "3.7",
        good=(_by_index_add, _by_table, _by_loop),
        broken={
            "last one wins": (
                _keeps_one,
                "One implementation got through that keeps only the last row of a token. A test sees it if a token has two rows, with "
                "weights that are not 0. Reread section 3.2.",
            ),
            "weights by row": (
                _weights_by_row,
                "One implementation got through that gives row i the weight i. A test sees it if the rows' slots are not 0, 1, 2, ... and "
                "the weights differ. Reread section 3.3.",
            ),
            "from a copy": (
                _from_a_copy,
                "One implementation got through that starts its output from a copy of x: a token that no expert took comes out as it went in. "
                "A test sees it if a token has no row at all and its x is not 0. Reread section 3.6.",
            ),
            "louder": (
                _louder,
                "One implementation got through that divides by the weights that were kept. A test sees it if a token has lost one of two slots. "
                "Reread section 3.6.",
            ),
            "junk times zero": (
                _masked_junk,
                "One implementation got through that reads rows nobody wrote, times 0. A test sees it if a slot has no row, and if it asks "
                "that what comes out is finite (NaN is not even equal to itself). Reread section 3.6.",
            ),
        },
        praise="Your test lets three right ones pass and stops five that were shipped, or could have been. Keep it: two tokens with two slots, one "
        "with one, one with none.",
    ),
    statements(
        "3.8",
        "TFFTTF",
        says=(
            "Look at (a) again. Dispatch copies a token to K rows, so its gradient is the sum of the gradients of these rows: a combine with "
            "weights of 1. Reread section 3.3.",
            "Look at (b) again. What is 0 times NaN? Reread section 3.6.",
            "Look at (c) again. An expert that is skipped is not part of the graph: its gradient is None. Reread section 3.5.",
            "Look at (d) again. Sums of rounded numbers depend on their order. Reread section 3.8.",
            "Look at (e) again. A ReLU without a gate lets a positive factor through: relu(w h) = w relu(h). Reread section 3.9.",
            "Look at (f) again. Each row still meets the matrices of its expert. What falls is the number of calls, not of multiplications. "
            "Reread section 3.1.",
        ),
        praise="You kept apart what is exact, what is only rounding, and what is a bug.",
    ),
)
