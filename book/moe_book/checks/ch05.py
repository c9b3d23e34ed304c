"""Chapter 5: collapse and the balance losses."""

import torch

from .exercise import Exercise, Idea, statements, which, write_test

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


# 5.2: the gradient of E sum P^2
def _squares_gradient(h_TE, *, mean=lambda p_TE, P_E: (p_TE * P_E).sum(-1, keepdim=True)):
    p_TE = torch.softmax(h_TE, -1)
    P_E = p_TE.mean(0)
    return 2 * h_TE.shape[1] / len(h_TE) * p_TE * (P_E - mean(p_TE, P_E))


def _scaled(gradient, by):
    return lambda h_TE: gradient(h_TE) * by(h_TE)


def _with_mean(mean):
    return lambda h_TE: _squares_gradient(h_TE, mean=mean)


def _of_balance(h_TE):
    p_TE, f_E = torch.softmax(h_TE, -1), _choices(h_TE, 1).mean(0)
    return h_TE.shape[1] / len(h_TE) * p_TE * (f_E - (p_TE * f_E).sum(-1, keepdim=True))


def _by_probabilities(h_TE):
    P_E = torch.softmax(h_TE, -1).mean(0)
    return (2 * h_TE.shape[1] / len(h_TE) * P_E).expand_as(h_TE)


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


def _zeroed(layers, real_T):
    return torch.stack([_balance(h_TE * real_T[:, None], 1) for h_TE in layers]).mean()


def _layers_with(loss):
    return lambda layers, real_T: torch.stack([loss(h_TE[real_T], 1) for h_TE in layers]).mean()


# 5.4: one GPU's part of the global batch
def _part(
    share=lambda counts, h, K: counts / counts.sum(),
    scores=lambda p, counts, K: p.sum(0) / (counts.sum() / K),
    scale=lambda h: h.shape[1],
):
    def part(h_TE, K, counts_E):
        p_TE, counts_E = torch.softmax(h_TE, -1), counts_E.to(h_TE)
        return scale(h_TE) * (share(counts_E, h_TE, K) * scores(p_TE, counts_E, K)).sum()

    return part


def _own_share(counts, h_TE, K):
    return _choices(h_TE, K).mean(0) / K


def _parts(micro, K):
    """A case for each of the micro-batches."""
    counts_E = sum(_choices(h_TE, K).sum(0) for h_TE in micro).long()
    return tuple((h_TE, K, counts_E) for h_TE in micro)


_part_cases = (
    *_parts([_h + 3 * torch.eye(4)[0], _h[:3] - 2 * torch.eye(4)[0]], 2),
    *_parts([3 * torch.eye(3)[[0, 0, 0, 1]], 3 * torch.eye(3)[[2]]], 1),
)


# 5.6: faulty losses for a test to find
def _by_counting(h_TE, K):
    E = h_TE.shape[1]
    counts_E = torch.bincount(h_TE.topk(K).indices.flatten(), minlength=E).to(h_TE)
    return E * (counts_E / counts_E.sum()) @ torch.softmax(h_TE, -1).mean(0)


def _constant(h_TE, K):
    return 1 + 0 * h_TE.sum()


def _no_gradient(h_TE, K):
    return _balance(h_TE.detach(), K)


_of_tokens = _loss(share=lambda h, K: _choices(h, K).mean(0))
_top_only = _loss(score=lambda h, K: _chosen_softmax(h, K).mean(0))
_twice = _loss(score=lambda h, K: torch.softmax(torch.softmax(h, -1), -1).mean(0))
_squares = _loss(share=lambda h, K: torch.softmax(h, -1).mean(0))
_counts_only = _loss(score=lambda h, K: _choices(h, K).mean(0) / K)
_first_only = _loss(share=lambda h, K: _choices(h, 1).mean(0))


def _weights_for_counts(h_TE, K):
    """f from the chosen probabilities instead of the counts."""
    f_E = (torch.softmax(h_TE, -1) * _choices(h_TE, K)).mean(0)
    return _loss(share=lambda h, K: f_E / f_E.sum())(h_TE, K)


