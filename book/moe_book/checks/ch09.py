"""Chapter 9: expert choice."""

import math

import torch

from .exercise import Exercise, Idea, flipped

_generator = torch.Generator().manual_seed(9)
_p_TE = torch.softmax(2 * torch.randn(8, 4, generator=_generator), -1)
_q_TE = torch.sigmoid(torch.randn(6, 3, generator=_generator) + torch.tensor([2.0, 0.0, -2.0]))
_even_TE = torch.tensor(
    [[0.2, 0.8], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3], [0.1, 0.9]]
)  # ties: the earlier token wins


# 9.1: each expert takes its best tokens
def _best(scores_TE, c, dim):
    order = scores_TE.sort(dim=dim, descending=True, stable=True).indices
    mask = torch.zeros_like(scores_TE, dtype=torch.bool)
    return mask.scatter(dim, order[:c] if dim == 0 else order[:, :c], True)


def _choose(scores_TE, c):
    return _best(scores_TE, c, 0)


def _choose_overall(scores_TE, c):
    flat = _best(scores_TE.flatten()[:, None], c * scores_TE.shape[1], 0)
    return flat.view(scores_TE.shape)


def _choose_among_first(scores_TE, c):
    """Token choice with capacity: the first choice of each token, the best c of those."""
    first_TE = _best(scores_TE, 1, 1)
    return first_TE & _choose(scores_TE.masked_fill(~first_TE, -1), c)


# 9.2: whose route changes
def _route_by_experts(c, seed):
    table_VE = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
    return lambda tokens_T: _choose(table_VE[tokens_T], c)


def _route_by_tokens(tokens_T):
    return _best(torch.randn(16, 3, generator=torch.Generator().manual_seed(4))[tokens_T], 1, 1)


_tokens = torch.tensor([3, 7, 1, 12, 7, 9, 0, 15, 4, 2])
_FUTURES = tuple(
    (rule, _tokens, t, new)
    for rule, t, new in (
        (_route_by_experts(2, 5), 6, 5),
        (_route_by_experts(2, 11), 5, 5),
        (_route_by_experts(3, 3), 6, 11),
        (_route_by_experts(4, 4), 9, 6),
        (_route_by_tokens, 5, 8),
    )
)


def _flips(route, tokens_T, t, new):
    changed_T = tokens_T.clone()
    changed_T[t] = new
    return route(tokens_T) != route(changed_T), t


def _seers(route, tokens_T, t, new):
    flips_TE, t = _flips(route, tokens_T, t, new)
    return int(flips_TE[:t].any(1).sum())


def _seers_all(route, tokens_T, t, new):
    return int(_flips(route, tokens_T, t, new)[0].any(1).sum())


def _seers_with_itself(route, tokens_T, t, new):
    return int(_flips(route, tokens_T, t, new)[0][: t + 1].any(1).sum())


def _seers_cells(route, tokens_T, t, new):
    return int(_flips(route, tokens_T, t, new)[0][:t].sum())


def _seers_later(route, tokens_T, t, new):
    return int(_flips(route, tokens_T, t, new)[0][t + 1 :].any(1).sum())


# 9.3: what an eavesdropper knows
_s_VE = torch.randn(20, 5, generator=torch.Generator().manual_seed(5))
_s_VE[13] = _s_VE[4]  # two bytes the router cannot tell apart: ties
_HEARD = tuple((_s_VE, a, _s_VE[a] >= _s_VE[b]) for a, b in ((4, 9), (4, 13), (0, 17), (11, 2)))


def _left(compare=torch.ge, join=lambda same: same.all(-1)):
    return lambda scores_VE, a, taken_E: join(compare(scores_VE[a], scores_VE) == taken_E)


# 9.4: how much can be told
_SIZES = ((4, 8, 1), (1024, 16, 128), (64, 8, 16), (2, 8, 1))


def _bits(T, E, c):
    return E * math.log2(math.comb(T, c)) / T


def _limit(T, E, c):
    R = c / T
    return -E * (R * math.log2(R) + (1 - R) * math.log2(1 - R))


def _paper(T, E, c):
    R = c / T
    return E * R * math.log2((1 - R) / R) if R < 0.5 else 0.0


_STATEMENTS = "TFFTFT"
_flipped = flipped(_STATEMENTS)


# 9.5: a causal stand-in
def _cut(scores_TE, new_NE, G):
    return _threshold(scores_TE, G) <= new_NE


