"""Chapter 7: noisy top-k, Switch, GShard."""

import torch
import torch.nn.functional as F

from .exercise import Exercise, Idea, flipped

# 7.1: noise, then choice, then weights
_h = torch.tensor([2.0, 1.5, 1.0, 0.0])
_raw = torch.tensor([0.3, -1.0, 0.8, 1.5])
_eps = torch.tensor([-0.9, 1.1, 0.4, 1.3])
_h2, _raw2, _eps2 = (
    torch.tensor([-1.0, 0.2, 0.1, -2.0, 0.4]),
    torch.tensor([1.0, 0.0, 2.0, 1.5, -0.5]),
    torch.tensor([1.5, -0.3, 0.2, 2.0, -1.0]),
)
_NOISY = (
    (_h, _raw, _eps, 2, True),
    (_h, _raw, _eps, 2, False),
    (_h2, _raw2, _eps2, 3, True),
    (_h2, _raw2, _eps2, 3, False),
)


def _noisy(h_E, raw_E, epsilon_E, K, training):
    H_E = h_E + epsilon_E * F.softplus(raw_E) if training else h_E
    top_K, e_K = H_E.topk(K)
    return e_K, torch.softmax(top_K, 0)


def _noise_always(h_E, raw_E, epsilon_E, K, training):
    return _noisy(h_E, raw_E, epsilon_E, K, True)


def _raw_scale(h_E, raw_E, epsilon_E, K, training):
    top_K, e_K = (h_E + epsilon_E * raw_E if training else h_E).topk(K)
    return e_K, torch.softmax(top_K, 0)


def _no_scale(h_E, raw_E, epsilon_E, K, training):
    top_K, e_K = (h_E + epsilon_E if training else h_E).topk(K)
    return e_K, torch.softmax(top_K, 0)


def _softmax_over_all(h_E, raw_E, epsilon_E, K, training):
    H_E = h_E + epsilon_E * F.softplus(raw_E) if training else h_E
    p_K, e_K = torch.softmax(H_E, 0).topk(K)
    return e_K, p_K


# 7.2: the K-th largest of the others, for every expert at once
_generator = torch.Generator().manual_seed(7)
_H = torch.randn(6, 5, generator=_generator)
_H2 = 3 * torch.randn(4, 8, generator=_generator)


def _kth_excluding(H_TE, K):
    top = H_TE.topk(K + 1, dim=-1).values
    kth, next_one = top[:, K - 1 : K], top[:, K:]
    return torch.where(H_TE >= kth, next_one, kth)


def _kth_of_all(H_TE, K):
    return H_TE.topk(K, dim=-1).values[:, K - 1 :].expand_as(H_TE)


def _next_of_all(H_TE, K):
    return H_TE.topk(K + 1, dim=-1).values[:, K:].expand_as(H_TE)


def _swapped(H_TE, K):
    top = H_TE.topk(K + 1, dim=-1).values
    return torch.where(H_TE >= top[:, K - 1 : K], top[:, K - 1 : K], top[:, K:])


# 7.3: the smooth load
_clean = 1.5 * torch.randn(40, 4, generator=_generator)
_std = 0.3 + torch.rand(40, 4, generator=_generator)
_noise = torch.randn(40, 4, generator=_generator)
_LOAD = ((_clean, _std, _noise, 2), (_clean, _std, _noise, 1), (_clean + 3, 2 * _std, _noise, 3))


def _load(h_TE, std_TE, epsilon_TE, K):
    return torch.special.ndtr((h_TE - _kth_excluding(h_TE + epsilon_TE * std_TE, K)) / std_TE).sum(
        0
    )


def _load_count(h_TE, std_TE, epsilon_TE, K):
    e_TK = (h_TE + epsilon_TE * std_TE).topk(K).indices
    return torch.zeros_like(h_TE).scatter(-1, e_TK, 1.0).sum(0)


def _load_softmaxed(h_TE, std_TE, epsilon_TE, K):
    H_TE = h_TE + epsilon_TE * std_TE
    top = torch.softmax(H_TE, -1).topk(K + 1).values
    threshold = torch.where(H_TE > top[:, K:], top[:, K:], top[:, K - 1 : K])
    return torch.special.ndtr((h_TE - threshold) / std_TE).sum(0)


def _load_noisy_own(h_TE, std_TE, epsilon_TE, K):
    H_TE = h_TE + epsilon_TE * std_TE
    return torch.special.ndtr((H_TE - _kth_excluding(H_TE, K)) / std_TE).sum(0)


