"""Chapter 8: loss-free balance."""

import math

import torch

from .exercise import Exercise, Idea, which, write_test


def _missing_sign(c_E):
    return (c_E.mean() - c_E).sign()


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


# 8.3: what no border can mend
_generator = torch.Generator().manual_seed(83)
_ALIKE = torch.cat((torch.rand(12, generator=_generator) - 0.3, torch.full((28,), 0.9)))
_LINES = (
    (torch.tensor([0.1, -0.2, 0.3, 0.5, 0.4, 0.6]),),
    (torch.tensor([0.3, 0.3, 0.3, 0.3, -0.1, 0.7, 0.8, 0.9]),),
    (torch.tensor([0.5, 0.5, 0.2, 0.2, 0.2, 0.5]),),  # two lumps and a border between them
    (torch.tensor([0.4, 0.1, 0.2, 0.5, 0.3]),),  # an odd number
    (torch.tensor([0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.5, 0.6, 0.7, 0.8]),),
    (_ALIKE,),
    (torch.full((6,), 0.25),),
)


def _vio_right(right, T):
    return max(right, T - right) / (T / 2) - 1


def _least_violation(d_T):
    return min(_vio_right((d_T > at).sum().item(), len(d_T)) for at in d_T)


def _no_lumps(d_T):
    return len(d_T) % 2 / len(d_T)


def _largest_lump(d_T):
    return max(0.0, 2 * d_T.unique(return_counts=True)[1].max().item() / len(d_T) - 1)


def _at_median(d_T):
    return _vio_right((d_T > d_T.median()).sum().item(), len(d_T))


def _at_mean(d_T):
    return _vio_right((d_T > d_T.double().mean()).sum().item(), len(d_T))


def _at_zero(d_T):
    return _vio_right((d_T > 0).sum().item(), len(d_T))


# 8.4: the best groups
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


def _by_value(choice_TE, G, M, K):
    """The same experts as those of _grouped, best first."""
    index_TK = _grouped()(choice_TE, G, M, K)
    order_TK = choice_TE.gather(-1, index_TK).argsort(-1, descending=True)
    return index_TK.gather(-1, order_TK)


