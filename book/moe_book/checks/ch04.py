"""Chapter 4: inside a transformer."""

import math

import torch

from .exercise import Exercise, Idea, statements, which, write_test

_MODELS = [
    (64, 96, 8, 2, 2, 256),
    (512, 256, 64, 8, 6, 32000),
    (128, 64, 4, 1, 3, 100),
]  # D, F, E, K, L, V


def _active(experts=lambda E, K: K, matrices=3, router=lambda E, K: E, embeddings=1, norms=True):
    def count(D, F, E, K, L, V):
        layer = 4 * D * D + experts(E, K) * matrices * D * F + router(E, K) * D + 2 * D * norms
        return L * layer + D * norms + embeddings * V * D

    return count


_SPEND = [
    (64, 128, 96, 8, 2, 2, 256),
    (512, 2048, 256, 64, 8, 6, 32000),
    (128, 64, 64, 4, 1, 3, 100),
]  # D, N, F, E, K, L, V


def _flops(
    two=2,
    experts=lambda E, K: K,
    matrices=3,
    scores=True,
    router=True,
    combine=True,
    head=True,
    projections=4,
):
    def count(D, N, F, E, K, L, V):
        attention = projections * D * D + 2 * N * D * scores
        feed_forward = experts(E, K) * matrices * D * F + D * E * router + K * D * combine
        return two * (L * (attention + feed_forward) + D * V * head)

    return count


# 4.3: where attention overtakes
_WIDTHS = (
    (64, 96, 2),
    (512, 256, 8),
    (4096, 14336, 2),
    (256, 64, 1),
    (10, 35, 1),
    (32, 128, 1),
)  # D, F, K


def _longer(numbers=lambda D, F, K: 3 * F * K / 2 - 2 * D, floor=1, above=True):
    def count(D, F, K):
        bound = numbers(D, F, K)
        return max(floor, math.floor(bound) + 1 if above else math.ceil(bound))

    return count


# 4.4: how many seeds
_EFFECTS = ((0.1, 0.03), (0.04, 0.03), (0.05, 0.05), (0.03, 0.05), (0.4, 0.2))
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 2 to 10 seeds
_MOST_SEEDS = 60
_power = {}


def _resolved(effect, spread, S):
    """Share of experiments with S seeds whose 95 % interval has zero outside, on the right side."""
    ratio = effect / spread
    if (ratio, S) not in _power:
        generator = torch.Generator().manual_seed(4)
        d_XS = torch.randn(20_000, S, generator=generator, dtype=torch.float64) + ratio
        t = _T95[S - 2] if S <= 10 else 1.96 + 2.7 / (S - 1)
        low_X = d_XS.mean(1) - t * d_XS.std(1) / S**0.5
        _power[ratio, S] = (low_X > 0).double().mean().item()
    return _power[ratio, S]


def _seeds(effect, spread):
    return next(S for S in range(2, _MOST_SEEDS) if _resolved(effect, spread, S) >= 0.8)


def _seeds_accept(S, effect, spread):
    S = S.item() if isinstance(S, torch.Tensor) else S
    if isinstance(S, bool) or int(S) != S or S < 2:
        return "A number of seeds is a whole number, and an interval needs two at least."
    S, least = int(S), _seeds(effect, spread)
    share = _resolved(effect, spread, min(S, _MOST_SEEDS))
    if S < least and share < 0.78:
        return f"With {S} seeds, {share:.0%} of our simulated experiments had zero outside their interval: too few."
    if S > least and _resolved(effect, spread, min(S, _MOST_SEEDS) - 1) > 0.82:
        return f"With {S} seeds it is more than eight of ten, but fewer seeds would have done. Runs are dear."
    return True


# 4.6: layers to be tested
def _pointwise(x_BND):
    return x_BND * torch.sigmoid(x_BND.sum(-1, keepdim=True))


def _running_mean(x_BND):
    n_N1 = torch.arange(1, x_BND.shape[1] + 1).unsqueeze(-1)
    return x_BND.cumsum(1) / n_N1


def _first_come(x_BND):
    """A queue inside each sequence: the first few tokens that want the expert get it."""
    wants_BN = x_BND.sum(-1) > 0
    served_BN = wants_BN & (wants_BN.cumsum(1) <= 2)
    return x_BND * served_BN.unsqueeze(-1)


def _expert_chooses(x_BND):
    """The expert takes the better half of each sequence."""
    score_BN = x_BND.sum(-1)
    line_B1 = score_BN.median(1, keepdim=True).values
    return x_BND * (score_BN >= line_B1).unsqueeze(-1)


def _next_token(x_BND):
    ahead = torch.cat([x_BND[:, 1:], torch.zeros_like(x_BND[:, :1])], 1)
    return x_BND + 0.5 * ahead


def _last_token(x_BND):
    """The first position looks at the last one, and no other position does."""
    y_BND = x_BND.clone()
    y_BND[:, 0] = y_BND[:, 0] + 0.5 * x_BND[:, -1]
    return y_BND