def _threshold(scores_TE, G):
    T, E = scores_TE.shape
    c = math.ceil(T * G / E)
    return scores_TE.sort(0, descending=True).values[c - 1]


_stream_TE = torch.randn(40, 4, generator=torch.Generator().manual_seed(6)) + torch.tensor(
    [0.0, 1.0, -1.0, 3.0]
)
_new_NE = torch.randn(9, 4, generator=torch.Generator().manual_seed(7)) + torch.tensor(
    [0.5, 1.0, -1.0, 3.0]
)


def _cut_again(scores_TE, new_NE, G):
    return _choose(new_NE, math.ceil(len(new_NE) * G / new_NE.shape[1]))


def _cut_together(scores_TE, new_NE, G):
    both = torch.cat([scores_TE, new_NE])
    return _choose(both, math.ceil(len(both) * G / both.shape[1]))[len(scores_TE) :]


def _cut_at_mean(scores_TE, new_NE, G):
    return scores_TE.mean(0) <= new_NE


def _cut_for_all(scores_TE, new_NE, G):
    T, E = scores_TE.shape
    return scores_TE.flatten().sort(descending=True).values[math.ceil(T * G) - 1] <= new_NE


EXERCISES = (
    Exercise(
        "9.1",
        right=_choose,
        cases=((_p_TE, 2), (_q_TE, 3), (_even_TE, 2)),
        praise="One sort down each column, and the load is exactly c for every expert. No loss, no controller, nothing to tune.",
        ideas=(
            Idea(
                "tokens choose",
                lambda scores_TE, c: _best(scores_TE, min(c, scores_TE.shape[1]), 1),
                "You sorted along the experts: "
                "each token takes its best experts. That is token choice, and its load is whatever it is. Sort each column, over the "
                "tokens (dim=0). Reread section 9.1.",
            ),
            Idea(
                "best overall",
                _choose_overall,
                "You took the best pairs of token and expert from the whole table. An expert with large "
                "scores then takes more than its share. Each expert takes c of its own column. Reread section 9.1.",
            ),
            Idea(
                "best of the willing",
                _choose_among_first,
                "You let tokens name their favourite first and then kept the best c of those. "
                "That is token choice with a capacity: experts that nobody names stay empty. In expert choice a token isn't asked. "
                "Reread section 9.1.",
            ),
            Idea(
                "worst tokens",
                lambda scores_TE, c: _choose(-scores_TE, c),
                "You took the tokens with the smallest scores: sort "
                "in descending order. Reread section 9.1.",
            ),
        ),
    ),
    Exercise(
        "9.2",
        right=_seers,
        cases=_FUTURES,
        praise="Change, route again, compare what lies before: that is all the package's probe does, many times. For token choice it is 0.",
        ideas=(
            Idea(
                "counts everybody",
                _seers_all,
                "You counted the changed token and the later ones too. They may change: they come after. "
                "Only positions before t say something about causality. Reread section 9.3.",
            ),
            Idea(
                "counts the changed one",
                _seers_with_itself,
                "You counted the changed token itself. It is another token now, so of course its "
                "route may change. Stop before t. Reread section 9.3.",
            ),
            Idea(
                "counts cells",
                _seers_cells,
                "You counted pairs of token and expert. A token that loses one expert and gains another "
                "is one token: any(-1) over the experts first. Reread section 9.3.",
            ),
            Idea(
                "counts the later",
                _seers_later,
                "You counted tokens after the change. Those are allowed to depend on it. The leak runs "
                "backwards, to positions before t. Reread section 9.3.",
            ),
        ),
    ),
    Exercise(
        "9.3",
        right=_left(),
        cases=_HEARD,
        praise="That is the whole eavesdropper: keep what fits every answer. The prior only says how to share out the rest.",
        ideas=(
            Idea(
                "any answer",
                _left(join=lambda same: same.any(-1)),
                "You kept bytes that fit at least one answer. A candidate must fit all "
                "experts at once: all(-1). Reread section 9.4.",
            ),
            Idea(
                "ties forgotten",
                _left(compare=torch.gt),
                "Nearly. When both bytes score the same the expert takes the earlier one, so "
                "the comparison is >=, not >. With > the byte itself never fits. Reread section 9.4.",
            ),
            Idea(
                "turned around",
                _left(compare=torch.le),
                "You asked where the candidate wins. taken_E says that byte a won, so compare "
                "scores_VE[a] >= scores_VE. Reread section 9.4.",
            ),
            Idea(
                "only those who took it",
                lambda scores_VE, a, taken_E: ((scores_VE[a] >= scores_VE) | ~taken_E).all(-1),
                "You used only the "
                "experts that took a. A refusal says as much as a choice: there the other byte scored higher. Ask all of them. Reread section 9.4.",
            ),
        ),
    ),
    Exercise(
        "9.4",
        right=_bits,
        cases=_SIZES,
        tolerance=1e-6,
        praise="A ceiling, not a measurement: so many bits can stand in a routing. How many of them speak of the future is another question.",
        ideas=(
            Idea(
                "one expert",
                lambda T, E, c: math.log2(math.comb(T, c)) / T,
                "That is what one expert can say. There are E of them, each "
                "with a choice of its own. Reread section 9.5.",
            ),
            Idea(
                "whole pool",
                lambda T, E, c: E * math.log2(math.comb(T, c)),
                "That is for the whole pool. Divide by its T tokens to have "
                "bits per token. Reread section 9.5.",
            ),
            Idea(
                "nats",
                lambda T, E, c: E * math.log(math.comb(T, c)) / T,
                "Your count is in nats. Bits need the logarithm to base 2. Reread section 9.5.",
            ),
            Idea(
                "the limit",
                _limit,
                "You used the entropy of a share, E times H(R). That is the limit for a large pool. Here T may be small: "
                "count with math.comb. Reread section 9.5.",
            ),
            Idea(
                "the paper's formula",
                _paper,
                "That is K log2((1-R)/R), which lies below the count by about -E log2(1-R) and is 0 "
                "for R = 1/2. Count the choices themselves. Reread section 9.5.",
            ),
        ),
    ),
    Exercise(
        "9.5",
        right=_cut,
        cases=(
            (_stream_TE, _new_NE, 1.0),
            (_stream_TE, _new_NE, 2.0),
            (_stream_TE, _new_NE[:1], 1.0),
        ),
        praise="Each new token is judged alone, by a bar set in the past. Chapter 10 lets the bar move.",
        ideas=(
            Idea(
                "competes again",
                _cut_again,
                "You let the new tokens compete with each other. Then a token's route depends on the later ones "
                "again. Compare each with a bar that comes from the old scores only. Reread section 9.7.",
            ),
            Idea(
                "competes with all",
                _cut_together,
                "You put old and new into one pool. A new token's route then still depends on the "
                "new tokens after it. The bar must come from the old scores only. Reread section 9.7.",
            ),
            Idea(
                "mean",
                _cut_at_mean,
                "You set the bar at the mean, so about half of all tokens pass, whatever G is. The bar is the c-th "
                "largest old score, c = T G / E rounded up. Reread section 9.7.",
            ),
            Idea(
                "one bar for all",
                _cut_for_all,
                "You used one bar for all experts. An expert whose scores run high then takes almost "
                "everything. Each expert has a bar of its own. Reread section 9.7.",
            ),
        ),
    ),
    Exercise(
        "9.6",
        right=_STATEMENTS,
        praise="Balance, causality and independence of the batch are three different things, and you told them apart.",
        ideas=(
            Idea(
                "balance is not exact",
                _flipped[0],
                "Look at (a) again. Every expert takes exactly c tokens, whatever the scores are. "
                "Reread section 9.1.",
            ),
            Idea(
                "all tokens served",
                _flipped[1],
                "Look at (b) again. Experts choose by themselves, and nobody makes sure that each token is "
                "chosen by someone. Reread section 9.2.",
            ),
            Idea(
                "mask suffices",
                _flipped[2],
                "Look at (c) again. The mask guards the attention. The leak goes through the router, which the mask "
                "does not touch. Reread section 9.3.",
            ),
            Idea(
                "sequence scope is not invariant",
                _flipped[3],
                "Look at (d) again. With a pool per sequence no other sequence takes part. It is "
                "later tokens of the same sequence that still do. Reread section 9.3.",
            ),
            Idea(
                "larger pools leak more",
                _flipped[4],
                "Look at (e) again. In a large pool one token moves the border of an expert less, "
                "and many unknown tokens move it. Reread section 9.6.",
            ),
            Idea(
                "encoders too",
                _flipped[5],
                "Look at (f) again. An encoder may see all of its input by design. There is no future to leak. "
                "Reread section 9.7.",
            ),
        ),
    ),
)
