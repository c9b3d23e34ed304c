"""Chapter 10: expert threshold."""

import math
from statistics import NormalDist

import torch

from .exercise import Exercise, Idea, statements, which, write_test

# 10.1: the cutoffs of one batch
_generator = torch.Generator().manual_seed(10)
_h_TE = torch.randn(24, 4, generator=_generator) + torch.tensor([0.0, 2.0, -3.0, 0.5])
_h2_TE = 0.5 * torch.randn(50, 8, generator=_generator) - 1


def _cutoffs(
    k=lambda T, E, G: math.floor(T * G / E),
    pick=lambda h, k: h.sort(dim=0, descending=True).values[k - 1],
):
    return lambda h_TE, G: pick(h_TE, k(*h_TE.shape, G))


def _mean_minus_std(h_TE, G):
    return h_TE.mean(0) - h_TE.std(0)


def _median(h_TE, G):
    return h_TE.median(0).values


def _interpolated(h_TE, G):
    return h_TE.quantile(1 - G / h_TE.shape[1], dim=0)


def _one_for_all(h_TE, G):
    T, E = h_TE.shape
    return h_TE.flatten().sort(descending=True).values[T * G - 1].expand(E)


# 10.2: one optimiser step of the average
def _micro(seed, n, shift):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 4, generator=generator) + shift + i / 4 for i in range(n)]


_updates = (
    (torch.zeros(4), 0, _micro(1, 3, 1.0), 0.9),
    (torch.tensor([1.0, -1.0, 0.5, 2.0]), 4, _micro(2, 2, -1.0), 0.8),
    (torch.tensor([0.2, 0.4, 0.6, 0.8]), 30, _micro(3, 4, 0.5), 0.95),
)


