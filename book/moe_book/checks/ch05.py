"""Chapter 5: collapse and the balance losses."""

import torch

from .exercise import Exercise, Idea, flipped

_generator = torch.Generator().manual_seed(5)
_h = 2 * torch.randn(7, 4, generator=_generator)
_skewed = torch.randn(9, 5, generator=_generator) + torch.tensor([2.0, 0.5, 0.0, 0.0, -1.0])


def _choices(h_TE, K):
    """(T, E): 1 where the token takes the expert."""
    return torch.zeros_like(h_TE).scatter(-1, h_TE.topk(K).indices, 1.0)


# 5.1: the loss itself
def _loss(
    share=lambda h, K: _choices(h, K).mean(0) / K,
    score=lambda h, K: torch.softmax(h, -1).mean(0),
    scale=lambda h: h.shape[-1],
):
    return lambda h_TE, K: scale(h_TE) * (share(h_TE, K) * score(h_TE, K)).sum()


_balance = _loss()


def _chosen_softmax(h_TE, K):
    return torch.softmax(h_TE.masked_fill(_choices(h_TE, K) == 0, -torch.inf), -1)


# 5.2: its gradient
def _gradient(h_TE, K):
    p_TE, f_E = torch.softmax(h_TE, -1), _choices(h_TE, K).mean(0) / K
    expected_T1 = (p_TE * f_E).sum(-1, keepdim=True)
    return h_TE.shape[1] / len(h_TE) * p_TE * (f_E - expected_T1)


def _no_coupling(h_TE, K):
    return h_TE.shape[1] / len(h_TE) * torch.softmax(h_TE, -1) * _choices(h_TE, K).mean(0) / K


def _no_softmax(h_TE, K):
    return (h_TE.shape[1] / len(h_TE) * _choices(h_TE, K).mean(0) / K).expand_as(h_TE)


def _only_chosen(h_TE, K):
    return _gradient(h_TE, K) * _choices(h_TE, K)


# 5.3: many layers, and padding
_layers = [torch.randn(6, 4, generator=_generator) + 4 * torch.eye(4)[e] for e in (0, 2)]
_real = torch.tensor([True, True, False, True, False, True])
_padded = [torch.randn(5, 3, generator=_generator) for _ in range(3)]
for _layer in _padded:
    _layer[3:] = torch.tensor([0.0, 0.0, 6.0])
_padded_real = torch.tensor([True, True, True, False, False])


def _model(layers, real_T):
    return torch.stack([_balance(h_TE[real_T], 1) for h_TE in layers]).mean()


def _padding_in_scores(layers, real_T):
    return torch.stack(
        [_loss(share=lambda h, K: _choices(h[real_T], K).mean(0))(h_TE, 1) for h_TE in layers]
    ).mean()


# 5.4: other libraries' coefficients
_VALUE = {
    "huggingface": lambda E, K: K,
    "fairscale": lambda E, K: 1 / E**2,
    "megatron": lambda E, K: 1,
}
_COEFFICIENTS = (
    (0.01, "huggingface", 8, 2),
    (0.001, "huggingface", 128, 8),
    (0.64, "fairscale", 8, 1),
    (0.02, "megatron", 64, 6),
)


def _coefficient(convert):
    return lambda coefficient, convention, E, K: convert(
        coefficient, _VALUE[convention](E, K), convention, E
    )


# 5.6: z-loss
_z_cases = (
    (torch.zeros(3, 8), torch.tensor([True, True, False])),
    (_h, torch.tensor([True, False, True, True, True, False, True])),
    (_skewed + 3, torch.ones(9, dtype=torch.bool)),
    (torch.cat([_h[:4] - 2, torch.zeros(4, 4)]), torch.arange(8) < 4),
)


def _z(prepare=lambda h: h, reduce=lambda z, real: z[real].square().mean()):
    return lambda h_TE, real_T: reduce(torch.logsumexp(prepare(h_TE), -1), real_T)


# 5.7: micro-batches
_micro = ([_h + 3 * torch.eye(4)[0], _h[:3] - 2 * torch.eye(4)[0]], 2)
_one_each = ([3 * torch.eye(3)[[0, 0, 0, 1]], 3 * torch.eye(3)[[2]]], 1)


