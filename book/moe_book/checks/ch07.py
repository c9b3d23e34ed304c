"""Chapter 7: noisy top-k, Switch, GShard."""

import math

import torch

from .exercise import Exercise, Idea, statements, which, write_test

_generator = torch.Generator().manual_seed(7)

# 7.1: the K-th largest of the others, for every expert at once
_H = torch.randn(6, 5, generator=_generator)
_H2 = 3 * torch.randn(4, 8, generator=_generator)
_BY_HAND = torch.tensor([[5.0, 4.0, 3.0, 1.0], [-4.0, -1.0, -3.0, -5.0]])


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


def _minus_one(H_TE, K):
    e_TK = H_TE.topk(K, dim=-1).indices
    return H_TE.scatter(-1, e_TK, 0.0).amax(-1, keepdim=True).expand_as(H_TE)


def _zeroed_self(H_TE, K):
    others = H_TE.unsqueeze(1).repeat(1, H_TE.shape[1], 1)
    others.diagonal(dim1=1, dim2=2).zero_()
    return others.topk(K, dim=-1).values[..., -1]


def _largest_other(H_TE, K):
    return _kth_excluding(H_TE, 1)


# 7.2: the smooth load
_clean = 1.5 * torch.randn(40, 4, generator=_generator)
_std = 0.3 + torch.rand(40, 4, generator=_generator)
_noise = torch.randn(40, 4, generator=_generator)
_LOAD = (
    (
        torch.tensor([[2.0, 1.0, 0.0], [0.5, 1.0, -1.0]]),
        torch.tensor([[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]]),
        torch.tensor([[-0.2, 1.3, -0.4], [1.0, -0.5, 0.5]]),
        1,
    ),
    (_clean, _std, _noise, 2),
    (_clean, _std, _noise, 1),
    (_clean + 3, 2 * _std, _noise, 3),
)


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


def _load_times_std(h_TE, std_TE, epsilon_TE, K):
    return torch.special.ndtr((h_TE - _kth_excluding(h_TE + epsilon_TE * std_TE, K)) * std_TE).sum(
        0
    )


def _load_unscaled_noise(h_TE, std_TE, epsilon_TE, K):
    return torch.special.ndtr((h_TE - _kth_excluding(h_TE + epsilon_TE, K)) / std_TE).sum(0)


def _load_threshold_of_all(h_TE, std_TE, epsilon_TE, K):
    return torch.special.ndtr((h_TE - _kth_of_all(h_TE + epsilon_TE * std_TE, K)) / std_TE).sum(0)


def _load_sigmoid(h_TE, std_TE, epsilon_TE, K):
    return torch.sigmoid((h_TE - _kth_excluding(h_TE + epsilon_TE * std_TE, K)) / std_TE).sum(0)


def _load_density(h_TE, std_TE, epsilon_TE, K):
    z_TE = (h_TE - _kth_excluding(h_TE + epsilon_TE * std_TE, K)) / std_TE
    return (torch.exp(-(z_TE**2) / 2) / math.sqrt(2 * math.pi)).sum(0)


def _load_over_experts(h_TE, std_TE, epsilon_TE, K):
    return torch.special.ndtr((h_TE - _kth_excluding(h_TE + epsilon_TE * std_TE, K)) / std_TE).sum(
        -1
    )


def _load_mean(h_TE, std_TE, epsilon_TE, K):
    return _load(h_TE, std_TE, epsilon_TE, K) / len(h_TE)


# 7.3: from visits back to the noise
def _phi_inverse(share):
    return torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).item()


def _noise_scale(gap, share):
    return gap / (math.sqrt(2) * -_phi_inverse(share))


# 7.4: a noise that shrinks. The four logits of section 7.2, in plain formulas.
_ANSWERS = torch.tensor([1.0, 1.2, 1.4, 3.0], dtype=torch.float64)
_START = torch.tensor([1.0, 0.8, 0.6, -1.0], dtype=torch.float64)


def _learn(noise_S, seed):
    """Share of the tokens at expert 3 and loss in training, per step."""
    generator, h_E, seen, cost = torch.Generator().manual_seed(seed), _START.clone(), [], []
    for noise in noise_S:
        H_TE = h_E + noise * torch.randn(16, 4, generator=generator, dtype=torch.float64)
        top_TK, e_TK = H_TE.topk(2)
        w_TK = top_TK.softmax(-1)
        y_T1 = (w_TK * _ANSWERS[e_TK]).sum(-1, keepdim=True)
        push_TK = (3 - y_T1) * w_TK * (_ANSWERS[e_TK] - y_T1)
        h_E = h_E + 0.5 * torch.zeros_like(H_TE).scatter(1, e_TK, push_TK).mean(0)
        seen.append((e_TK == 3).any(-1).double().mean().item())
        cost.append(((y_T1 - 3) ** 2 / 2).mean().item())
    return seen, cost


