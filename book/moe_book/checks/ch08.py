"""Chapter 8: loss-free balance."""

import math

import torch

from .exercise import Exercise, Idea

# 8.1: one step of the controller
_BIAS = torch.tensor([0.02, -0.01, 0.0, -0.01])
_STEPS = (
    (torch.zeros(4), torch.tensor([10, 2, 2, 2]), 0.01),
    (_BIAS, torch.tensor([6, 4, 1, 5]), 0.001),
    (_BIAS, torch.tensor([4, 4, 4, 4]), 0.1),
    (torch.zeros(3), torch.tensor([3, 3, 2]), 0.01),  # the mean is no whole number
    (_BIAS + 2.0, torch.tensor([6, 4, 1, 5]), 0.001),  # a bias that has drifted
)


def _stepped(direction, centre=True):
    def step(bias_E, counts_E, u):
        new_E = bias_E + u * direction(counts_E.float())
        return new_E - new_E.mean() if centre else new_E

    return step


def _missing_sign(c_E):
    return (c_E.mean() - c_E).sign()


def _step_centred(bias_E, counts_E, u):
    step_E = u * _missing_sign(counts_E.float())
    return bias_E + step_E - step_E.mean()


def _whole_mean(bias_E, counts_E, u):
    new_E = bias_E + u * (counts_E.sum() // len(counts_E) - counts_E).sign()
    return new_E - new_E.mean()


# 8.2: choose with the bias, weigh without
_generator = torch.Generator().manual_seed(8)
_SCORES = torch.rand(5, 6, generator=_generator)
_B = torch.tensor([-0.3, 0.2, 0.0, 0.4, -0.2, -0.1])
_ROUTES = ((_SCORES, _B, 2, 1.0), (_SCORES, -2 * _B, 3, 2.5))


def _routed(choose=lambda s, b: s + b, weigh=lambda s, b: s, norm=True, scale=True):
    def route(scores_TE, bias_E, K, gamma):
        index_TK = choose(scores_TE, bias_E).topk(K, dim=-1).indices
        w_TK = weigh(scores_TE, bias_E).gather(-1, index_TK)
        w_TK = w_TK / w_TK.sum(-1, keepdim=True) if norm else w_TK
        return index_TK, (gamma if scale else 1.0) * w_TK

    return route


# 8.3: MaxVio of each batch and of all
_COUNTS = (
    (torch.tensor([[4, 2, 1, 1], [1, 1, 2, 4]]),),
    (torch.tensor([[8, 0], [0, 8], [4, 4]]),),
    (torch.tensor([[3, 3, 9], [5, 5, 2], [30, 20, 10]]),),
)


def _vio(c):
    c = c.float()
    return c.max() / c.mean() - 1


def _violations(one=_vio, pool=True):
    def violations(counts_SE):
        mean = torch.stack([one(c) for c in counts_SE]).mean()
        return mean, one(counts_SE.float().sum(0)) if pool else mean

    return violations


# 8.4: the best groups
_CHOICE = torch.tensor(
    [[0.9, 0.1, 0.6, 0.55, 0.5, 0.45, 0.7, 0.2], [0.3, 0.3, 0.1, 0.9, 0.8, 0.7, 0.2, 0.95]]
)
_FOURS = torch.tensor(
    [[0.9, 0.8, 0.0, 0.1, 0.5, 0.49, 0.51, 0.48]]
)  # best two against the sum of all
_THREES = torch.tensor([[0.8, 0.7, 0.1, 0.79, 0.0, 0.05], [0.2, 0.1, 0.3, 0.9, 0.8, 0.7]])
_GROUPS = (
    (_CHOICE, 4, 2, 3),
    (_CHOICE - 1.5, 4, 2, 3),
    (_CHOICE, 2, 1, 3),
    (_FOURS, 2, 1, 2),
    (_FOURS - 4.0, 2, 1, 4),  # -1 is better than all of them
    (torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1, 0.1, 0.1]]), 3, 2, 3),  # one group has all
    (_THREES, 2, 1, 2),
)


def _grouped(
    view=lambda c, G: c.unflatten(-1, (G, -1)),
    score=lambda g: g.topk(2, -1).values.sum(-1),
    fill=-math.inf,
    back=lambda g: g.flatten(-2),
):
    def choose(choice_TE, G, M, K):
        grouped = view(choice_TE, G)
        best = score(grouped).topk(M, -1).indices
        out = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, False)
        return (
            back(grouped.masked_fill(out.unsqueeze(-1), fill)).topk(K, -1).indices.sort(-1).values
        )

    return choose


def _no_limit(choice_TE, G, M, K):
    return choice_TE.topk(K, -1).indices.sort(-1).values


_strided = _grouped(
    view=lambda c, G: c.unflatten(-1, (-1, G)).transpose(-1, -2),
    back=lambda g: g.transpose(-1, -2).flatten(-2),
)


