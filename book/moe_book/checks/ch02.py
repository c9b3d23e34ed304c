"""Chapter 2: the router."""

import math

import torch

from .exercise import Exercise, Idea, statements, which, write_test

# 2.1: one token's route
_logits = torch.tensor([0.5, 2.0, -1.0, 1.5])
_negative = torch.tensor([-3.0, -1.0, -2.5, -0.5, -4.0])


def _route(weigh):
    def route(h_E, K):
        top, index = h_E.topk(K)
        return index, weigh(h_E, top, index)

    return route


def _masked_with_zeros(h_E, top, index):
    masked_E = torch.zeros_like(h_E)
    masked_E[index] = top
    return torch.softmax(masked_E, 0)[index]


# 2.2: the gradient that reaches each logit
_h, _f = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 3.0, 10.0])
_h2, _f2 = torch.tensor([0.3, -0.8, 1.1, 0.9]), torch.tensor([2.0, -1.0, 0.5, 4.0])
_GRADIENTS = (
    (_h, _f, 2, True),
    (_h2, _f2, 2, False),
    (_h2, _f2, 3, True),
    (_h, _f, 1, True),
    (_h2, _f2, 1, False),
)


def _parts(h_E, f_E, K, norm):
    """The chosen as a 0/1 mask, the weights (0 where not chosen), the probabilities, and y."""
    chosen_E = torch.zeros_like(h_E)
    chosen_E[h_E.topk(K).indices] = 1
    p_E = torch.softmax(h_E, 0)
    w_E = p_E * chosen_E
    w_E = w_E / w_E.sum() if norm else w_E
    return chosen_E, w_E, p_E, (w_E * f_E).sum()


def _gradient(h_E, f_E, K, norm):
    chosen_E, w_E, p_E, y = _parts(h_E, f_E, K, norm)
    return w_E * (f_E - y) if norm else p_E * (chosen_E * f_E - y)


def _no_coupling(h_E, f_E, K, norm):
    return _parts(h_E, f_E, K, norm)[1] * f_E


def _never_renormalised(h_E, f_E, K, norm):
    return _gradient(h_E, f_E, K, False)


def _chosen_only(h_E, f_E, K, norm):
    chosen_E, w_E, _, y = _parts(h_E, f_E, K, norm)
    return w_E * (f_E - y)


def _all_outputs(h_E, f_E, K, norm):
    _, w_E, p_E, y = _parts(h_E, f_E, K, norm)
    return w_E * (f_E - y) if norm else p_E * (f_E - y)


# 2.3: the temperature that makes a router as sure as asked
_generator = torch.Generator().manual_seed(2)
_h_TE = 2 * torch.randn(6, 4, generator=_generator)
_wide_TE = 3 * torch.randn(20, 8, generator=_generator) + 5


def _token_entropy(p_TE):
    return -(p_TE * p_TE.clamp(min=1e-30).log()).sum(-1)


def _temperature(
    sure=lambda p: _token_entropy(p).mean(), soften=lambda h, t: h / t, turn=lambda t: t
):
    """Bisection, on the logarithm of the temperature."""

    def temperature_for(h_TE, H):
        low, high = math.log(1e-3), math.log(1e3)
        for _ in range(60):
            middle = (low + high) / 2
            p_TE = torch.softmax(soften(h_TE.double(), math.exp(middle)), -1)
            low, high = (middle, high) if sure(p_TE) < H else (low, middle)
        return turn(math.exp(middle))

    return temperature_for


def _as_sure_as_asked(temperature, h_TE, H):
    temperature = float(temperature)
    if not 0 < temperature < math.inf:
        return "A temperature is a number above 0."
    got = _token_entropy(torch.softmax(h_TE.double() / temperature, -1)).mean().item()
    side = "too hot" if got > H else "too cold"
    return (
        abs(got - H) < 0.01
        or f"That is {side}: the mean entropy becomes {got:.3f} nats, and {H} were asked for."
    )


# 2.5: ties that break the same way everywhere
_ties = (
    (torch.zeros(2, 5), 2),
    (torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0005, 2.0, 2.0]]), 3),
    (torch.tensor([[-1.0, -1.0, 7.0, 7.0]]), 3),
    (torch.tensor([[0.2, 0.4, 0.4]]), 2),
    (torch.zeros(3, 64), 8),
)


def _stable(h_TE, K):
    return torch.sort(h_TE, dim=-1, descending=True, stable=True).indices[:, :K]


def _last_wins(h_TE, K):
    return torch.sort(h_TE, dim=-1, stable=True).indices.flip(-1)[:, :K]


def _rising(h_TE, K):
    return torch.sort(h_TE, dim=-1, stable=True).indices[:, :K]


def _nudged(h_TE, K):
    return torch.topk(h_TE - 1e-3 * torch.arange(h_TE.shape[-1]), K).indices


# 2.7: routes whose numbers are right and whose gradient is not
def _short_way(h_E, K):
    top_K, index_K = h_E.topk(K)
    return index_K, torch.softmax(top_K, -1)