def _some_of_each(choice_TE, G, M, K):
    """As many from each of the chosen groups."""
    grouped = choice_TE.unflatten(-1, (G, -1))
    each = min(-(-K // M), grouped.shape[-1])
    rows = []
    for row in grouped:
        best = row.topk(min(2, row.shape[-1]), -1).values.sum(-1).topk(M).indices.tolist()
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


# 8.6: a step for a run
_RUNS = ((200, 0.3, 0.08), (1000, 0.4, 0.012), (20_000, 0.1, 0.001), (40, 0.4, 0.05))


def _in_time(steps, delta):
    """The smallest step with which the border is there after a tenth of the run, wherever it has to go."""
    return 1.03 * delta / (2 * (steps // 10))


def _choose_u(steps, delta, vio):
    u = _in_time(steps, delta)
    return u if 4 * u <= vio else 0.0


def _trial(u, steps, delta, vio):
    """The controller on tokens spread evenly around delta: True, or what goes wrong."""
    for i in range(12):
        place, border = delta * (0.97 + 0.06 * i / 11), 0.0
        for step in range(steps):
            off = place - border
            if step >= steps // 10 and 2 * abs(off) > vio + 1e-9:
                late = border < place - 2 * u and step == steps // 10
                what = "still on its way" if late else "swinging"
                return (
                    f"With delta at {place:.4g} the border is {what} at step {step}, "
                    f"and MaxVio is {min(1, 2 * abs(off)):.3g}, above {vio}."
                )
            border += 2 * u * ((off > 1e-12) - (off < -1e-12))
    return True


def _judge_u(u, steps, delta, vio):
    if isinstance(u, (str, bool)):
        return False
    u = float(u)
    if u == 0:
        possible = _choose_u(steps, delta, vio) > 0
        return "You say that no step will do. Here one does." if possible else True
    return _trial(u, steps, delta, vio) if 0 < u < math.inf else False


EXERCISES = (
    which(
        "8.1",
        options="ABCDE",
        right="BD",
        says={
            "A": "A is sound. It compares E times a count with the total instead of the count with a mean: the same sign, and no rounding. Reread section 8.7.",
            "C": "C is sound. It is the proportional rule of section 8.2: its steps shrink with the error, and the load gets even all the same.",
            "E": "E is sound. Taking the same number off every bias changes no choice, whichever number it is. Reread section 8.7.",
        },
        praise="One aims at half the even load, the other answers to a load that is long gone. Neither would raise an error.",
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
        right=_least_violation,
        cases=_LINES,
        praise="A border has one place between every two neighbours that differ, and nowhere else. No step size changes that.",
        ideas=(
            Idea(
                "lumps ignored",
                _no_lumps,
                "You split the tokens in two halves, whatever they are. Tokens with the same d are on the same side of every border. Reread section 8.1.",
            ),
            Idea(
                "largest lump",
                _largest_lump,
                "You looked at the size of the largest lump alone. It may stand far from the middle, or small ones may lie badly: try every place of the border. Reread section 8.1.",
            ),
            Idea(
                "border at the median",
                _at_median,
                "You put the border at the median, so that all tokens at the median go to one side. The other side of them may be better. Reread section 8.1.",
            ),
            Idea(
                "border at the mean",
                _at_mean,
                "You put the border at the mean of d. The controller counts tokens and knows no distances: where half of them stand is the question. Reread section 8.1.",
            ),
            Idea(
                "border at zero",
                _at_zero,
                "You left the border at 0, where it starts. The question is what the best price can reach. Reread section 8.1.",
            ),
            Idea(
                "load instead of excess",
                lambda d_T: _least_violation(d_T) + 1,
                "You have the largest load over the mean, which is 1 at balance. MaxVio is the excess: take 1 off. Reread section 8.2.",
            ),
            Idea(
                "share",
                lambda d_T: (_least_violation(d_T) + 1) / 2,
                "You have the busier expert's share of the tokens. MaxVio compares with the mean load, here half of them. Reread section 8.2.",
            ),
        ),
    ),
    write_test(
        "8.4",
        good=(_grouped(), _by_value),
        broken={
            "filled with zero": (
                _grouped(fill=0.0),
                "Your test lets through one that sets the experts outside the groups to 0. Where do zeros win? Reread section 8.6.",
            ),
            "best expert": (
                _grouped(score=lambda g: g.amax(-1)),
                "Your test lets through one that judges a group by its best expert alone, DeepSeek-V2's rule. Give it a group with one star and a group with two good ones.",
            ),
            "whole group": (
                _grouped(score=lambda g: g.sum(-1)),
                "Your test lets through one that judges a group by the sum of all its experts. You need groups of more than two to see it.",
            ),
            "no limit": (
                _no_limit,
                "Your test lets through one that knows no groups at all. Let a very good expert stand in a poor group.",
            ),
            "strided": (
                _strided,
                "Your test lets through one that puts every G-th expert into one group instead of neighbours.",
            ),
            "as many from each": (
                _some_of_each,
                "Your test lets through one that takes a like number of experts from each chosen group. The K best may all live in one.",
            ),
        },
        praise="All six are caught. Each of them gives right answers on most inputs, which is how three of them got into released code or papers.",
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
        right=_choose_u,
        cases=_RUNS,
        accepts=_judge_u,
        tolerance=1e-7,
        praise="Long runs leave room between too slow and too restless. A short run may leave none.",
        ideas=(
            Idea(
                "one side",
                lambda steps, delta, vio: (u := delta / (steps // 10)) * (2 * u <= vio),
                "You let one bias walk alone. Both move, so the border moves by 2u a step, and half of your u is enough. The other half makes the ripple. Reread section 8.1.",
            ),
            Idea(
                "at the end",
                lambda steps, delta, vio: delta / (2 * steps),
                "With this u the border arrives when the run ends. It must be there after a tenth of the steps. Reread section 8.2.",
            ),
            Idea(
                "the paper's",
                lambda steps, delta, vio: 0.001,
                "0.001 is what the paper found best for its runs. A short run would end before the border is there. Reread section 8.2.",
            ),
            Idea(
                "no margin",
                lambda steps, delta, vio: (u := delta / (2 * (steps // 10))) * (4 * u <= vio),
                "Your u is there in time if delta is exact. It is known to three percent only: plan for the longest way.",
            ),
            Idea(
                "always a step",
                lambda steps, delta, vio: _in_time(steps, delta),
                "Your u is there in time in every run. In one of them it then swings too widely, and so does every larger one: what is to be returned there?",
            ),
            Idea(
                "always the quiet step",
                lambda steps, delta, vio: vio / 4,
                "Your u swings as little as is asked for. In one of the runs it is too slow for a tenth of the steps: what is to be returned there?",
            ),
        ),
    ),
)
