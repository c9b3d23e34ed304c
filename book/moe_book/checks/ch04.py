"""Chapter 4: inside a transformer."""

import math

from .exercise import Exercise, Idea

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


def _first_loss(V, own_logit, repeats):
    return math.log(V - 1 + math.exp(own_logit)) - repeats * own_logit


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
        right=lambda F, K, n_shared: (K + n_shared) * F,
        cases=((96, 2, 1), (2048, 8, 1), (512, 6, 2), (64, 1, 0)),
        praise="Shared experts are visited by every token, so they count like chosen ones, and E does not appear at all.",
        ideas=(
            Idea(
                "no shared",
                lambda F, K, n_shared: K * F,
                "You counted the K routed experts only. A shared expert runs for every token "
                "too, and the twin must pay for it. Reread section 4.3.",
            ),
            Idea(
                "one expert",
                lambda F, K, n_shared: F,
                "You made the twin as wide as one expert. A token runs through K of them (and the "
                "shared ones), so this twin is K times cheaper. Reread section 4.3.",
            ),
            Idea(
                "shared only once",
                lambda F, K, n_shared: K * F + min(n_shared, 1) * F,
                "With two shared experts you counted one. Each of "
                "them is F wide and each runs for every token. Reread section 4.3.",
            ),
            Idea(
                "average",
                lambda F, K, n_shared: K * F / (1 + n_shared),
                "You divided by the shared experts. They come on top of the K "
                "chosen ones: their work adds up. Reread section 4.3.",
            ),
        ),
    ),
    Exercise(
        "4.3",
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
                "and the counter sees it. Reread section 4.5.",
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
        "4.4",
        right=_first_loss,
        cases=((256, 0.0, 0.17), (256, 1.24, 0.17), (32000, 3.0, 0.02)),
        praise="A first loss that you can predict is the cheapest test of a training script there is.",
        ideas=(
            Idea(
                "uniform",
                lambda V, own_logit, repeats: math.log(V),
                "That is the loss of a uniform guess. With an own logit above 0 the "
                "model leans towards repeating its input, and repeats are in the text. Reread section 4.8.",
            ),
            Idea(
                "bits",
                lambda V, own_logit, repeats: _first_loss(V, own_logit, repeats) / math.log(2),
                "Your number is in bits. "
                "cross_entropy uses the natural logarithm: the loss is in nats. Reread section 4.8.",
            ),
            Idea(
                "no normaliser",
                lambda V, own_logit, repeats: math.log(V) - repeats * own_logit,
                "You gave the repeated token its bonus "
                "and forgot that it is paid for: one of the V terms under the logarithm grows from 1 to exp(own_logit). Reread section 4.8.",
            ),
            Idea(
                "always repeats",
                lambda V, own_logit, repeats: math.log(V - 1 + math.exp(own_logit)) - own_logit,
                "Your loss holds if every "
                "next token were a repeat. Only a share `repeats` of them is. Reread section 4.8.",
            ),
            Idea(
                "never repeats",
                lambda V, own_logit, repeats: math.log(V - 1 + math.exp(own_logit)),
                "Your loss holds if no next token "
                "were a repeat. A share `repeats` of them is, and each gets its logit back. Reread section 4.8.",
            ),
        ),
    ),
    Exercise(
        "4.5",
        right=lambda F, K, share: math.floor(3 * F * K * share) + 1,
        cases=((96, 2, 0.125), (16, 1, 0.25), (512, 8, 0.0625)),
        praise="D cancels: whether a router is cheap depends on how wide the experts are and how many of them a token visits.",
        ideas=(
            Idea(
                "one expert",
                lambda F, K, share: math.floor(3 * F * share) + 1,
                "You compared the router with one expert. A token visits "
                "K of them. Reread section 4.5.",
            ),
            Idea(
                "two matrices",
                lambda F, K, share: math.floor(2 * F * K * share) + 1,
                "You counted two matrices per expert. A gated expert "
                "has three. Reread section 4.5.",
            ),
            Idea(
                "factor 2 once",
                lambda F, K, share: math.floor(6 * F * K * share) + 1,
                "Your E is twice too large: the factor 2 (a "
                "multiplication and an addition) stands in the router's cost as well, 2 * D * E. Reread section 4.5.",
            ),
            Idea(
                "equal",
                lambda F, K, share: math.ceil(3 * F * K * share),
                "At this E the router costs exactly the share, not more than "
                "it. The question asks for the smallest E above it: one more.",
            ),
        ),
    ),
)