def _load_clean_threshold(h_TE, std_TE, epsilon_TE, K):
    return torch.special.ndtr((h_TE - _kth_excluding(h_TE, K)) / std_TE).sum(0)


def _load_not_divided(h_TE, std_TE, epsilon_TE, K):
    return torch.special.ndtr(h_TE - _kth_excluding(h_TE + epsilon_TE * std_TE, K)).sum(0)


def _load_mean(h_TE, std_TE, epsilon_TE, K):
    return _load(h_TE, std_TE, epsilon_TE, K) / len(h_TE)


# 7.4: jitter from given uniform numbers
_x = torch.randn(2, 3, 4, generator=_generator)
_u = torch.rand(2, 3, 4, generator=_generator)


def _jitter(x_BND, u_BND, epsilon):
    return x_BND * (1 - epsilon + 2 * epsilon * u_BND)


# 7.5: experts asked per token
_p = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.1, 0.0], [0.4, 0.4, 0.2]])
_p2 = torch.softmax(2 * torch.randn(20, 8, generator=_generator), -1)


def _asked(p_TE, weigh=lambda first, second: 2 * second / (first + second)):
    first_T, second_T = p_TE.topk(2).values.unbind(-1)
    return 1 + weigh(first_T, second_T).mean()


# 7.6: statements
_STATEMENTS = "TFFTFT"
_flipped = flipped(_STATEMENTS)