def _long_way(h_E, K):
    p_K, index_K = torch.softmax(h_E, -1).topk(K)
    return index_K, p_K / p_K.sum()


def _detached(h_E, K):
    index_K, w_K = _short_way(h_E, K)
    return index_K, w_K.detach()


def _sum_detached(h_E, K):
    p_K, index_K = torch.softmax(h_E, -1).topk(K)
    return index_K, p_K / p_K.sum().detach()


def _half_a_gradient(h_E, K):
    index_K, w_K = _short_way(h_E, K)
    return index_K, (w_K + w_K.detach()) / 2


def _first_only(h_E, K):
    index_K, w_K = _short_way(h_E, K)
    return index_K, torch.cat([w_K[:1], w_K[1:].detach()])


def _probabilities(h_E, K):
    p_K, index_K = torch.softmax(h_E, -1).topk(K)
    return index_K, p_K


def _swapped_sign(h_E, K):
    index_K, w_K = _short_way(h_E, K)
    return index_K, 2 * w_K.detach() - w_K


EXERCISES = (
    Exercise(
        "2.1",
        right=_route(lambda h, top, index: torch.softmax(top, 0)),
        cases=((_logits, 2), (_negative, 2), (_negative, 3)),
        praise="Choose first, then a softmax over the chosen: the same as the softmax over all, renormalised.",
        ideas=(
            Idea(
                "not renormalised",
                _route(lambda h, top, index: torch.softmax(h, 0)[index]),
                "Your weights are probabilities over all "
                "experts and do not sum to 1. That is norm_topk_prob=False; here the K weights must sum to 1. Reread section 2.2.",
            ),
            Idea(
                "softmax twice",
                _route(lambda h, top, index: torch.softmax(torch.softmax(h, 0)[index], 0)),
                "You applied a softmax to "
                "probabilities. They lie between 0 and 1, so the second softmax makes them almost equal. Apply it to logits, once. "
                "Reread section 2.2.",
            ),
            Idea(
                "masked with zeros",
                _route(_masked_with_zeros),
                "You set the logits of the others to 0 before the softmax. But e to the "
                "0 is 1, not 0: they still take part, and with negative logits they even win. Use -inf, or only the K logits. "
                "Reread section 2.2.",
            ),
            Idea(
                "equal weights",
                _route(lambda h, top, index: torch.full_like(top, 1 / len(top))),
                "All your weights are 1/K. Then no "
                "gradient reaches the router: the weights are its only way. Reread section 2.7.",
            ),
        ),
    ),
    Exercise(
        "2.2",
        right=_gradient,
        cases=_GRADIENTS,
        praise="Renormalised, only the chosen compete, and with K = 1 nobody does: exactly zero. Otherwise every logit hears of y.",
        ideas=(
            Idea(
                "no coupling",
                _no_coupling,
                "You have w times f. That would be right if each weight depended on its own logit "
                "alone. The weights share a denominator: raise one and the others fall. That is where the minus y comes from. "
                "Reread section 2.7.",
            ),
            Idea(
                "never renormalised",
                _never_renormalised,
                "You used the softmax over all experts in both cases. When the weights are "
                "renormalised, the others cancel: their gradient is 0, and with K = 1 so is that of the chosen one. Reread section 2.7.",
            ),
            Idea(
                "always renormalised",
                lambda h_E, f_E, K, norm: _gradient(h_E, f_E, K, True),
                "You renormalised in both cases. Without it every weight is divided by the sum over all experts, so y is smaller "
                "and the unchosen get a gradient too. Reread section 2.7.",
            ),
            Idea(
                "chosen only",
                _chosen_only,
                "You gave the logits of the others a gradient of 0 in both cases. Without renormalisation "
                "they stand in the denominator of every weight, so they get minus p times y. Reread section 2.7.",
            ),
            Idea(
                "all outputs",
                _all_outputs,
                "You used the outputs of experts that never ran. In y only the chosen ones appear, so for "
                "the others there is no f: their gradient is minus p times y. Reread section 2.7.",
            ),
        ),
    ),
    Exercise(
        "2.3",
        right=_temperature(),
        accepts=_as_sure_as_asked,
        tolerance=0.02,
        cases=((_h_TE, 1.0), (_h_TE, 0.3), (_wide_TE, 0.5), (_wide_TE, 1.9)),
        praise="One number turns a sure router into an unsure one, and no choice changes. Entropy rises with temperature, so halving the interval finds it.",
        ideas=(
            Idea(
                "times temperature",
                _temperature(turn=lambda t: 1 / t),
                "You have one over the temperature: your search multiplies the logits. It divides: hot is flat, cold is sharp. "
                "Reread section 2.3.",
            ),
            Idea(
                "bits",
                _temperature(sure=lambda p: _token_entropy(p).mean() / math.log(2)),
                "Your entropy is in bits. We count in nats: use the natural logarithm. Reread section 2.3.",
            ),
            Idea(
                "entropy of the mean",
                _temperature(sure=lambda p: _token_entropy(p.mean(0))),
                "You averaged the probabilities first. That entropy asks whether the load is even over many tokens, not whether "
                "each token is sure. Take the entropy of each token, then the mean. Reread section 2.3.",
            ),
            Idea(
                "sum",
                _temperature(sure=lambda p: _token_entropy(p).sum()),
                "You added up the tokens. Take their mean, so that the answer does not depend on how many there are.",
            ),
            Idea(
                "probabilities divided",
                _temperature(soften=lambda h, t: torch.softmax(h, -1) / t),
                "You divided the probabilities by the temperature. It belongs to the logits, before the softmax. Reread section 2.3.",
            ),
        ),
    ),
    statements(
        "2.4",
        "FFTFTF",
        says=(
            "Look at (a) again. A shift multiplies all exponentials by the same number, and a softmax divides it out. "
            "Reread section 2.2.",
            "Look at (b) again. Doubling keeps the order of the logits, and the choice is the order. Reread section 2.3.",
            "Look at (c) again. Doubling the matrix doubles the logits and their distances; that is half the temperature. "
            "Reread section 2.3.",
            "Look at (d) again. Renormalised weights are a softmax over the K chosen logits. The others appear nowhere in it. "
            "Reread section 2.7.",
            "Look at (e) again. Each weight is divided by a sum over all experts, and there stand the logits of the others. "
            "Reread section 2.7.",
            "Look at (f) again. A logit is one thing, an expert's matrices another. An expert that did not run is in no formula, "
            "so its matrices get nothing. Reread section 2.7.",
        ),
        praise="Choice, weights and gradient are three different questions, and you told them apart.",
    ),
    Exercise(
        "2.5",
        right=_stable,
        cases=_ties,
        praise="The order is now part of your code and not of a kernel's mood: it will be the same when the layer is recomputed.",
        ideas=(
            Idea(
                "plain topk",
                lambda h_TE, K: torch.topk(h_TE, K).indices,
                "topk gives the right logits, and among equal ones whichever its kernel meets first. Here that was not the lowest "
                "number. It has no option for it: sort instead, with stable=True. Reread section 2.5.",
            ),
            Idea(
                "last wins",
                _last_wins,
                "Among equals your highest number wins. You sorted upwards and read backwards, which turns the "
                "ties around. Sort downwards with stable=True. Reread section 2.5.",
            ),
            Idea(
                "rising",
                _rising,
                "You have the smallest logits, in rising order. The largest come first: descending=True. Reread section 2.4.",
            ),
            Idea(
                "nudge",
                _nudged,
                "You made ties impossible by taking a little off each logit. That also turns real differences around: "
                "2.0005 lost to 2.0. Nudge nothing; sort with stable=True. Reread section 2.5.",
            ),
            Idea(
                "order lost",
                lambda h_TE, K: _stable(h_TE, K).sort(-1).values,
                "The right experts, but listed by number. The slots of "
                "a token run from the largest logit to the smallest. Reread section 2.4.",
            ),
        ),
    ),
    which(
        "2.6",
        options="ABCDE",
        right="BE",
        says={
            "A": "A is right: choosing first and then a softmax over the chosen is the same function. Reread section 2.2.",
            "C": "C is right: it takes the same number off all logits of a token, and a softmax does not see that. Reread section 2.2.",
            "D": "D is right, though it looks like a softmax twice: logarithms of probabilities are logits, shifted by one number "
            "a token. Reread section 2.2.",
        },
        praise="B overflows for large logits: infinity by infinity is no number, and a shift is what a softmax takes off first. E divides by the sum over all tokens, which one token alone does not show.",
    ),
    write_test(
        "2.7",
        good=(_short_way, _long_way),
        broken={
            "detached": (
                _detached,
                "One broken version passes: its weights are right and detached, so no gradient reaches the router. Let the test "
                "call backward, with experts that answer different numbers.",
            ),
            "sum detached": (
                _sum_detached,
                "One broken version passes: there is a gradient, but the sum in the denominator is detached, so w times f is "
                "not coupled. Compare the gradient with w (f - y), for the unchosen too. Reread section 2.7.",
            ),
            "half a gradient": (
                _half_a_gradient,
                "One broken version passes: its gradient has the right direction and half the size. Compare numbers.",
            ),
            "first only": (
                _first_only,
                "One broken version passes: only the first weight carries a gradient, the others are detached. With experts "
                "that answer 1 and 0 this can hide; give every one a number of its own.",
            ),
            "not renormalised": (
                _probabilities,
                "One broken version passes: its weights don't sum to 1. Test the values as well as the gradient.",
            ),
            "wrong sign": (
                _swapped_sign,
                "One broken version passes: its gradient points the other way, so training makes it worse. Its values and the "
                "size of its gradient are right: compare signs.",
            ),
        },
        praise="It finds all six. Five of them give the right numbers, so a test of the output alone would have passed them, and the router would have learned nothing or the wrong thing.",
    ),
)
