"""Chapter 10: expert threshold."""

import math

import torch

from .exercise import Exercise, Idea, statements

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
)


def _banded(count=lambda n, k, C: min(max(n, math.ceil((1 - C) * k)), math.floor((1 + C) * k))):
    def band(h_T, c, k, C):
        n = count(int((h_T > c).sum()), k, C)
        kept_T = torch.zeros(len(h_T), dtype=torch.bool)
        kept_T[h_T.sort(descending=True).indices[:n]] = True
        return kept_T

    return band


def _earliest(h_T, c, k, C):
    above_T = h_T > c
    low, high = math.ceil((1 - C) * k), math.floor((1 + C) * k)
    if above_T.sum() < low:
        return _banded()(h_T, c, k, C)
    return above_T & (above_T.long().cumsum(0) <= high)


# 10.5: which memory
_pursuits = ((0.0, 0.1), (0.01, 0.1), (0.05, 0.1), (0.01, 0.02))
_BETAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def _best(error):
    return lambda d, s: min(
        _BETAS, key=lambda beta: error(d / (1 - beta), s * math.sqrt((1 - beta) / (1 + beta)), beta)
    )


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
                _best(lambda lag, noise, beta: lag if lag else -beta),
                "You looked at the lag alone, so no memory at all wins as soon as there is drift. Each batch's "
                "cutoff scatters: add the square of the noise. See section 10.2.",
            ),
            Idea(
                "forgot the square root",
                _best(lambda lag, noise, beta: lag**2 + noise),
                "You added a squared lag to a scatter that is not squared: different "
                "units. Square both. See section 10.2.",
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
)