EXERCISES = (
    Exercise(
        "7.1",
        right=_noisy,
        cases=_NOISY,
        praise="Noise first, in training only, scaled by a softplus; then the choice; then a softmax over the chosen.",
        ideas=(
            Idea(
                "noise in eval",
                _noise_always,
                "You add the noise in eval too. Then the model gives another answer each time it is asked. "
                "Use it only if training is True. Reread section 7.3.",
            ),
            Idea(
                "raw scale",
                _raw_scale,
                "You multiplied the noise by the raw number x W_n. A standard deviation must not be negative: it is "
                "the softplus of that number. Reread section 7.1.",
            ),
            Idea(
                "no scale",
                _no_scale,
                "You added the noise as it came, with standard deviation 1. Its scale is learned: multiply by "
                "softplus(raw). Reread section 7.1.",
            ),
            Idea(
                "softmax over all",
                _softmax_over_all,
                "Your weights are probabilities over all experts and do not sum to 1. Shazeer's router "
                "chooses first and takes the softmax over the K chosen logits. Reread section 7.1.",
            ),
        ),
    ),
    Exercise(
        "7.2",
        right=_kth_excluding,
        cases=((_H, 2), (_H, 1), (_H2, 3)),
        praise="One top-(K+1) for all: an expert inside must beat the first one outside, an expert outside the last one inside.",
        ideas=(
            Idea(
                "K-th of all",
                _kth_of_all,
                "You gave every expert the K-th largest of all. An expert that is itself among the K must be left "
                "out: then the K-th largest of the others is the (K+1)-th of all. Reread section 7.4.",
            ),
            Idea(
                "next of all",
                _next_of_all,
                "You gave every expert the (K+1)-th largest of all. That is right for those inside. An expert "
                "outside has all K of the chosen before it, so its threshold is the K-th. Reread section 7.4.",
            ),
            Idea(
                "swapped",
                _swapped,
                "Inside and outside are swapped. If an expert among the K is left out, one more of the others moves up: "
                "its threshold is the (K+1)-th of all. Reread section 7.4.",
            ),
        ),
    ),
    Exercise(
        "7.3",
        right=_load,
        cases=_LOAD,
        praise="Its own logit without noise, a threshold with noise, both in logits, divided by its own sigma, added over the tokens.",
        ideas=(
            Idea(
                "count",
                _load_count,
                "You counted who is chosen in this draw. That is the load, but it has no gradient. Ask how likely each "
                "expert is when its own noise is drawn again. Reread section 7.4.",
            ),
            Idea(
                "softmaxed thresholds",
                _load_softmaxed,
                "Your thresholds are probabilities and your values are logits. A logit of 3 is above any "
                "probability, so every expert looks chosen. Make the threshold of noisy logits. Reread section 7.4, on the bug.",
            ),
            Idea(
                "own noise kept",
                _load_noisy_own,
                "You put the noisy logit in the numerator. Its own noise is what is drawn again, so "
                "the numerator has the logit without noise. Reread section 7.4.",
            ),
            Idea(
                "clean threshold",
                _load_clean_threshold,
                "Your threshold is made of logits without noise. The noise of the others stays as it was "
                "drawn: take kth_excluding of the noisy logits. Reread section 7.4.",
            ),
            Idea(
                "not divided",
                _load_not_divided,
                "You forgot to divide by sigma. Phi asks by how many standard deviations the logit is above "
                "the threshold. Reread section 7.4.",
            ),
            Idea(
                "mean",
                _load_mean,
                "You took the mean over tokens. The load is a number of tokens: the sum. (Its CV would not mind.) "
                "Reread section 7.4.",
            ),
        ),
    ),
    Exercise(
        "7.4",
        right=_jitter,
        cases=((_x, _u, 0.1), (_x, _u, 0.01)),
        praise="Each number is scaled by its own factor between 1 - epsilon and 1 + epsilon; a zero stays a zero.",
        ideas=(
            Idea(
                "added",
                lambda x, u, epsilon: x + (1 - epsilon + 2 * epsilon * u),
                "You added the factor. It is close to 1, so every coordinate "
                "of every token moves by about 1: a shift and not a jitter. Multiply. Reread section 7.6.",
            ),
            Idea(
                "added, centred",
                lambda x, u, epsilon: x + (2 * u - 1) * epsilon,
                "You added noise around 0. That is as loud for a short token as "
                "for a long one. Jitter multiplies, so that it scales with the token. Reread section 7.6.",
            ),
            Idea(
                "one-sided",
                lambda x, u, epsilon: x * (1 + epsilon * u),
                "Your factor lies between 1 and 1 + epsilon, so it makes tokens longer on average. "
                "It must lie evenly on both sides of 1. Reread section 7.6.",
            ),
            Idea(
                "half as wide",
                lambda x, u, epsilon: x * (1 - epsilon / 2 + epsilon * u),
                "Your factor is between 1 - epsilon/2 and 1 + epsilon/2. The "
                "whole range is 2 epsilon wide. Reread section 7.6.",
            ),
        ),
    ),
    Exercise(
        "7.5",
        right=_asked,
        cases=((_p,), (_p2,)),
        praise="One expert always, the second in 2 g2 of the cases, with g2 out of the two chosen.",
        ideas=(
            Idea(
                "not renormalised",
                lambda p_TE: _asked(p_TE, lambda first, second: 2 * second),
                "You used the second probability as it is. "
                "g2 is renormalised over the two chosen: p2 / (p1 + p2). Reread section 7.8.",
            ),
            Idea(
                "without the 2",
                lambda p_TE: _asked(p_TE, lambda first, second: second / (first + second)),
                "You asked with probability g2. As g2 is at most "
                "one half, the code asks with 2 g2: an even pair is always asked. Reread section 7.8.",
            ),
            Idea(
                "always two",
                lambda p_TE: _asked(p_TE, lambda first, second: torch.ones_like(first)),
                "You got 2: that is eval, or a router without the "
                "lottery. In training the second is asked only in 2 g2 of the cases. Reread section 7.8.",
            ),
            Idea(
                "second only",
                lambda p_TE: _asked(p_TE) - 1,
                "You counted second experts only. The first is always asked: add 1. Reread section 7.8.",
            ),
        ),
    ),
    Exercise(
        "7.6",
        right=_STATEMENTS,
        praise="You can tell what noise finds, what a loss balances, and what a weight of 1 hides.",
        ideas=(
            Idea(
                "noise finds nothing",
                _flipped[0],
                "Look at (a) again. Without a visit there is no gradient, and without a gradient the row stays as it is. "
                "What else could bring a visit? Reread section 7.2.",
            ),
            Idea(
                "noise balances",
                _flipped[1],
                "Look at (b) again. What was the spread of the load with noise and without any loss? Reread section 7.9.",
            ),
            Idea(
                "softmax heals",
                _flipped[2],
                "Look at (c) again. A softmax over a single number is 1, in whatever order it is computed. "
                "Reread section 7.5.",
            ),
            Idea(
                "estimate and count differ",
                _flipped[3],
                "Look at (d) again. What did the two curves do when 1000 draws were averaged? Reread section 7.4.",
            ),
            Idea(
                "capacity decides the lottery",
                _flipped[4],
                "Look at (e) again. Which comes first, the lottery or the queue? Reread section 7.8.",
            ),
            Idea(
                "same in eval",
                _flipped[5],
                "Look at (f) again. In eval the second is always asked, and it enters with g2. What does it add on average "
                "in training? Reread section 7.8.",
            ),
        ),
    ),
)
