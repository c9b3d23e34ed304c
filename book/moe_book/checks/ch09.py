"""Chapter 9: expert choice."""

import math

import torch

from .exercise import Exercise, Idea, statements, which, write_test

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


def _choose_later(scores_TE, c):
    """Of equal scores the later token wins."""
    return _choose(scores_TE.flip(0), c).flip(0)


def _choose_from(scores_TE, c):
    """Whatever is as good as the c-th best: ties let more than c in."""
    return scores_TE >= scores_TE.sort(0, descending=True).values[c - 1]


# 9.2: a test for causality, of a rule from vectors to experts
def tokens_choose(x_TD):
    """Token choice: the best expert of each row; column e is expert e's score."""
    return _best(x_TD, 1, 1)


def above_a_bar(x_TD):
    """Fixed bars: whatever scores above one half."""
    return x_TD > 0.5


def queue_by_position(x_TD):
    """Token choice with a capacity: the first half of a pool's worth, in the order of the text."""
    first_TE = _best(x_TD, 1, 1)
    return first_TE & (first_TE.cumsum(0) <= 2)


def experts_choose(x_TD):
    """Expert choice: two tokens for each expert, of the whole pool."""
    return _choose(x_TD, min(2, len(x_TD)))


def queue_by_score(x_TD):
    """Token choice, and the best two of those who come to an expert."""
    return _choose_among_first(x_TD.sigmoid(), min(2, len(x_TD)))


def above_the_mean(x_TD):
    """A bar that is the pool's mean."""
    return x_TD > x_TD.mean(0)


def looks_one_ahead(x_TD):
    """The next token's score helps: a window of two."""
    return x_TD + 0.9 * torch.cat([x_TD[1:], torch.zeros_like(x_TD[:1])]) > 0.5


def last_one_decides(x_TD):
    """Only the very last token of the text is looked at ahead of time."""
    return x_TD + x_TD[-1] > 0.5


# 9.3: what an eavesdropper knows
_s_VE = torch.randn(20, 5, generator=torch.Generator().manual_seed(5))
_s_VE[13] = _s_VE[4]  # two bytes the router cannot tell apart: ties
_HEARD = tuple((_s_VE, a, _s_VE[a] >= _s_VE[b]) for a, b in ((4, 9), (4, 13), (0, 17), (11, 2)))


def _left(compare=torch.ge, join=lambda same: same.all(-1)):
    return lambda scores_VE, a, taken_E: join(compare(scores_VE[a], scores_VE) == taken_E)


# 9.4: whom nobody takes, by chance
_SIZES = ((1024, 8, 256), (4, 8, 1), (6, 3, 2), (64, 16, 16))


def _nobody(T, E, c):
    return (1 - c / T) ** E


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
_STREAMS = (
    (_stream_TE, _stream_TE, 0.33),
    (_even_TE, _even_TE[1:3], 0.8),  # scores that stand exactly on the bar
)
_new_NE = torch.randn(9, 4, generator=torch.Generator().manual_seed(7)) + torch.tensor(
    [0.5, 1.0, -1.0, 3.0]
)


def _cut_above(scores_TE, new_NE, G):
    return _threshold(scores_TE, G) < new_NE


def _cut_floor(scores_TE, new_NE, G):
    T, E = scores_TE.shape
    return scores_TE.sort(0, descending=True).values[max(1, math.floor(T * G / E)) - 1] <= new_NE


def _cut_c_per_token(scores_TE, new_NE, G):
    return _best(new_NE, math.ceil(G), 1)