def _own_cuts(micro):
    return [h.sort(dim=0, descending=True).values[len(h) // h.shape[1] - 1] for h in micro]


def _step(
    cut=lambda micro: torch.stack(_own_cuts(micro)).mean(0),
    weight=lambda t, beta: (1 - beta) / (1 - beta ** (t + 1)),
):
    return lambda c_E, t, micro, beta: c_E + weight(t, beta) * (cut(micro) - c_E)


def _pooled(micro):
    h_TE = torch.cat(micro)
    return h_TE.sort(dim=0, descending=True).values[len(h_TE) // h_TE.shape[1] - 1]


def _corrected_twice(c_E, t, micro, beta):
    q_E = torch.stack(_own_cuts(micro)).mean(0)
    return (beta * c_E + (1 - beta) * q_E) / (1 - beta ** (t + 1))


def _each_micro_batch(c_E, t, micro, beta):
    for i, q_E in enumerate(_own_cuts(micro)):
        c_E = c_E + (1 - beta) / (1 - beta ** (t + i + 1)) * (q_E - c_E)
    return c_E


def _swapped(c_E, t, micro, beta):
    return _step(weight=lambda t, beta: beta / (1 - (1 - beta) ** (t + 1)))(c_E, t, micro, beta)


# 10.3: what a token gets from the layer
_layers = tuple(
    (
        torch.randn(6, 3, generator=_generator),
        torch.tensor(c),
        torch.randn(6, 3, generator=_generator),
    )
    for c in ([0.2, -0.5, 0.4], [-0.3, 0.1, 0.0])
)
_layers[1][0][2] = torch.tensor([-0.3, 0.1, 0.7])  # meets two thresholds exactly


def _reaches(h_TE, c_E, f_TE):
    return (h_TE.sigmoid() * (h_TE >= c_E) * f_TE).sum(-1)


def _output(weigh):
    return lambda h_TE, c_E, f_TE: (weigh(h_TE, h_TE > c_E) * f_TE).sum(-1)


def _share_of_one(h_TE, in_TE):
    w_TE = h_TE.sigmoid() * in_TE
    return w_TE / w_TE.sum(-1, keepdim=True).clamp(min=1e-9)


def _two_scales(h_TE, c_E, f_TE):
    s_TE = h_TE.sigmoid()
    return (s_TE * (s_TE > c_E) * f_TE).sum(-1)


# 10.4: the capacity band, for one expert
_h_T = torch.tensor([0.9, -0.3, 2.1, 0.4, -1.5, 1.2, 0.1, -0.8, 1.7, 0.6, -0.1, 0.3])
_bands = (
    (_h_T, 0.0, 4, 0.5),
    (_h_T, 1.5, 4, 0.25),
    (_h_T, 0.5, 4, 0.5),
    (_h_T, 3.0, 4, 0.5),
    (_h_T, -2.0, 3, 1.0),
    (_h_T, 1.5, 5, 0.5),  # at least 2.5
    (_h_T, -0.5, 5, 0.5),  # at most 7.5
    (torch.tensor([0.75, -0.5, 2, 0.25, -1.5, 1.25, 0.5]), 0.5, 3, 0.5),  # the last has this logit
)


def _banded(count=lambda n, k, C: min(max(n, math.ceil((1 - C) * k)), math.floor((1 + C) * k))):
    def band(h_T, c, k, C):
        n = count(int((h_T > c).sum()), k, C)
        kept_T = torch.zeros(len(h_T), dtype=torch.bool)
        kept_T[h_T.sort(descending=True).indices[:n]] = True
        return kept_T

    return band


def _band_reached(h_T, c, k, C):
    return _banded()(h_T, math.nextafter(c, -math.inf) - 1e-6, k, C)


def _earliest(h_T, c, k, C):
    above_T = h_T > c
    low, high = math.ceil((1 - C) * k), math.floor((1 + C) * k)
    if above_T.sum() < low:
        return _banded()(h_T, c, k, C)
    return above_T & (above_T.long().cumsum(0) <= high)


# 10.5: which memory
_pursuits = ((0.0, 0.1), (0.01, 0.1), (0.05, 0.1), (0.01, 0.02), (0.002, 0.2), (0.1, 1.0))
_BETAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def _best(error):
    return lambda d, s: min(
        _BETAS, key=lambda beta: error(d / (1 - beta), s * math.sqrt((1 - beta) / (1 + beta)), beta)
    )


# 10.7: how long the hunger lasts
def _hungry(gap=None, first=lambda beta, d: d / (1 - beta), count=None):
    cut = lambda share: NormalDist().inv_cdf(1 - share)
    gap = gap or (lambda E: cut(0.1 / E) - cut(1 / E))
    count = count or (
        lambda high, beta, gap: sum(high * beta**n > gap for n in range(5000)) if beta else 0
    )
    return lambda beta, d, E: count(first(beta, d), beta, gap(E))


def _last_one(high, beta, gap):
    return max(0, math.floor(math.log(high / gap) / -math.log(beta))) if high > gap else 0


_falls = ((0.99, 0.03, 8), (0.9, 0.12, 8), (0.95, 0.02, 8), (0.99, 0.05, 64), (0.98, 0.1, 4))


# 10.8: rules who is admitted, (T, E) logits -> (T, E) mask
def fixed_thresholds(h_TE):
    return h_TE > torch.linspace(0.5, 1.2, h_TE.shape[1]).to(h_TE.dtype)


def best_of_each_token(h_TE):
    return h_TE >= h_TE.max(-1, keepdim=True).values


def share_of_the_token(h_TE):
    return h_TE.softmax(-1) > 0.3


def cutoff_of_the_batch(h_TE):
    k = max(len(h_TE) // h_TE.shape[1], 1)
    return h_TE >= h_TE.topk(k, dim=0).values[-1]


def centred_first(h_TE):
    return fixed_thresholds(h_TE - h_TE.mean(0) + 0.2)


def first_come(h_TE):
    above_TE = fixed_thresholds(h_TE)
    return above_TE & (above_TE.long().cumsum(0) <= 40)


def never_empty(h_TE):
    above_TE = fixed_thresholds(h_TE)
    if len(h_TE) < 8:
        return above_TE
    best_TE = h_TE >= h_TE.max(0).values
    return torch.where(above_TE.any(0), above_TE, best_TE)


class _Moving:
    """A threshold that takes a step with every call."""

    def __init__(self):
        self.cut = 0.8

    def __call__(self, h_TE):
        admitted_TE = h_TE > self.cut
        if h_TE.numel():
            self.cut = 0.8 * self.cut + 0.2 * float(h_TE.max())
        return admitted_TE


moves_with_every_call = _Moving()

EXERCISES = (
    Exercise(
        "10.1",
        right=_cutoffs(),
        cases=((_h_TE, 1), (_h_TE, 2), (_h2_TE, 1)),
        praise="Each expert has a line of its own, where exactly k of this batch's tokens reach it: the (1 - G/E)-quantile of its logits.",
        ideas=(
            Idea(
                "mean minus deviation",
                _mean_minus_std,
                "Mean minus one standard deviation is the 16th percentile of a normal distribution: 84 % of all "
                "tokens lie above it, for every expert. The line belongs at the (1 - G/E)-quantile. See the box in section 10.4.",
            ),
            Idea(
                "median",
                _median,
                "At the median every expert takes half of all tokens, so a token goes to E/2 experts. The share you want is G/E. "
                "See section 10.1.",
            ),
            Idea(
                "one line for all",
                _one_for_all,
                "You ranked all experts' logits together, so one whose logits are large as a whole takes everything. Each "
                "expert is compared with itself only: rank within each column. See section 10.1.",
            ),
            Idea(
                "first one out",
                _cutoffs(pick=lambda h, k: h.sort(dim=0, descending=True).values[k]),
                "That is the (k+1)-th largest: python counts from 0, "
                "so the k-th largest stands at [k - 1]. See the hand-computed case in section 10.1.",
            ),
            Idea(
                "interpolated quantile",
                _interpolated,
                "torch.quantile interpolates between the logits of two tokens, and its positions run from 0 to T - 1. In a large batch that is nearly "
                "the same; asked for is the logit of a token, the k-th largest with k = floor(T * G / E). See the case by hand in section 10.1.",
            ),
            Idea(
                "rounded up",
                _cutoffs(k=lambda T, E, G: math.ceil(T * G / E)),
                "Your k is rounded up, as c is in chapter 9. Here it is rounded down. See section 10.1.",
            ),
            Idea(
                "forgot G",
                _cutoffs(k=lambda T, E, G: T // E),
                "Your k is T / E, one expert per token. With G experts per token on average, E experts share "
                "T * G places, and each has k = floor(T * G / E). See section 10.1.",
            ),
        ),
    ),
    Exercise(
        "10.2",
        right=_step(),
        cases=_updates,
        praise="One step towards the mean cutoff of all micro-batches, and right from the first step on.",
        ideas=(
            Idea(
                "a step for each micro-batch",
                _each_micro_batch,
                "You made one EMA step per micro-batch. With M of them the past counts beta^M: the memory "
                "shrinks, and changes whenever somebody changes the number of micro-batches. Average their cutoffs first, then take one step. See section 10.3.",
            ),
            Idea(
                "no correction",
                _step(weight=lambda t, beta: 1 - beta),
                "Without bias correction the first thresholds are pulled towards 0, where the average "
                "started: at beta = 0.9 the first is a tenth of what it should be. Divide 1 - beta by 1 - beta^(t+1). See section 10.2.",
            ),
            Idea(
                "one step behind",
                _step(weight=lambda t, beta: (1 - beta) / (1 - beta**t) if t else 1.0 - beta),
                "The exponent is one too small: t updates came "
                "before, so this is number t + 1, and the weights sum to 1 - beta^(t+1). See the formula in section 10.2.",
            ),
            Idea(
                "pooled",
                _step(cut=_pooled),
                "You pooled the micro-batches and cut once. That is a cutoff too, but not the mean of theirs, and it needs all logits in one place; on "
                "several GPUs only E numbers travel. Cut each micro-batch, then average. See section 10.3.",
            ),
            Idea(
                "corrected twice",
                _corrected_twice,
                "You put the corrected thresholds where m belongs and divided again. Either go back to m first, m = c (1 - beta^t), or take the form without m. See section 10.2.",
            ),
            Idea(
                "decay swapped",
                _swapped,
                "You gave the new value the weight beta; it gets 1 - beta, and the past keeps beta. With beta = 0.9 yours remembers "
                "hardly more than one step. See section 10.2.",
            ),
            Idea(
                "mean of the logits",
                _step(cut=lambda micro: torch.cat(micro).mean(0)),
                "You followed the mean of the logits. The line stands at each expert's "
                "k-th largest, far out in the tail. See section 10.1.",
            ),
        ),
    ),
    Exercise(
        "10.3",
        right=_output(lambda h, admitted: h.sigmoid() * admitted),
        cases=_layers,
        differentiable="h_TE",
        praise="The comparison selects, the sigmoid weighs; the sigmoid is where the gradient comes in.",
        ideas=(
            Idea(
                "binary mask",
                _output(lambda h, admitted: admitted.float()),
                "You add the experts with weight 1. A comparison has no gradient, so this router "
                "would never learn. Multiply by sigmoid(h). See section 10.4.",
            ),
            Idea(
                "nothing is cut",
                _output(lambda h, admitted: h.sigmoid()),
                "All experts take part: the threshold selects nobody. This is a dense layer with a "
                "gate, at E times the cost. Multiply by (h > c) as well. See section 10.4.",
            ),
            Idea(
                "normalised over the admitted",
                _output(_share_of_one),
                "Your weights of a token sum to 1. A token with a single expert then has the weight 1 "
                "whatever its logit is, and teaches the router nothing. Leave the sigmoids as they are. See section 10.4.",
            ),
            Idea(
                "softmax",
                _output(lambda h, admitted: h.softmax(-1) * admitted),
                "A softmax lets experts compete for the token; here an expert compares a token "
                "with other tokens, and needs a weight that is its own: sigmoid(h). See section 10.4.",
            ),
            Idea(
                "at the threshold",
                _reaches,
                "You let in tokens that meet the threshold exactly. It matters to hardly anybody, but the formula of section 10.1 says above: h > c.",
            ),
            Idea(
                "two scales",
                _two_scales,
                "You compare sigmoid(h) with a threshold that is a logit. Both sides must live on one scale: h > c. See section 10.4.",
            ),
        ),
    ),
    Exercise(
        "10.4",
        right=_banded(),
        cases=_bands,
        praise="Count, clamp the count, take the best that many. With C = 0 it is expert choice, with a wide band the pure threshold.",
        ideas=(
            Idea(
                "upper edge only",
                _banded(lambda n, k, C: min(n, math.floor((1 + C) * k))),
                "You drop what is over the band and let nobody in below it: an "
                "expert whose line is too high stays empty, and an empty expert learns nothing. The band has a floor too. See section 10.5.",
            ),
            Idea(
                "lower edge only",
                _banded(lambda n, k, C: max(n, math.ceil((1 - C) * k))),
                "You fill up to the floor and never drop: an expert whose line is too "
                "low floods. The band has a ceiling, (1 + C) k. See section 10.5.",
            ),
            Idea(
                "earliest first",
                _earliest,
                "You drop the latest tokens. The band drops the worst: rank by logit. By position, the end of a sequence would pay for "
                "its beginning. See section 10.5.",
            ),
            Idea(
                "expert choice",
                _banded(lambda n, k, C: k),
                "You always take the best k: the threshold has no say left. Inside the band it alone decides how many "
                "get in. See section 10.5.",
            ),
            Idea(
                "rounded",
                _banded(lambda n, k, C: min(max(n, round((1 - C) * k)), round((1 + C) * k))),
                "You rounded both ends of the band to the nearest number. The lower end is rounded up and the upper one down, so that the count stays inside it.",
            ),
            Idea(
                "cut off both",
                _banded(lambda n, k, C: min(max(n, int((1 - C) * k)), int((1 + C) * k))),
                "You rounded both ends down. At least (1 - C) k tokens means rounding that end up: with k = 5 and C = 0.5 at least 3.",
            ),
            Idea(
                "at the threshold",
                _band_reached,
                "You counted tokens that meet c exactly. Only those above it are admitted by the threshold. See section 10.1.",
            ),
            Idea(
                "no band",
                lambda h_T, c, k, C: h_T > c,
                "That is the pure threshold, as in eval. In training the count is clamped into the band. See section 10.5.",
            ),
        ),
    ),
    Exercise(
        "10.5",
        right=_best(lambda lag, noise, beta: lag**2 + noise**2),
        cases=_pursuits,
        praise="The faster the drift and the larger the batch, the shorter the best memory.",
        ideas=(
            Idea(
                "noise only",
                _best(lambda lag, noise, beta: noise),
                "You looked at the scatter alone, so the longest memory always wins. With drift it lags: add "
                "the square of d / (1 - beta). See section 10.2.",
            ),
            Idea(
                "lag only",
                _best(lambda lag, noise, beta: lag),
                "You looked at the lag alone, so no memory at all wins as soon as there is drift. Each batch's "
                "cutoff scatters: add the square of the noise. See section 10.2.",
            ),
            Idea(
                "scatter not squared",
                _best(lambda lag, noise, beta: lag**2 + noise),
                "You added a squared lag to a scatter that is not squared: different "
                "units. Square both. See section 10.2.",
            ),
            Idea(
                "lag not squared",
                _best(lambda lag, noise, beta: lag + noise**2),
                "You added a lag that is not squared to a squared scatter: different units. Square both. See section 10.2.",
            ),
            Idea(
                "nothing squared",
                _best(lambda lag, noise, beta: lag + noise),
                "You added lag and scatter as they are. Asked for is the sum of their squares: the mean squared error. See section 10.2.",
            ),
        ),
    ),
    statements(
        "10.6",
        "TFFTFF",
        says=(
            "(a) is true: in eval the line was drawn before the token came, and nothing but "
            "the token's own logit is compared with it. See section 10.6.",
            "(b) is false: the shares hold on average over the stream. One batch can take more "
            "or less, which is what the band is for. See sections 10.1 and 10.5.",
            "(c) is false: a token below every line gets no routed expert, and about a third "
            "of them do if the experts decide independently. The shared expert is there for "
            "them. See section 10.8.",
            "(d) is true: with a band or in warm-up the batch decides who gets in, so tokens "
            "compete. See section 10.5.",
            "(e) is false: forward changes nothing. One step per optimiser step, in update. "
            "See section 10.3.",
            "(f) is false: in the paper and in our run, compute does not simply grow with a "
            "token's loss. See section 10.8.",
        ),
        praise="All six. You know what the thresholds promise, and what not.",
    ),
    Exercise(
        "10.7",
        right=_hungry(),
        cases=_falls,
        praise="The lag shrinks by beta a step. A long memory starts from a larger lag and lets go of it more slowly: it pays twice.",
        ideas=(
            Idea(
                "one less",
                _hungry(count=_last_one),
                "That is the number of the last hungry batch, counted from 0. Count the batches: with n = 0 too.",
            ),
            Idea(
                "lag of one step",
                _hungry(first=lambda beta, d: d),
                "You start from a threshold that is d too high. After long sinking it is d / (1 - beta) too high. See section 10.2.",
            ),
            Idea(
                "distance from 0",
                _hungry(gap=lambda E: NormalDist().inv_cdf(1 - 0.1 / E)),
                "You compared the lag with the place of the threshold, counted from the mean. The lag counts from the right place, the quantile of 1/E: take the difference of the two.",
            ),
            Idea(
                "a tenth of all",
                _hungry(
                    gap=lambda E: abs(NormalDist().inv_cdf(0.9) - NormalDist().inv_cdf(1 - 1 / E))
                ),
                "Hungry is less than a tenth of its *share*, 0.1 / E of the tokens, not less than a tenth of all tokens.",
            ),
        ),
    ),
    write_test(
        "10.8",
        good=(fixed_thresholds, best_of_each_token, share_of_the_token),
        broken={
            "cutoff of the batch": (
                cutoff_of_the_batch,
                "Your test lets a rule pass that cuts each batch at its own k-th largest logit: expert choice. Alone, a token is the best of its batch and goes "
                "everywhere. Feed tokens one at a time and compare. See section 10.6.",
            ),
            "centred": (
                centred_first,
                "Your test lets a rule pass that takes the mean of the batch off first. Compare a batch with its tokens one at a time, on logits that are not small.",
            ),
            "first come": (
                first_come,
                "Your test lets a rule pass in which an expert takes the first forty above its threshold, and no more in this call. In a small batch nothing "
                "happens: use one long enough that an expert has more than forty.",
            ),
            "never empty": (
                never_empty,
                "Your test lets a rule pass that gives an expert its best token where a batch has none for it. It shows only where all logits are below a "
                "threshold: try a batch with low logits, too.",
            ),
            "moves with every call": (
                moves_with_every_call,
                "Your test lets a rule pass that moves its threshold in every call. The first call looks right. Ask it the same thing again after it has seen other tokens. See section 10.3.",
            ),
        },
        praise="Your test asks for the route of a token, alone and in company, and again later. That is what generation needs.",
    ),
    which(
        "10.9",
        options="ABCDE",
        right="CE",
        says={
            "A": "A is right: a step towards the mean cutoff, by the form without m of section 10.2.",
            "B": "B is right. It goes back to m, takes the step there, and corrects again.",
            "D": "D is right. It is A, written as a weighted mean of the old and the new.",
        },
        praise="C takes a step for each micro-batch, so its memory hangs on how the batch was cut. E corrects what was corrected already: where nothing moves at all, its thresholds grow.",
    ),
)