def _finds_and_rests(noise_S, S):
    """Expert 3 has half of the tokens in steps 60 to 69, and the loss in training ends below 0.005, for five seeds."""
    noise_S = [float(noise) for noise in noise_S]
    if len(noise_S) != S:
        return f"Hand in one number for each of the {S} steps; yours are {len(noise_S)}."
    if not all(math.isfinite(noise) and noise >= 0 for noise in noise_S):
        return "A standard deviation is a finite number and never negative."
    runs = [_learn(noise_S, seed) for seed in range(5)]
    found = [sum(seen[60:70]) / 10 for seen, _ in runs]
    loss = [sum(cost[-20:]) / 20 for _, cost in runs]
    if min(found) < 0.5:
        return (
            f"In the worst of five seeds expert 3 sees {min(found):.0%} of the tokens in steps 60 to 69, and half is asked for. "
            "It is not found in time: it needs more noise before that, or for longer."
        )
    if max(loss) >= 0.005:
        return (
            f"Expert 3 is found in time, but in the worst of five seeds the loss in training ends at {max(loss):.3f}, and less than 0.005 is asked "
            "for. The dice still send tokens to experts that are wrong: what should the noise do once expert 3 is found?"
        )
    return True


# 7.6: jitter, right and broken
def jitter_by_rand(x, epsilon, training):
    return x * (1 - epsilon + 2 * epsilon * torch.rand_like(x)) if training else x


def jitter_by_uniform(x, epsilon, training):
    if not training:
        return x.clone()
    return x * torch.empty_like(x).uniform_(1 - epsilon, 1 + epsilon)


def _jitter_added(x, epsilon, training):
    return x + torch.empty_like(x).uniform_(1 - epsilon, 1 + epsilon) if training else x


def _jitter_always(x, epsilon, training):
    return jitter_by_rand(x, epsilon, True)


def _jitter_one_sided(x, epsilon, training):
    return x * (1 + epsilon * torch.rand_like(x)) if training else x


def _jitter_per_token(x, epsilon, training):
    return x * torch.empty_like(x[..., :1]).uniform_(1 - epsilon, 1 + epsilon) if training else x


def _jitter_frozen(x, epsilon, training):
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return x * (1 - epsilon + 2 * epsilon * u) if training else x


def _jitter_in_place(x, epsilon, training):
    return x.mul_(torch.empty_like(x).uniform_(1 - epsilon, 1 + epsilon)) if training else x


# 7.7: a fair second expert
_g = torch.tensor([0.5, 0.4, 0.25, 0.1, 0.02], dtype=torch.float64)


def _fair(g_T, c):
    return g_T / (c * g_T).clamp(max=1)