EXERCISES = (
    Exercise(
        "5.1",
        right=_balance,
        cases=((_h, 1), (_h, 2), (_skewed, 3)),
        differentiable="h_TE",
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
                _first_only,
                "You counted first choices only. GShard does so; "
                "here all K slots of a token count. Reread section 5.5.",
            ),
            Idea(
                "scores alone",
                _squares,
                "You squared the mean probabilities: no count is in it. Where the router is undecided, all P are about 1/E, and the "
                "loss hardly knows who is busy. One of the two factors is the share of slots. Reread section 5.3.",
            ),
            Idea(
                "counts alone",
                _counts_only,
                "You squared the shares of slots. Counts have no gradient, so this loss measures and teaches nothing. One of the two "
                "factors is the mean probability. Reread section 5.3.",
            ),
            Idea(
                "chosen weights as counts",
                _weights_for_counts,
                "Your f adds up the probabilities of the chosen experts. It should count slots: one for each choice, however "
                "unsure. Reread section 5.3.",
            ),
            Idea(
                "softmax of the mean",
                _loss(score=lambda h, K: torch.softmax(h.mean(0), -1)),
                "You averaged the logits over tokens and took one softmax. Tokens of opposite opinions then cancel. Softmax first, "
                "token by token, then the mean. Reread section 5.3.",
            ),
        ),
    ),
    Exercise(
        "5.2",
        right=_squares_gradient,
        cases=((_h,), (_skewed,), (_h[:3] - 1,)),
        praise="The same bracket as in 5.4 with P in the place of f, and a 2 from the square: the price is the mean probability.",
        ideas=(
            Idea(
                "no 2",
                _scaled(_squares_gradient, lambda h: 0.5),
                "Half of what it should be. In E sum f P only P has a gradient; in a square both factors are P, and each gives its "
                "part. That is the 2 of d(P^2)/dP = 2 P.",
            ),
            Idea(
                "counts as prices",
                _of_balance,
                "That is the gradient of the balance loss: your prices are the shares f. This loss has no counts; the price of expert "
                "e is what E P^2 gives when you derive it by P.",
            ),
            Idea(
                "no E",
                lambda h_TE: _squares_gradient(h_TE) / h_TE.shape[1],
                "The factor E of the loss is missing: E times too small. A derivative keeps constant factors.",
            ),
            Idea(
                "sum over tokens",
                _scaled(_squares_gradient, len),
                "T times too large: P is a mean over the T tokens, so a probability of one of them has a share of 1/T in it. "
                "Reread section 5.4.",
            ),
            Idea(
                "downhill",
                _scaled(_squares_gradient, lambda h: -1),
                "That is where descent goes, minus the gradient. The logit of an expert with a large P has a positive gradient: "
                "raising it would raise the loss.",
            ),
            Idea(
                "no coupling",
                _with_mean(lambda p, P: 0.0),
                "You have price times p, so every logit of every token falls. Probabilities sum to 1: what one loses the others "
                "gain. That is the second half of the softmax's derivative. Reread section 5.4.",
            ),
            Idea(
                "by probabilities",
                _by_probabilities,
                "That is the gradient by the probabilities, not by the logits. The chain rule goes on through the softmax: times p, "
                "and minus the token's own mean. Reread section 5.4.",
            ),
            Idea(
                "everybody's mean",
                _with_mean(lambda p, P: P.square().sum()),
                "The bracket subtracts the sum of P_j P_j, the same for all tokens. Each token has its own expected price, with its "
                "own probabilities: the sum of P_j p_tj. Reread section 5.4.",
            ),
            Idea(
                "minus the even share",
                _with_mean(lambda p, P: 1 / p.shape[1]),
                "The bracket subtracts 1/E. A token compares an expert's price with what it expects to pay itself, the sum of "
                "P_j p_tj. Reread section 5.4.",
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
            Idea(
                "padding zeroed",
                _zeroed,
                "You multiplied the logits by the mask. A padding token then has zero logits, and still chooses an expert and has "
                "probabilities of 1/E. Leave it out altogether: h[real]. Reread section 5.6.",
            ),
            Idea(
                "scores alone",
                _layers_with(_squares),
                "Layers and padding are right, but your loss squares the mean probabilities. One of the factors is the share of "
                "slots. Reread section 5.3.",
            ),
            Idea(
                "no E",
                _layers_with(_loss(scale=lambda h: 1)),
                "Layers and padding are right, but the factor E is missing: at balance your loss is 1/E. Reread section 5.3.",
            ),
        ),
    ),
    Exercise(
        "5.4",
        right=_part(),
        cases=_part_cases,
        differentiable="h_TE",
        praise="The counts of all and the probabilities of your own: E whole numbers have travelled, and each token weighs the same.",
        ideas=(
            Idea(
                "own mean",
                _part(scores=lambda p, counts, K: p.mean(0)),
                "You took the mean over your own tokens, so the parts add up to as many losses as there are GPUs, and tokens of a "
                "short micro-batch weigh more. Divide by the number of all tokens; the counts hold it.",
            ),
            Idea(
                "own counts",
                _part(share=_own_share),
                "Your f comes from this micro-batch alone: that asks each of them to be balanced by itself, which forbids a router "
                "to know its subjects. f is the share in all counts. Reread section 5.6.",
            ),
            Idea(
                "own loss",
                lambda h_TE, K, counts_E: _balance(h_TE, K),
                "That is the loss of your own micro-batch; counts_E is not used. Each micro-batch then has to be balanced by itself. "
                "Reread section 5.6.",
            ),
            Idea(
                "slots for tokens",
                _part(scores=lambda p, counts, K: p.sum(0) / counts.sum()),
                "You divided the probabilities by the number of slots. A token has K of them: for K = 2 your parts add up to half. "
                "How many tokens are there, if the counts add up to so many slots?",
            ),
            Idea(
                "share of tokens",
                _part(share=lambda counts, h, K: counts / (counts.sum() / K)),
                "Your f is a share of tokens and sums to K: the scale of the Mixtral family. Ours is a share of slots. "
                "Reread section 5.5.",
            ),
            Idea(
                "no E",
                _part(scale=lambda h: 1),
                "The factor E is missing: at perfect balance your parts add up to 1/E. Reread section 5.3.",
            ),
            Idea(
                "sum of probabilities",
                _part(scores=lambda p, counts, K: p.sum(0)),
                "P is a mean over all tokens; you only added up. Divide by their number, which the counts hold.",
            ),
        ),
    ),
    which(
        "5.5",
        options="ABCDE",
        right="BD",
        says={
            "A": "A is right. The mean over tokens *and* slots of one-hot rows is the share of slots: that is the division by K.",
            "C": "C is right. A token's K largest probabilities are its choices, and E / K holds both factors.",
            "E": "E is right. The probabilities of T tokens add up to T, so dividing by both sums gives f and P.",
        },
        praise="B takes the softmax of a mean, so tokens of opposite opinions cancel. D adds up weights where it should count.",
    ),
    write_test(
        "5.6",
        good=(_balance, _by_counting),
        broken={
            "constant": (
                _constant,
                "Your test lets a loss pass that is 1 whatever the router does (an early Mixtral loss was such a constant). Try "
                "logits that are not balanced.",
            ),
            "no gradient": (
                _no_gradient,
                "Your test lets a loss pass whose value is right and through which no gradient flows. Ask for the gradient by the "
                "logits: torch.autograd.grad raises where there is none.",
            ),
            "share of tokens": (
                _of_tokens,
                "Your test lets a loss pass that is K at balance, on the scale of the Mixtral family. With K = 1 it looks right: "
                "test K = 2, too.",
            ),
            "first choices": (
                _first_only,
                "Your test lets a loss pass that counts first choices only. With K = 1 it looks right: use K = 2, and tokens that "
                "agree on the first choice and not on the second.",
            ),
            "top-K softmax": (
                _top_only,
                "Your test lets a loss pass that takes its probabilities from the K chosen experts alone. Look at the value, or at "
                "the gradient of an expert that nobody chose.",
            ),
            "softmax twice": (
                _twice,
                "Your test lets a loss pass that applies the softmax twice and so is close to 1 always. Try certainty: in full "
                "collapse the loss is E / K.",
            ),
            "scores alone": (
                _squares,
                "Your test lets E times the sum of P^2 pass, a loss without counts. At balance and in a sure collapse it is right. "
                "Try a router that is undecided and sends all tokens to one expert.",
            ),
            "chosen weights as counts": (
                _weights_for_counts,
                "Your test lets a loss pass that adds up the chosen probabilities where it should count slots. Try tokens that are "
                "not all equally sure, as the four of section 5.3.",
            ),
        },
        praise="Eight faulty losses found, two right ones passed. Two or three small cases do it, if they are neither balanced nor sure.",
    ),
    Exercise(
        "5.7",
        right=0.1,
        reads=float,
        asks="Hand in one of the five coefficients, as a number.",
        praise="0.1: uneven steps take so long that the coefficients below it see too few of them. With more time the answer changes; without a clock, 0 wins.",
        ideas=(
            Idea(
                "best per step",
                0.0,
                "Per step no balance loss is best. But its steps take about four times as long as even ones, so few of them fit into the budget. Use layer_time.",
            ),
            Idea(
                "a little",
                0.001,
                "The load is still uneven with 0.001, so the steps are slow: look at how many of the evaluations each coefficient reaches in the time you have.",
            ),
            Idea(
                "the usual one",
                0.01,
                "0.01 is what papers use, and a longer budget would choose it. In this one, how far does each coefficient get? Early steps are slow with 0.01, too.",
            ),
            Idea(
                "most even",
                1.0,
                "1 is no faster than a tenth of it and costs more quality. Compare the held-out loss that each reaches, not the load.",
            ),
        ),
    ),
    statements(
        "5.8",
        "FFFTFTF",
        says=(
            "Look at (a) again. A router can be undecided about every token and yet lean to the same expert each time. Reread section 5.2.",
            "Look at (b) again. f is a count: move a logit a little and it stays or jumps. Reread section 5.3.",
            "Look at (c) again. A token has K slots and an expert can hold one of them, so a share is at most 1/K. Reread section 5.3.",
            "Look at (d) again. A shift cancels in the softmax; does it cancel in the logsumexp? Reread section 5.7.",
            "Look at (e) again. Two layers can be collapsed in complementary ways. Reread section 5.6.",
            "Look at (f) again. Put f = 1/E into the gradient: each term is compared with itself. Reread section 5.4.",
            "Look at (g) again. A busy expert may be chosen by a hair each time. Reread the second box of section 5.3.",
        ),
        praise="Entropy, load, value and gradient: four things that are easily taken for one another.",
    ),
)