def _some_of_each(choice_TE, G, M, K):
    """As many from each of the chosen groups."""
    grouped = choice_TE.unflatten(-1, (G, -1))
    each = min(-(-K // M), grouped.shape[-1])
    rows = []
    for row in grouped:
        best = row.topk(2, -1).values.sum(-1).topk(M).indices.tolist()
        inside = [
            (float(row[g, e]), g * row.shape[1] + int(e))
            for g in best
            for e in row[g].topk(each).indices
        ]
        rows.append(sorted(e for _, e in sorted(inside, reverse=True)[:K]))
    return torch.tensor(rows)


# 8.5: one step from several micro-batches
_ONE = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
_TWO = torch.tensor([[2, 1], [3, 2], [2, 3], [0, 0]])
_REAL = (torch.ones(4, dtype=torch.bool), torch.tensor([True, True, True, False]))
_PADDED = (torch.tensor([True, True, False, False]), torch.tensor([True, True, True, False]))
_DIRECTIONS = (
    ([_ONE, _TWO], list(_REAL), 4),
    ([_ONE, _TWO], list(_PADDED), 4),
    ([_TWO], [_REAL[1]], 5),
    (
        [torch.tensor([[0, 1], [0, 1], [1, 2]])],
        [torch.ones(3, dtype=torch.bool)],
        3,
    ),  # counts 2, 3, 1
)


def _count(index_TK, real_T, E):
    return torch.bincount(index_TK[real_T].flatten(), minlength=E)


def _direction(indices, real, E):
    return _missing_sign(sum(_count(i, r, E) for i, r in zip(indices, real)).float())


def _per_micro_batch(indices, real, E):
    return sum(_missing_sign(_count(i, r, E).float()) for i, r in zip(indices, real))


def _with_padding(indices, real, E):
    return _direction(indices, [torch.ones_like(r) for r in real], E)


def _last_only(indices, real, E):
    return _direction(indices[-1:], real[-1:], E)


def _against(indices, real, E):
    return -_direction(indices, real, E)


def _never_zero(indices, real, E):
    c_E = sum(_count(i, r, E) for i, r in zip(indices, real)).float()
    return torch.where(c_E > c_E.mean(), -1.0, 1.0)


# 8.6: how many steps until the last token of the margin moves over
_ARRIVALS = ((0.4, 0.001), (0.5, 0.01), (0.25, 0.1))


def _arrival(margin, u):
    return math.ceil(round(margin / (2 * u), 6))


EXERCISES = (
    Exercise(
        "8.1",
        right=_stepped(_missing_sign),
        cases=_STEPS,
        praise="Busy goes down, idle goes up, all by the same step, and the mean stays 0.",
        ideas=(
            Idea(
                "wrong way",
                _stepped(lambda c: (c - c.mean()).sign()),
                "Your step goes the wrong way: the busy expert gets more attractive. "
                "The load runs away instead of settling. It is sign(mean - count). Reread section 8.1.",
            ),
            Idea(
                "not centred",
                _stepped(_missing_sign, centre=False),
                "The direction is right, but the mean of the bias is not taken off. "
                "When one expert is busy and three are idle, the sum of the signs is not 0, and the bias drifts. Reread section 8.7.",
            ),
            Idea(
                "step centred",
                _step_centred,
                "You take the mean off the step. A bias that has drifted stays where it is then: take the mean off the new bias. Reread section 8.7.",
            ),
            Idea(
                "whole mean",
                _whole_mean,
                "Your mean is rounded down to a whole number. With counts 3, 3, 2 it is 8/3, and the idle expert must come up. Reread section 8.1.",
            ),
            Idea(
                "proportional",
                _stepped(lambda c: (c.mean() - c) / c.mean()),
                "You step by the relative error, not by its sign. That is a "
                "controller too, the proportional one, and its u means something else. Reread section 8.2.",
            ),
            Idea(
                "raw counts",
                _stepped(lambda c: c.mean() - c),
                "You step by the raw difference of counts. With a million tokens in a batch "
                "u = 0.001 would then be a step of hundreds. Take the sign. Reread section 8.1.",
            ),
        ),
    ),
    Exercise(
        "8.2",
        right=_routed(),
        cases=_ROUTES,
        praise="The bias has opened the door and gone home: no weight knows of it.",
        ideas=(
            Idea(
                "bias leaks",
                _routed(weigh=lambda s, b: s + b),
                "Your weights hold the bias. It is there to choose and for nothing else: "
                "gather the weights from the scores without it. This is the bug of section 8.3.",
            ),
            Idea(
                "score minus bias",
                _routed(choose=lambda s, b: s - b),
                "You chose by score minus bias. The bias is a price turned around: it is added. Reread section 8.1.",
            ),
            Idea(
                "bias forgotten",
                _routed(choose=lambda s, b: s),
                "You chose by the score alone, so the bias does nothing at all and the "
                "load stays as it is. Reread section 8.1.",
            ),
            Idea(
                "not renormalised",
                _routed(norm=False),
                "Your K weights are plain scores. Divide them by their sum before you multiply by "
                "gamma. Reread section 8.5.",
            ),
            Idea(
                "gamma forgotten",
                _routed(scale=False),
                "The K weights of a token must sum to gamma, yours sum to 1. Reread section 8.5.",
            ),
        ),
    ),
    Exercise(
        "8.3",
        right=_violations(),
        cases=_COUNTS,
        praise="Batches may each be uneven and even out together. Memory and waiting time feel the first number, specialisation the second.",
        ideas=(
            Idea(
                "mean for both",
                _violations(pool=False),
                "Your second number is the mean of the first ones again. MaxVio global adds the "
                "counts of all batches first and looks at the sum. Reread section 8.2.",
            ),
            Idea(
                "without the minus one",
                _violations(one=lambda c: c.float().max() / c.float().mean()),
                "You have the largest load over the "
                "mean, which is 1 at perfect balance. MaxVio is the excess: subtract the mean first. Reread section 8.2.",
            ),
            Idea(
                "absolute",
                _violations(
                    one=lambda c: (c.float() - c.float().mean()).abs().max() / c.float().mean()
                ),
                "You take the largest "
                "deviation to either side. MaxVio asks only about the busiest expert, since the others wait for it. Reread section 8.2.",
            ),
            Idea(
                "share",
                _violations(one=lambda c: c.float().max() / c.float().sum()),
                "You have the busiest expert's share of all slots. It "
                "depends on the number of experts; MaxVio compares with the mean load. Reread section 8.2.",
            ),
        ),
    ),
    Exercise(
        "8.4",
        right=_grouped(),
        cases=_GROUPS,
        unordered=True,
        praise="Groups first, experts inside them second, and nobody outside can win, however negative the scores.",
        ideas=(
            Idea(
                "filled with zero",
                _grouped(fill=0.0),
                "You set the experts outside the groups to 0. Case 2 has negative values only, so 0 "
                "is the best of them all and the outsiders win. Use -inf. Reread section 8.6.",
            ),
            Idea(
                "best expert",
                _grouped(score=lambda g: g.amax(-1)),
                "You judge a group by its best expert alone. That is DeepSeek-V2's rule. "
                "DeepSeek-V3 adds up the best two. Reread section 8.6.",
            ),
            Idea(
                "whole group",
                _grouped(score=lambda g: g.sum(-1)),
                "You judge a group by the sum of all its experts. Only its best two count: a group may be dull apart from them. Reread section 8.6.",
            ),
            Idea(
                "filled with minus one",
                _grouped(fill=-1.0),
                "You set the experts outside the groups to -1. Biased scores may be lower still, and then the outsiders win. Use -inf. Reread section 8.6.",
            ),
            Idea(
                "as many from each",
                _some_of_each,
                "You take a like number of experts from each chosen group. The K best inside the groups may all live in one. Reread section 8.6.",
            ),
            Idea(
                "no limit",
                _no_limit,
                "You took the K best of all experts. A token may then be sent to all groups. Reread section 8.6.",
            ),
            Idea(
                "strided",
                _strided,
                "You put every G-th expert into one group. Groups are neighbours: experts 0 and 1, then 2 and 3, and so "
                "on, as they stand on the nodes. Reread section 8.6.",
            ),
        ),
    ),
    Exercise(
        "8.5",
        right=_direction,
        cases=_DIRECTIONS,
        praise="One step of the optimiser, one step of the bias, and only for tokens that exist.",
        ideas=(
            Idea(
                "per micro-batch",
                _per_micro_batch,
                "You took a sign for each micro-batch and added them up. Signs don't add: the sum of the "
                "counts has one sign. Add the counts first. Reread section 8.7.",
            ),
            Idea(
                "padding counted",
                _with_padding,
                "You counted the padding. All padding tokens are alike, so they go to the same experts and "
                "make those look busy. Count real tokens only. Reread section 8.7.",
            ),
            Idea(
                "never zero",
                _never_zero,
                "Your direction is never 0. An expert with exactly the mean stays where it is. Reread section 8.1.",
            ),
            Idea(
                "last micro-batch",
                _last_only,
                "You looked at the last micro-batch only. The step belongs to all of them. Reread section 8.7.",
            ),
            Idea(
                "wrong way",
                _against,
                "Your signs are turned around: an expert with more than the mean must go down. Reread section 8.1.",
            ),
        ),
    ),
    Exercise(
        "8.6",
        right=_arrival,
        cases=_ARRIVALS,
        praise="The busy one goes down while the idle one comes up: the gap closes by 2u a step.",
        ideas=(
            Idea(
                "one side",
                lambda margin, u: math.ceil(round(margin / u, 6)),
                "You divided by u. But both biases move: the busy expert's "
                "down, the idle one's up, so the gap closes by 2u a step. Reread section 8.2.",
            ),
            Idea(
                "not whole",
                lambda margin, u: margin / (2 * u),
                "Steps are whole: round up, since the gap must be closed. Reread section 8.2.",
            ),
            Idea(
                "rounded down",
                lambda margin, u: (
                    math.floor(margin / (2 * u)) if margin / (2 * u) % 1 else margin / (2 * u) - 1
                ),
                "One step "
                "short: you rounded down, and a gap that is not yet closed moves nobody. Reread section 8.2.",
            ),
        ),
    ),
)