def _global(micro, K):
    return _balance(torch.cat(micro), K)


def _mean_of_losses(micro, K):
    return torch.stack([_balance(h_TE, K) for h_TE in micro]).mean()


def _unweighted(shares, scores):
    def loss(micro, K):
        every = torch.cat(micro)
        f_E = (
            torch.stack([_choices(h, K).mean(0) / K for h in micro]).mean(0)
            if shares
            else _choices(every, K).mean(0) / K
        )
        P_E = (
            torch.stack([torch.softmax(h, -1).mean(0) for h in micro]).mean(0)
            if scores
            else torch.softmax(every, -1).mean(0)
        )
        return every.shape[1] * (f_E * P_E).sum()

    return loss


_STATEMENTS = "FFFTFT"
_flipped = flipped(_STATEMENTS)


EXERCISES = (
    Exercise(
        "5.1",
        right=_balance,
        cases=((_h, 1), (_h, 2), (_skewed, 3)),
        praise="Counts for f, all probabilities for P, times E: 1 at perfect balance, whatever E and K are.",
        ideas=(
            Idea(
                "share of tokens",
                _loss(share=lambda h, K: _choices(h, K).mean(0)),
                "Your f is the share of tokens that take an expert. "
                "It sums to K, so your loss is K at perfect balance: the scale of the Mixtral family. Ours counts slots: divide by K. "
                "Reread section 5.5.",
            ),
            Idea(
                "top-K softmax",
                _loss(score=lambda h, K: _chosen_softmax(h, K).mean(0)),
                "Your P comes from a softmax over the K chosen "
                "experts alone. Then an expert nobody chose has no gradient, and those are the experts the loss is for. P needs the softmax "
                "over all E. Reread section 5.3.",
            ),
            Idea(
                "softmax twice",
                _loss(score=lambda h, K: torch.softmax(torch.softmax(h, -1), -1).mean(0)),
                "You applied a softmax to "
                "probabilities. That makes P almost equal for all experts and the loss almost 1, whatever the router does. "
                "Reread 'Mistakes people make'.",
            ),
            Idea(
                "no E",
                _loss(scale=lambda h: 1),
                "The factor E is missing: at perfect balance your loss is 1/E, so its strength would "
                "fall as experts are added. Reread section 5.3.",
            ),
            Idea(
                "mean over experts",
                _loss(scale=lambda h: 1 / h.shape[-1]),
                "You took the mean over experts where the formula has E times "
                "the sum. That is the scale of GShard's paper and of fairscale: 1/E^2 at perfect balance. Reread section 5.5.",
            ),
            Idea(
                "first choices only",
                _loss(share=lambda h, K: _choices(h, 1).mean(0)),
                "You counted first choices only. GShard does so; "
                "here all K slots of a token count. Reread section 5.5.",
            ),
        ),
    ),
    Exercise(
        "5.2",
        right=_gradient,
        cases=((_h, 1), (_h, 2), (_skewed, 2)),
        praise="Each logit is compared with the load that this token expects to meet. At perfect balance nothing is left to compare.",
        ideas=(
            Idea(
                "no coupling",
                _no_coupling,
                "You have E/T times p times f, so every logit of every token falls, even that of an idle "
                "expert. Probabilities sum to 1: what one loses the others gain. That is the term minus the sum of f p. Reread section 5.4.",
            ),
            Idea(
                "no softmax",
                _no_softmax,
                "That is the gradient by the probabilities, not by the logits. The chain rule goes on through the "
                "softmax: times p, and minus the token's own mean. Reread section 5.4.",
            ),
            Idea(
                "sum over tokens",
                lambda h_TE, K: _gradient(h_TE, K) * len(h_TE),
                "T times too large: P is a mean over the T tokens, so "
                "each of them has a share of 1/T. Reread section 5.4.",
            ),
            Idea(
                "downhill",
                lambda h_TE, K: -_gradient(h_TE, K),
                "That is where descent goes, minus the gradient. A busy expert's logit "
                "has a positive gradient: raising it would raise the loss. Reread section 5.4.",
            ),
            Idea(
                "chosen experts only",
                _only_chosen,
                "You set the gradient of the experts a token did not choose to zero. P is a mean "
                "over all experts' probabilities: that is how an idle one hears of it. Reread section 5.3.",
            ),
        ),
    ),
    Exercise(
        "5.3",
        right=_model,
        cases=(
            (_layers, torch.ones(6, dtype=torch.bool)),
            (_layers, _real),
            (_padded, _padded_real),
        ),
        praise="One loss for each layer, over real tokens, and only then the mean: nothing can hide behind another layer.",
        ideas=(
            Idea(
                "pooled layers",
                lambda layers, real_T: _balance(torch.cat([h[real_T] for h in layers]), 1),
                "You put the tokens of all "
                "layers into one heap. Expert 0 of one layer and expert 0 of another share nothing but a number, and two collapsed layers "
                "can look balanced together. One loss for each layer first. Reread section 5.6.",
            ),
            Idea(
                "padding counted",
                lambda layers, real_T: torch.stack([_balance(h, 1) for h in layers]).mean(),
                "Padding took part. All padding "
                "tokens look alike and go to one expert, so you would balance something that is no text. Keep only h[real]. "
                "Reread section 5.6.",
            ),
            Idea(
                "padding in P",
                _padding_in_scores,
                "You left padding out of the counts f and kept it in the mean P. It must leave both. "
                "Reread section 5.6.",
            ),
            Idea(
                "sum of layers",
                lambda layers, real_T: _model(layers, real_T) * len(layers),
                "You added up the layers. That is a fair "
                "choice, many libraries make it, but here the mean is asked for: with a sum the value at balance is the number of layers.",
            ),
        ),
    ),
    Exercise(
        "5.4",
        right=_coefficient(lambda c, value, name, E: c * value),
        cases=_COEFFICIENTS,
        tolerance=1e-9,
        praise="Coefficient times value at balance stays the same: that product is the real strength.",
        ideas=(
            Idea(
                "wrong direction",
                _coefficient(lambda c, value, name, E: c / value),
                "You divided where you should multiply. Their loss is "
                "`value` times ours, so to pull as hard with ours, the coefficient has to be `value` times theirs. Reread section 5.5.",
            ),
            Idea(
                "same number",
                _coefficient(lambda c, value, name, E: c),
                "You copied the number. Their loss has another size than ours, so "
                "the same number pulls K times or E^2 times harder or softer. Reread section 5.5.",
            ),
            Idea(
                "E once",
                _coefficient(lambda c, value, name, E: c / E if name == "fairscale" else c * value),
                "Fairscale takes a mean over "
                "experts of f P without the factor E. That loses E twice: 1/E^2 at balance. Reread section 5.5.",
            ),
        ),
    ),
    Exercise(
        "5.5",
        right=lambda load_E: load_E.var(correction=0) / load_E.mean() ** 2,
        cases=(
            (torch.tensor([4.0, 2.0, 1.0, 1.0]),),
            (torch.tensor([3.0, 3.0, 3.0]),),
            (torch.tensor([8.0, 0.0, 0.0, 0.0, 2.0]),),
        ),
        praise="0.375 for [4, 2, 1, 1], and E - 1 when one expert has everything.",
        ideas=(
            Idea(
                "unbiased",
                lambda load_E: load_E.var() / load_E.mean() ** 2,
                "You divided by E - 1, torch's default. The experts are all "
                "there are, not a sample of more: divide by E, with correction=0. For [4, 2, 1, 1] that is 0.375 and not 0.5. "
                "Reread section 5.5.",
            ),
            Idea(
                "not squared",
                lambda load_E: load_E.std(correction=0) / load_E.mean(),
                "That is the coefficient of variation itself. The "
                "loss is its square: variance over squared mean. Reread section 5.5.",
            ),
            Idea(
                "variance",
                lambda load_E: load_E.var(correction=0),
                "A variance grows with the number of tokens. Divide by the squared mean "
                "and it does not. Reread section 5.5.",
            ),
            Idea(
                "mean not squared",
                lambda load_E: load_E.var(correction=0) / load_E.mean(),
                "Variance over mean still grows with the "
                "number of tokens: divide by the square of the mean. Reread section 5.5.",
            ),
        ),
    ),
    Exercise(
        "5.6",
        right=_z(),
        cases=_z_cases,
        praise="Zero logits give (ln E)^2, a shift changes it, and padding has no say.",
        ideas=(
            Idea(
                "of probabilities",
                _z(prepare=lambda h: torch.softmax(h, -1)),
                "You took the logsumexp of probabilities. They lie between "
                "0 and 1 whatever the logits do, so this loss sees nothing of their size. Use the logits. Reread section 5.7.",
            ),
            Idea(
                "padding counted",
                _z(reduce=lambda z, real: z.square().mean()),
                "Padding took part: a padding token with zeroed logits adds "
                "(ln E)^2 and pulls nothing. Average over the real tokens. Reread section 5.7.",
            ),
            Idea(
                "divided by all",
                _z(reduce=lambda z, real: z[real].square().sum() / len(real)),
                "You left padding out of the sum and kept it "
                "in the number you divide by. Divide by the number of real tokens. Reread section 5.7.",
            ),
            Idea(
                "mean before square",
                _z(reduce=lambda z, real: z[real].mean().square()),
                "You averaged first and squared then. Tokens with "
                "+5 and -5 would cancel. Square each token's logsumexp first. Reread section 5.7.",
            ),
            Idea(
                "not squared",
                _z(reduce=lambda z, real: z[real].mean()),
                "The square is missing. Without it the loss falls without end as "
                "the logits go to minus infinity. Reread section 5.7.",
            ),
        ),
    ),
    Exercise(
        "5.7",
        right=_global,
        cases=(_micro, _one_each, ([_skewed, _skewed[:2], _skewed[:4]], 3)),
        praise="Counts and probabilities over all tokens, as if they had come in one batch: each token weighs the same.",
        ideas=(
            Idea(
                "micro-batch loss",
                _mean_of_losses,
                "That is the mean of the micro-batches' own losses: each of them has to be balanced by "
                "itself, which forbids a router to know its subjects. Take f over all of them. Reread section 5.6.",
            ),
            Idea(
                "mean of shares",
                _unweighted(True, False),
                "You averaged the shares f of the micro-batches. They differ in size: a token of a "
                "short one would weigh more. Add up counts, then divide. Reread section 5.6.",
            ),
            Idea(
                "unweighted",
                _unweighted(True, True),
                "You averaged f and P over micro-batches as if all were equally long. A token of a "
                "short one then weighs more. Add up first, then divide. Reread section 5.6.",
            ),
            Idea(
                "P unweighted",
                _unweighted(False, True),
                "The counts are right. But P is averaged over micro-batches, as if all were equally "
                "long: average over tokens. Reread section 5.6.",
            ),
        ),
    ),
    Exercise(
        "5.8",
        right=_STATEMENTS,
        praise="Entropy, load, value and gradient: four things that are easily taken for one another.",
        ideas=(
            Idea(
                "entropy is balance",
                _flipped[0],
                "Look at (a) again. A router can be undecided about every token and yet lean to the same "
                "expert each time. Reread section 5.2.",
            ),
            Idea(
                "counts have gradients",
                _flipped[1],
                "Look at (b) again. f is a count: move a logit a little and it stays or jumps. "
                "Reread section 5.3.",
            ),
            Idea(
                "collapse is E",
                _flipped[2],
                "Look at (c) again. A token has K slots and an expert can hold one of them, so a share is at "
                "most 1/K and the loss E/K. Reread section 5.3.",
            ),
            Idea(
                "shift invariant",
                _flipped[3],
                "Look at (d) again. A shift cancels in the softmax, but the logsumexp grows by it. "
                "Reread section 5.7.",
            ),
            Idea(
                "pooled is enough",
                _flipped[4],
                "Look at (e) again. Two layers can be collapsed in complementary ways. Reread section 5.6.",
            ),
            Idea(
                "always pushes",
                _flipped[5],
                "Look at (f) again. Put f = 1/E into the gradient: each term is compared with itself. "
                "Reread section 5.4.",
            ),
        ),
    ),
)