EXERCISES = (
    Exercise(
        "7.1",
        right=_kth_excluding,
        cases=((_BY_HAND, 2), (_H, 2), (_H, 1), (_H2, 3)),
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
            Idea(
                "self as zero",
                _zeroed_self,
                "You set the expert's own value to 0 instead of leaving it out. Among negative logits a 0 is the largest. Fill with "
                "-inf, or leave the column out. Reread section 7.4.",
            ),
            Idea(
                "best of the rest",
                _minus_one,
                "You took the K chosen away and then the largest of what is left, with zeros in their places. The question is asked for each "
                "expert by itself: only that one expert is left out. Reread section 7.4.",
            ),
            Idea(
                "best other",
                _largest_other,
                "You took the largest of the others whatever K is. With K places an expert is in if it beats the K-th of the others. "
                "Reread section 7.4.",
            ),
        ),
    ),
    Exercise(
        "7.2",
        right=_load,
        cases=_LOAD,
        differentiable="h_TE",
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
            Idea(
                "multiplied by sigma",
                _load_times_std,
                "You multiplied by sigma. Phi asks by how many standard deviations the logit is above the threshold: divide. "
                "Reread section 7.4.",
            ),
            Idea(
                "noise without scale",
                _load_unscaled_noise,
                "Your thresholds take the noise as it was drawn, with standard deviation 1. A noisy logit is h + sigma * epsilon. "
                "Reread section 7.1.",
            ),
            Idea(
                "threshold of all",
                _load_threshold_of_all,
                "Your threshold is the K-th largest of all experts. An expert among the K must be left out of its own threshold: use "
                "kth_excluding. Reread section 7.4.",
            ),
            Idea(
                "sigmoid",
                _load_sigmoid,
                "You used a sigmoid. The noise is normal, so the chance is Phi, the normal distribution function: torch.special.ndtr. "
                "Reread section 7.4.",
            ),
            Idea(
                "density",
                _load_density,
                "You used the height of the bell, and the chance is the area on one side of the threshold: torch.special.ndtr. "
                "Reread section 7.4.",
            ),
            Idea(
                "summed over experts",
                _load_over_experts,
                "You summed over the experts, which gives one number per token. The load is one number per expert: sum over the "
                "tokens. Reread section 7.4.",
            ),
        ),
    ),
    Exercise(
        "7.3",
        right=_noise_scale,
        cases=((2.0, 0.1), (1.0, 0.24), (1.0, 0.0786), (0.5, 0.01)),
        praise="Read backwards, the formula measures noise that nobody wrote down: the visits tell the ratio of gap and noise.",
        ideas=(
            Idea(
                "one noise only",
                lambda gap, share: gap / -_phi_inverse(share),
                "You left out that both experts have noise. The difference of two independent normal numbers has standard deviation "
                "sqrt(2) sigma. Reread the example by hand in section 7.1.",
            ),
            Idea(
                "twice the noise",
                lambda gap, share: gap / (2 * -_phi_inverse(share)),
                "You added the two standard deviations. Variances add: the difference has sqrt(2) sigma, not 2 sigma. Reread the example "
                "by hand in section 7.1.",
            ),
            Idea(
                "variance",
                lambda gap, share: _noise_scale(gap, share) ** 2,
                "That is the variance. The exercise asks for the standard deviation, which is its root. Reread section 7.1.",
            ),
            Idea(
                "negative",
                lambda gap, share: -_noise_scale(gap, share),
                "A standard deviation can't be negative. The loser is behind by the gap, so the number inside Phi is -gap / (sqrt(2) sigma). "
                "Reread section 7.1.",
            ),
            Idea(
                "upside down",
                lambda gap, share: 1 / _noise_scale(gap, share),
                "Upside down: the more noise, the more often the loser wins. Solve share = Phi(-gap / (sqrt(2) sigma)) for sigma once "
                "more. Reread section 7.1.",
            ),
            Idea(
                "forgot the gap",
                lambda gap, share: _noise_scale(1.0, share),
                "Your answer does not depend on the gap. Only the ratio of gap and noise shows in the visits. Reread section 7.1.",
            ),
            Idea(
                "softmax in place of Phi",
                lambda gap, share: gap / math.log((1 - share) / share),
                "You inverted a sigmoid. That is noise of another shape (the difference of two Gumbel numbers); here it is normal, and its "
                "distribution function is Phi. Reread section 7.1.",
            ),
        ),
    ),
    Exercise(
        "7.4",
        right=lambda S: [2 * (1 - s / S) for s in range(S)],
        cases=((150,),),
        accepts=_finds_and_rests,
        praise="Much noise while there is something to find, little once it is found.",
        ideas=(
            Idea(
                "constant, small",
                lambda S: [0.5] * S,
                "A constant noise of 0.5 finds expert 3 at about step 120, twice as late as asked for. What does the figure of section "
                "7.2 say about 1?",
            ),
            Idea(
                "constant",
                lambda S: [1.0] * S,
                "A constant noise of 1 finds expert 3 in time and then goes on asking the others: the loss in training stays above "
                "what is asked for. The noise need not be the same at every step. Reread section 7.2.",
            ),
            Idea(
                "constant, large",
                lambda S: [2.0] * S,
                "A constant noise of 2 finds expert 3 soon and then goes on asking the others, more often than a noise of 1. The noise "
                "need not be the same at every step. Reread section 7.2.",
            ),
            Idea(
                "none",
                lambda S: [0.0] * S,
                "Without noise expert 3 is never visited, so nothing can show what it is worth. Reread section 7.2.",
            ),
            Idea(
                "growing",
                lambda S: [2 * s / S for s in range(S)],
                "Your noise grows. Then expert 3 is found late, and the dice are loudest when the router already knows. Turn it around. "
                "Reread section 7.2.",
            ),
        ),
    ),
    which(
        "7.5",
        options="ABCDE",
        right="BD",
        says={
            "A": "A is Switch's own router: the probability of the chosen expert depends on all logits, so the gradient flows. What is its "
            "value: is it 1? Reread section 7.5.",
            "C": "In C the value is 1, but only the denominator is detached: its gradient is that of p divided by the number p, and not 0. It "
            "is the third row of the table in section 7.5.",
            "E": "In E the score is a sigmoid of the chosen logit alone. It moves when that logit moves: there is a gradient, on that one "
            "logit. Reread section 7.5.",
        },
        praise="One number divided by itself is 1, whichever score it was and whether the softmax comes before or after.",
    ),
    write_test(
        "7.6",
        good=(jitter_by_rand, jitter_by_uniform),
        broken={
            "added": (
                _jitter_added,
                "Your test passes a jitter that adds u. Added, it shifts every number by about 1: a zero in the input must stay a zero. "
                "Reread section 7.6.",
            ),
            "in eval": (
                _jitter_always,
                "Your test passes a jitter that is on in eval too. With training=False the output must equal the input. Reread section 7.3.",
            ),
            "one-sided": (
                _jitter_one_sided,
                "Your test passes a jitter whose factors lie between 1 and 1 + epsilon. Over many numbers some factors must be below 1, and "
                "their mean must be near 1. Reread section 7.6.",
            ),
            "one factor per token": (
                _jitter_per_token,
                "Your test passes a jitter with one factor for a whole token. That scales all logits of the token alike, so its choice never "
                "changes. Within one token the factors must differ. Reread section 7.6.",
            ),
            "always the same": (
                _jitter_frozen,
                "Your test passes a jitter that draws the same factors at every call. Call it twice in training mode: the outputs must "
                "differ. Reread section 7.6.",
            ),
            "in place": (
                _jitter_in_place,
                "Your test passes a jitter that writes into its input. The experts get the same x, without jitter: compare x before and "
                "after the call. Reread section 7.6.",
            ),
        },
        praise="Six broken versions found. The one with a factor per token looks like jitter in every number and never changes a choice.",
    ),
    Exercise(
        "7.7",
        right=_fair,
        cases=((_g, 2.0), (_g, 1.0), (_g, 4.0)),
        praise="Weight times chance must be g2. With 2 g2 as chance that is one half for every token, however small g2 is: fair, and loud.",
        ideas=(
            Idea(
                "left as it is",
                lambda g_T, c: g_T,
                "That is GShard's own weight. On average it contributes g2 times the chance of being asked, less than g2. Reread the end of "
                "section 7.8.",
            ),
            Idea(
                "not limited to 1",
                lambda g_T, c: g_T / (c * g_T),
                "You divided by c g2 even where that is above 1. A probability stops at 1: there the second is always asked, and its weight is "
                "right as it is. Reread section 7.8.",
            ),
            Idea(
                "multiplied",
                lambda g_T, c: g_T * (c * g_T).clamp(max=1),
                "You computed what the second adds on average as things stand. You are looking for the weight that makes this average g2: "
                "divide by the chance instead of multiplying. Reread section 7.8.",
            ),
            Idea(
                "always one half",
                lambda g_T, c: torch.full_like(g_T, 0.5),
                "One half is right where the chance is 2 g2. Here it is c g2, and at most 1: write weight times chance = g2 and solve. Reread "
                "section 7.8.",
            ),
            Idea(
                "the chance",
                lambda g_T, c: (c * g_T).clamp(max=1),
                "That is the chance of being asked. The weight is what must stand in front of it so that the product is g2. Reread "
                "section 7.8.",
            ),
            Idea(
                "one over the chance",
                lambda g_T, c: 1 / (c * g_T).clamp(max=1),
                "One over the chance makes the average 1. It should be g2: multiply by it. Reread section 7.8.",
            ),
            Idea(
                "square root",
                lambda g_T, c: g_T.sqrt(),
                "The root of g2 would be right if the chance were the weight itself. The chance is c g2, and at most 1. Reread "
                "section 7.8.",
            ),
        ),
    ),
    statements(
        "7.8",
        "TFFTFT",
        says=(
            "Look at (a) again. Without a visit there is no gradient, and without a gradient the row stays as it is. "
            "What else could bring a visit? Reread section 7.2.",
            "Look at (b) again. What was the spread of the load with noise and without any loss? Reread section 7.9.",
            "Look at (c) again. A softmax over a single number is 1, in whatever order it is computed. Reread section 7.5.",
            "Look at (d) again. What did the two curves do when 1000 draws were averaged? Reread section 7.4.",
            "Look at (e) again. Which comes first, the lottery or the queue? Reread section 7.8.",
            "Look at (f) again. In eval the second is always asked, and it enters with g2. What does it add on average "
            "in training? Reread section 7.8.",
        ),
        praise="You can tell what noise finds, what a loss balances, and what a weight of 1 hides.",
    ),
)