def _cut_off_by_one(scores_TE, new_NE, G):
    T, E = scores_TE.shape
    c = min(T - 1, math.ceil(T * G / E))
    return scores_TE.sort(0, descending=True).values[c] <= new_NE


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
        cases=((_p_TE, 2), (_q_TE, 3), (_even_TE, 2), (_q_TE, 6)),
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
                "ties let in",
                _choose_from,
                "You let in whatever is as good as the c-th best. Where scores tie, that is more than c tokens, and the load is no longer "
                "exact. Of equals the earlier wins: a stable sort and its first c rows. Reread section 9.1.",
            ),
            Idea(
                "the later wins",
                _choose_later,
                "Nearly. Of two equal scores your expert takes the later token, and the text asks for the earlier one: "
                "sort with stable=True, and descending instead of from behind. Reread section 9.1.",
            ),
            Idea(
                "worst tokens",
                lambda scores_TE, c: _choose(-scores_TE, c),
                "You took the tokens with the smallest scores: sort "
                "in descending order. Reread section 9.1.",
            ),
        ),
    ),
    write_test(
        "9.2",
        good=(tokens_choose, above_a_bar, queue_by_position),
        broken={
            "expert choice": (
                experts_choose,
                "Your test lets expert choice pass: each column takes its two best of the whole pool. Change some tokens, route again, and "
                "compare the rows before the change; once is not enough, since not every change moves a border. Reread section 9.3.",
            ),
            "capacity by score": (
                queue_by_score,
                "Your test lets a capacity by score pass: tokens choose, and an expert keeps the best two of those who came. A change is felt "
                "only where an expert is full, so try many changes, and large ones. Reread section 9.3.",
            ),
            "the mean of the pool": (
                above_the_mean,
                "Your test lets a bar pass that is the mean of the whole pool. A small change moves a mean by little, and a score has to lie "
                "close to it: change later tokens by a lot, and try several texts.",
            ),
            "the next token": (
                looks_one_ahead,
                "Your test lets a rule pass that looks one token ahead and no further. It changes the row just before the change, so compare "
                "all rows before it, and make the change somewhere else than at the first token.",
            ),
            "the last token": (
                last_one_decides,
                "Your test lets a rule pass that looks at the very last token only. Change the last one as well: replace everything from some "
                "place on, not one token in the middle.",
            ),
        },
        praise="Change what comes later, route again, compare what lies before, and do it often: that is all the package's probe does.",
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
        right=_nobody,
        cases=_SIZES,
        tolerance=1e-6,
        praise="With eight experts and a quarter each it is a tenth. In the run about three times as many go without: the experts do not draw "
        "at random, they want the same tokens.",
        ideas=(
            Idea(
                "someone",
                lambda T, E, c: 1 - _nobody(T, E, c),
                "That is the share of tokens that somebody takes. The question is about the others. Reread the first hint.",
            ),
            Idea(
                "one expert",
                lambda T, E, c: 1 - c / T,
                "That is the share that one expert leaves. All E of them have to leave a token alone, each by itself.",
            ),
            Idea(
                "shares added",
                lambda T, E, c: max(0.0, 1 - E * c / T),
                "You added the shares of the experts, as if no token were ever taken twice. They overlap: multiply the "
                "chances of being left. Reread section 9.2.",
            ),
            Idea(
                "taken by all",
                lambda T, E, c: (c / T) ** E,
                "That is the chance to be taken by every expert. A token that nobody takes is left by every expert.",
            ),
            Idea(
                "a number",
                lambda T, E, c: T * _nobody(T, E, c),
                "That is how many tokens of the pool nobody takes. Asked is their share, a number from 0 to 1: divide by T.",
            ),
            Idea(
                "independent draws",
                lambda T, E, c: (1 - 1 / T) ** (E * c),
                "You let E times c single draws hit the pool. But one expert takes c different tokens, so it leaves the share "
                "1 - c/T exactly. Only the experts are independent of each other.",
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
            *_STREAMS,
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
                "above the bar",
                _cut_above,
                "Nearly. A score equal to the bar gets in: the token that set the bar was itself admitted. Use >=.",
            ),
            Idea(
                "rounded down",
                _cut_floor,
                "Nearly. You rounded T G / E down, the text rounds up: with 40 tokens, 4 experts and G = 0.33 it is 4 places and not 3.",
            ),
            Idea(
                "off by one",
                _cut_off_by_one,
                "Nearly. Your bar is the next score after the last one that was let in. Counting begins at 0, so the c-th largest stands at "
                "c - 1 in a sorted column.",
            ),
            Idea(
                "tokens choose",
                _cut_c_per_token,
                "You let each new token take its best experts. That is causal, but it is token choice, and the old scores play no part in "
                "it. Compare each new score with the bar of its expert. Reread section 9.7.",
            ),
            Idea(
                "one bar for all",
                _cut_for_all,
                "You used one bar for all experts. An expert whose scores run high then takes almost "
                "everything. Each expert has a bar of its own. Reread section 9.7.",
            ),
        ),
    ),
    which(
        "9.6",
        options="ABCDE",
        right="CE",
        says={
            "A": "A is right. Zeros are a change like any other: expert choice then has other competitors in its pool, and the rows before feel it.",
            "B": "B is right. Another text in place of the second half is the false future of section 9.6, and the rows before are compared.",
            "D": "D is right. The beginning is routed without what follows. Expert choice then has a smaller pool and answers otherwise; "
            "token choice doesn't.",
        },
        praise="C asks whether the past is seen, which is no fault: a queue in the order of the text is causal and fails it. And E only changes the order: the two best of a column are the same scores "
        "as before, so expert choice passes. A test has to change what the rule looks at.",
    ),
    statements(
        "9.7",
        "TFFTFT",
        says=(
            "Look at (a) again. Every expert takes exactly c tokens, whatever the scores are. Reread section 9.1.",
            "Look at (b) again. Experts choose by themselves, and nobody makes sure that each token is chosen by someone. Reread section 9.2.",
            "Look at (c) again. The mask guards the attention. The leak goes through the router, which the mask does not touch. Reread section 9.3.",
            "Look at (d) again. With a pool per sequence no other sequence takes part. It is later tokens of the same sequence that still do. "
            "Reread section 9.3.",
            "Look at (e) again. Compare false minus true in the rows of 4, 16, 64 and 1024. Reread section 9.6.",
            "Look at (f) again. An encoder may see all of its input by design. There is no future to leak. Reread section 9.7.",
        ),
        praise="Balance, causality and independence of the batch are three different things, and you told them apart.",
    ),
)