def _queue_of_the_batch(x_BND):
    """First come, first served, in one queue for the whole batch; half of it has places."""
    wants_BN = x_BND.sum(-1) > 0
    place_BN = wants_BN.flatten().cumsum(0).view_as(wants_BN)
    return x_BND * (wants_BN & (place_BN <= wants_BN.numel() // 4)).unsqueeze(-1)


def _batch_mean(x_BND):
    """Takes off the mean of the batch at each position: no look ahead, only to the side."""
    return x_BND - x_BND.mean(0, keepdim=True)


EXERCISES = (
    Exercise(
        "4.1",
        right=_active(),
        cases=tuple(_MODELS),
        praise="That is the number of parameters one token is multiplied with. Say which convention you used whenever you quote one.",
        ideas=(
            Idea(
                "total",
                _active(experts=lambda E, K: E),
                "That is the total: you counted all E experts. A token visits K of them in each "
                "layer. Reread section 4.6.",
            ),
            Idea(
                "router by K",
                _active(router=lambda E, K: K),
                "You let a token use K rows of the router. It needs all E: without every "
                "logit nobody knows which K are the largest. Reread section 4.5.",
            ),
            Idea(
                "no router",
                _active(router=lambda E, K: 0),
                "The router is missing: D * E numbers in each layer, used by every token. "
                "Reread section 4.6.",
            ),
            Idea(
                "embedding twice",
                _active(embeddings=2),
                "You counted the embedding and the head. In this model they are one tied "
                "matrix, so V * D stands only once. Reread section 4.6.",
            ),
            Idea(
                "no embedding",
                _active(embeddings=0),
                "Your number leaves the embedding out. Papers do that too, it is one of three "
                "conventions; here the tied matrix counts once, for it is also the head. Reread section 4.6.",
            ),
            Idea(
                "no norms",
                _active(norms=False),
                "Almost: each block has two norms with D numbers each, and one more stands before the "
                "head. Reread section 4.6.",
            ),
            Idea(
                "two matrices",
                _active(matrices=2),
                "You counted two matrices per expert. A gated expert has three: gate, up and down. "
                "Reread section 4.5.",
            ),
        ),
    ),
    Exercise(
        "4.2",
        right=_flops(),
        cases=tuple(_SPEND),
        praise="To the FLOP. From here you can price any model of this family before you train it.",
        ideas=(
            Idea(
                "multiplications",
                _flops(two=1),
                "Your number is exactly half: you counted multiplications. Each comes with an addition, "
                "so a matrix with n numbers costs 2n FLOPs per token. Reread section 4.5.",
            ),
            Idea(
                "all experts",
                _flops(experts=lambda E, K: E),
                "You ran every token through all E experts. It visits K. Reread section 4.5.",
            ),
            Idea(
                "no scores",
                _flops(scores=False),
                "The attention scores are missing: every token is compared with N positions and mixes N "
                "values, 4 * N * D in each layer. torch's counter misses them too on a CPU. Reread section 4.5.",
            ),
            Idea(
                "no head",
                _flops(head=False),
                "The head is missing. Looking a byte up in the embedding is free, but producing V logits "
                "with the same matrix costs 2 * D * V. Reread section 4.5.",
            ),
            Idea(
                "no router",
                _flops(router=False),
                "The router is missing: 2 * D * E in each layer. Reread section 4.5.",
            ),
            Idea(
                "no combine",
                _flops(combine=False),
                "Nearly. Adding up K outputs with their weights costs 2 * K * D in each layer: small, "
                "and torch's counter does not see it, for it is no matrix product. Reread section 4.5.",
            ),
            Idea(
                "two matrices",
                _flops(matrices=2),
                "You counted two matrices per expert. A gated expert has three. Reread section 4.5.",
            ),
            Idea(
                "three projections",
                _flops(projections=3),
                "You counted queries, keys and values. Attention has a fourth D x D matrix, its "
                "output projection. Reread section 4.5.",
            ),
        ),
    ),
    Exercise(
        "4.3",
        right=_longer(),
        cases=_WIDTHS,
        praise="From this length on most of the work is attention, and an MoE saves on the smaller part. D counts against the experts: the "
        "projections are there at any length.",
        ideas=(
            Idea(
                "scores only",
                _longer(lambda D, F, K: 3 * F * K / 2),
                "You compared the experts with the attention scores alone. The four projections are attention's, too: 8 * D * D. Reread section 4.5.",
            ),
            Idea(
                "one expert",
                _longer(lambda D, F, K: 3 * F / 2 - 2 * D),
                "You compared with one expert. A token visits K of them. Reread section 4.5.",
            ),
            Idea(
                "two matrices",
                _longer(lambda D, F, K: F * K - 2 * D),
                "You counted two matrices per expert. A gated expert has three: 6 * D * F * K. Reread section 4.5.",
            ),
            Idea(
                "scores once",
                _longer(lambda D, F, K: 3 * F * K - 4 * D),
                "You counted 2 * N * D for the scores. There are N dot products, and then a sum of N values: twice that. Reread section 4.5.",
            ),
            Idea(
                "half of the projections",
                _longer(lambda D, F, K: 3 * F * K / 2 - D),
                "You counted 4 * D * D for the projections: those are the numbers in the matrices, and each costs two FLOPs. Reread section 4.5.",
            ),
            Idea(
                "equal",
                _longer(above=False),
                "At this length attention costs as much as the experts, in the cases where the bound is a whole number. Asked is the first length "
                "at which it costs more: one more there.",
            ),
            Idea(
                "no token",
                _longer(floor=-(10**9)),
                "Your formula goes below 1 where the projections alone cost more than the experts. A sequence has at least one token.",
            ),
        ),
    ),
    Exercise(
        "4.4",
        right=_seeds,
        cases=_EFFECTS,
        accepts=_seeds_accept,
        praise="So many seeds, before the first run. With three, only an effect of three or four times its own spread would be seen most of the time.",
        ideas=(
            Idea(
                "three",
                lambda effect, spread: 3,
                "You take three, always, as we do. With three seeds t is 4.3, so only an effect much larger than its spread between seeds gets its zero outside the interval. Simulate, and look how often it does.",
            ),
            Idea(
                "half of the time",
                lambda effect, spread: max(2, math.ceil((1.96 * spread / effect) ** 2)),
                "You made the interval as wide as the effect. Then the mean lands on either side of that line about equally often, and every other "
                "experiment shows nothing. Asked are eight of ten.",
            ),
            Idea(
                "normal in place of t",
                lambda effect, spread: max(2, math.ceil((2.8 * spread / effect) ** 2)),
                "You took the formula for a spread that is known: (1.96 + 0.84)² times (spread / effect)². The spread is estimated from the same few "
                "seeds, so the interval is wider: t instead of 1.96. Simulate it with t.",
            ),
            Idea(
                "signs only",
                lambda effect, spread: 5,
                "You take five, always. How many it takes depends on the effect in units of its spread: a few for a large one, dozens for a small one.",
            ),
        ),
    ),
    which(
        "4.5",
        options="ABCDE",
        right="AD",
        says={
            "B": "B is right: it is the formula of section 4.8, line by line.",
            "C": "C is right. cross_entropy wants the classes in dimension 1, so the transpose is needed, and the shift is there.",
            "E": "E is right: the last position has a target of -100, and that is what cross_entropy leaves out by default.",
        },
        praise="A glues the sequences together before it shifts, so the last position of each predicts the first byte of a stranger: a small error "
        "that no first loss gives away. D shifts the wrong way and asks for the byte before, which attention has seen.",
    ),
    write_test(
        "4.6",
        good=(_pointwise, _running_mean, _first_come),
        broken={
            "looks at the next token": (
                _next_token,
                "One layer got through that adds something of the next token. A test sees it if it changes one token and asks whether any earlier "
                "output moved. Reread section 4.7.",
            ),
            "one position looks far ahead": (
                _last_token,
                "One layer got through in which only the first position looks at the last one. A test sees it if it compares all earlier positions, "
                "not only the neighbour of the changed one. Reread section 4.7.",
            ),
            "the expert chooses": (
                _expert_chooses,
                "One layer got through in which the expert takes the better half of each sequence. A small change may leave the ranking as it "
                "is: change the last token by much, or try many inputs. Reread section 4.7.",
            ),
            "one queue for the batch": (
                _queue_of_the_batch,
                "One layer got through in which all sequences stand in one queue. It does not look ahead; it looks to the side. A test sees it if "
                "another sequence of the batch is changed, by much. Reread section 4.7.",
            ),
            "mean of the batch": (
                _batch_mean,
                "One layer got through that takes off the mean over the batch. A test sees it if another sequence is changed and the outputs of "
                "this one are compared. Reread section 4.7.",
            ),
        },
        praise="No way from later tokens, none from other sequences: your test holds for any layer. Run it on every router you meet; chapter 9 has "
        "one that fails.",
    ),
    statements(
        "4.7",
        "TFTFFT",
        says=(
            "Look at (a) again. A token visits K experts of width F, however many there are to choose from. Only the router grows. Reread section 4.5.",
            "Look at (b) again. The MoE adds 0 to the residual stream, and the stream carries the token on. Reread section 4.4.",
            "Look at (c) again. The counter is blind to one of the two programs; the multiplications are done in both. Reread section 4.5.",
            "Look at (d) again. The MoE has its routers besides: L * D * E numbers that every token is multiplied with. Reread section 4.6.",
            "Look at (e) again. Only the scores grow with N; projections, experts and head cost a token what they cost. Reread section 4.5.",
            "Look at (f) again. The optimiser goes through all parameters in every step: decay and momentum move also those without a gradient. "
            "Reread section 4.11.",
        ),
        praise="You know what is counted, what is carried, and what is touched.",
    ),
)
