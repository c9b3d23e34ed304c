"""Chapter 3: experts, dispatch and combine."""

import math

import torch
import torch.nn.functional as F

from .exercise import Exercise, Idea, flipped

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


# 3.4: padding
_COUNTS = ((torch.tensor([5, 1, 3, 3]),), (torch.tensor([0, 8, 0, 2, 2]),), (torch.tensor([4, 4]),))


def _padding(counts_E):
    return 1 - counts_E.sum() / (len(counts_E) * counts_E.max())


# 3.5: bytes
_SIZES = ((1024, 8, 2), (2048, 8, 2), (1000, 16, 3))


def _bytes(number=4, places=lambda T, E, K: math.ceil(T * K / E)):
    return lambda T, E, K: T * E * places(T, E, K) * number


_STATEMENTS = "TFFTTF"
_flipped = flipped(_STATEMENTS)


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
        ),
    ),
    Exercise(
        "3.2",
        right=_combine,
        cases=_COMBINE,
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
        ),
    ),
    Exercise(
        "3.3",
        right=_layer(),
        cases=_LAYER,
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
        right=_padding,
        cases=_COUNTS,
        praise="The busiest expert sets the height of the table, and everybody else pays for it.",
        ideas=(
            Idea(
                "busy experts only",
                lambda counts_E: 1 - counts_E.sum() / ((counts_E > 0).sum() * counts_E.max()),
                "You left the empty experts "
                "out of the table. It has a column of C places for each of the E experts, also for one without rows. Reread section 3.5.",
            ),
            Idea(
                "in rows",
                lambda counts_E: (len(counts_E) * counts_E.max() - counts_E.sum()) / counts_E.sum(),
                "You divided the empty places by "
                "the rows. Asked is their share of all places, E times C. Reread section 3.5.",
            ),
            Idea(
                "the share in use",
                lambda counts_E: counts_E.sum() / (len(counts_E) * counts_E.max()),
                "That is the share of places that are used. Asked is the rest. Reread section 3.5.",
            ),
        ),
    ),
    Exercise(
        "3.5",
        right=_bytes(),
        cases=_SIZES,
        praise="It grows with the square of T: E times C is T times K. Twice the tokens, four times the bytes.",
        ideas=(
            Idea(
                "without K",
                _bytes(places=lambda T, E, K: math.ceil(T / E)),
                "You counted tokens. With K experts each, T * K slots need a place, "
                "so C is T * K / E rounded up. Reread section 3.7.",
            ),
            Idea(
                "one byte",
                _bytes(number=1),
                "You counted one byte for each number. A float32 has four. Reread section 3.7.",
            ),
            Idea(
                "a list of slots",
                lambda T, E, K: 8 * T * K,
                "That is the sorted list: one int64 for each slot. The one-hot mask has a number for "
                "each token, expert and place, most of them 0. Reread section 3.7.",
            ),
        ),
    ),
    Exercise(
        "3.6",
        right=_STATEMENTS,
        praise="You kept apart what is exact, what is only rounding, and what is a bug.",
        ideas=(
            Idea(
                "gather is not combine",
                _flipped[0],
                "Look at (a) again. Dispatch copies a token to K rows, so its gradient is the sum of the "
                "gradients of these rows: a combine with weights of 1. Reread section 3.3.",
            ),
            Idea(
                "times zero is zero",
                _flipped[1],
                "Look at (b) again. What is 0 times NaN? Reread section 3.6.",
            ),
            Idea(
                "None is zero",
                _flipped[2],
                "Look at (c) again. An expert that is skipped is not part of the graph: its gradient is None. Reread "
                "section 3.5.",
            ),
            Idea(
                "any order will do",
                _flipped[3],
                "Look at (d) again. Sums of rounded numbers depend on their order. Reread section 3.8.",
            ),
            Idea(
                "homogeneous",
                _flipped[4],
                "Look at (e) again. A ReLU without a gate lets a positive factor through: relu(w h) = w relu(h). "
                "Reread section 3.9.",
            ),
            Idea(
                "sorting saves work",
                _flipped[5],
                "Look at (f) again. Each row still meets the matrices of its expert. What falls is the number of "
                "calls, not of multiplications. Reread section 3.1.",
            ),
        ),
    ),
)
