"""Chapter 6: capacity and dropping."""

import math

import torch

from .exercise import Exercise, Idea, flipped

# 6.1: how many places
_SHAPES = (
    (1024, 2, 8, 1.25),
    (1000, 2, 16, 1.1),
    (100, 3, 7, 1.0),
    (50, 2, 7, 1.25),
    (12, 2, 5, 0.5),
)


def _places(T, K, E, factor):
    return math.ceil(T * K / E * factor)


# 6.2: first come, first served
_generator = torch.Generator().manual_seed(6)
_wants = torch.tensor([0, 2, 0, 0, 1, 0, 0, 3])
_many = torch.randint(5, (60,), generator=_generator) * torch.randint(
    2, (60,), generator=_generator
)
_QUEUES = ((_wants, 4, 2), (_many, 5, 7), (_many, 5, 0))


def _place(wants_T, E):
    """How many before me want the same expert."""
    one_hot_TE = torch.nn.functional.one_hot(wants_T, E)
    return ((one_hot_TE.cumsum(0) - one_hot_TE) * one_hot_TE).sum(1)


def _first_come(wants_T, E, C):
    return _place(wants_T, E) < C


def _last_come(wants_T, E, C):
    return _first_come(wants_T.flip(0), E, C).flip(0)


# 6.3: the most certain first
_logits = torch.tensor(
    [-3.0, -1.0, -0.5, -4.0, -2.0, -0.2, -6.0, -2.5]
)  # of the chosen expert: all negative, and in no order
_drawn = torch.randn(60, generator=_generator)
_SCORED = ((_wants, _logits, 4, 2), (_many, _drawn, 5, 7), (_many, _drawn - 5, 5, 3))


def _best_first(wants_T, logit_T, E, C):
    kept_T = torch.zeros(len(wants_T), dtype=torch.bool)
    for e in range(E):
        queue = (wants_T == e).nonzero().flatten()
        kept_T[queue[logit_T[queue].argsort(descending=True, stable=True)[:C]]] = True
    return kept_T


def _against_zeros(wants_T, logit_T, E, C):
    """Each expert ranks all tokens; those who did not ask stand there with 0, and a kept place is only used by one who asked."""
    table_TE = torch.where(
        torch.nn.functional.one_hot(wants_T, E).bool(), logit_T.unsqueeze(1), 0.0
    )
    best_CE = table_TE.argsort(dim=0, descending=True, stable=True)[:C]
    picked_TE = torch.zeros_like(table_TE, dtype=torch.bool).scatter(0, best_CE, True)
    return picked_TE.gather(1, wants_T.unsqueeze(1)).squeeze(1)


def _global(wants_T, logit_T, E, C):
    kept_T = torch.zeros(len(wants_T), dtype=torch.bool)
    kept_T[
        logit_T.argsort(descending=True, stable=True)[: int(_first_come(wants_T, E, C).sum())]
    ] = True
    return kept_T


# 6.4: the factor that drops nobody
_LOADS = (
    torch.tensor([5, 1, 1, 1]),
    torch.tensor([40, 300, 12, 90, 6, 64]),
    torch.tensor([7, 7, 7]),
)

# 6.5: the layer and its residual connection
_x, _f = torch.randn(6, 3, generator=_generator), torch.randn(6, 2, 3, generator=_generator)
_w = torch.softmax(torch.randn(6, 2, generator=_generator), -1)
_kept = torch.tensor(
    [[True, True], [False, True], [True, False], [False, False], [True, True], [False, False]]
)
_BLOCKS = ((_x, _f, _w, _kept), (_x[:1], _f[:1], _w[:1], _kept[3:4]))


def _block(x_TD, f_TKD, w_TK, kept_TK):
    return x_TD + (f_TKD * (w_TK * kept_TK).unsqueeze(-1)).sum(1)


def _scaled_input(x_TD, f_TKD, w_TK, kept_TK):
    slots_TKD = torch.where(kept_TK.unsqueeze(-1), f_TKD, x_TD.unsqueeze(1))
    return x_TD + (slots_TKD * w_TK.unsqueeze(-1)).sum(1)


def _renormalised(x_TD, f_TKD, w_TK, kept_TK):
    w_TK = w_TK * kept_TK
    return x_TD + (f_TKD * (w_TK / w_TK.sum(-1, keepdim=True).clamp(min=1e-9)).unsqueeze(-1)).sum(1)


_STATEMENTS = "FTFTFT"
_flipped = flipped(_STATEMENTS)


EXERCISES = (
    Exercise(
        "6.1",
        right=_places,
        cases=_SHAPES,
        praise="Slots, not tokens, stand in the queues: T times K of them. Shared over E, times the factor, rounded up once and at the end.",
        ideas=(
            Idea(
                "K forgotten",
                lambda T, K, E, factor: math.ceil(T / E * factor),
                "You counted tokens. With K experts each, T times K slots queue up. "
                "Some libraries do leave K out, see the table in section 6.6; the formula of section 6.2 does not.",
            ),
            Idea(
                "rounded down",
                lambda T, K, E, factor: math.floor(T * K / E * factor),
                "You rounded down. Then even a perfectly even load can find "
                "too few places: 300 slots on 7 experts are 42.9 each, and 42 places drop somebody. Reread section 6.2.",
            ),
            Idea(
                "rounded too early",
                lambda T, K, E, factor: math.ceil(math.ceil(T * K / E) * factor),
                "You rounded twice: first the even share, then "
                "the product. The second rounding adds a place that the factor did not ask for. Round once, at the end. Reread section 6.2.",
            ),
            Idea(
                "K outside",
                lambda T, K, E, factor: K * math.ceil(T / E * factor),
                "You rounded the places for one choice and multiplied by K "
                "afterwards, as Tutel does (with floors). Here K belongs inside, and the rounding outside. Reread section 6.6.",
            ),
        ),
    ),
    Exercise(
        "6.2",
        right=_first_come,
        cases=_QUEUES,
        praise="A place is the number of those before you who want the same. Smaller than C: you are in. It is 0-based, and C = 0 keeps nobody.",
        ideas=(
            Idea(
                "counted from one",
                lambda wants_T, E, C: _place(wants_T, E) + 1 < C,
                "Your places begin at 1 and you compare with <, so every expert "
                "loses its last place. Count those who stand before you: the first has place 0. A known library example had this bug. Reread section 6.2.",
            ),
            Idea(
                "one place too many",
                lambda wants_T, E, C: _place(wants_T, E) <= C,
                "You let C + 1 tokens in: place C is the first that is too far "
                "back, since the places begin at 0. Reread section 6.2.",
            ),
            Idea(
                "one queue for all",
                lambda wants_T, E, C: torch.arange(len(wants_T)) < C,
                "You kept the first C tokens of the batch. Every expert has "
                "a queue of its own: count only those before you who want the same expert. Reread section 6.2.",
            ),
            Idea(
                "last come",
                _last_come,
                "You kept the latest of each queue. First come, first served keeps the earliest; the running count has to "
                "run from the first token to the last. Reread section 6.2.",
            ),
            Idea(
                "a full queue is closed",
                lambda wants_T, E, C: (torch.bincount(wants_T, minlength=E) <= C)[wants_T],
                "You turned everybody away "
                "where more than C came. The first C of them do get in. Reread section 6.2.",
            ),
        ),
    ),
    Exercise(
        "6.3",
        right=_best_first,
        cases=_SCORED,
        praise="Only those who ask are compared with each other, so the sign of the logits does not matter, and as many stay as before.",
        ideas=(
            Idea(
                "ranked against zeros",
                _against_zeros,
                "You ranked a table in which tokens that did not ask for the expert stand with 0. Negative "
                "logits then lose against tokens that do not want the place at all. Use -inf for them, or compare only those who ask. Reread section 6.4.",
            ),
            Idea(
                "least certain kept",
                lambda wants_T, logit_T, E, C: _best_first(wants_T, -logit_T, E, C),
                "You kept the smallest logits. The most certain "
                "wishes go first, so sort from large to small. Reread section 6.4.",
            ),
            Idea(
                "one ranking for all",
                _global,
                "You ranked all tokens together. The number is right, but some experts now have more than C tokens and "
                "others fewer than they could take. Each queue is ranked by itself. Reread section 6.4.",
            ),
            Idea(
                "position",
                lambda wants_T, logit_T, E, C: _first_come(wants_T, E, C),
                "You kept the earliest; the logits play no part in your "
                "answer. That is the policy of exercise 6.2. Reread section 6.4.",
            ),
        ),
    ),
    Exercise(
        "6.4",
        right=lambda load_E: float(load_E.max() * len(load_E) / load_E.sum()),
        cases=tuple((load_E,) for load_E in _LOADS),
        praise="The busiest expert over the even share: 1 + MaxVio. Imbalance and the factor you need are the same number.",
        ideas=(
            Idea(
                "MaxVio",
                lambda load_E: float(load_E.max() * len(load_E) / load_E.sum()) - 1,
                "That is MaxVio, the excess over the mean. The places "
                "for the mean itself are missing: the factor is 1 more. Reread section 6.3.",
            ),
            Idea(
                "share",
                lambda load_E: float(load_E.max() / load_E.sum()),
                "That is the busiest expert's share of all slots. A factor counts in units "
                "of the even share, which is 1/E: multiply by E. Reread section 6.3.",
            ),
            Idea(
                "count",
                lambda load_E: float(load_E.max()),
                "That is a number of places, the capacity itself. The factor is what it is in units of the even "
                "load. Reread section 6.3.",
            ),
            Idea(
                "over the smallest",
                lambda load_E: float(load_E.max() / load_E.min()),
                "You compared the busiest with the idlest expert. Capacity knows "
                "only the even share; how idle the idlest is does not matter. Reread section 6.3.",
            ),
        ),
    ),
    Exercise(
        "6.5",
        right=_block,
        cases=_BLOCKS,
        praise="A dropped slot adds exactly 0 and its weight is not handed on. A token without any slot leaves as it came.",
        ideas=(
            Idea(
                "the input takes the expert's place",
                _scaled_input,
                "You let a dropped slot add its weight times x. A dropped slot has no output, so it adds 0; "
                "the residual connection has x already. Transformers had this bug in Switch. Reread section 6.5.",
            ),
            Idea(
                "renormalised",
                _renormalised,
                "You shared out the weight of the dropped slots among the kept ones. That is a choice one could make, but it is not "
                "what capacity does: the other slot keeps the weight it had. Reread section 6.5.",
            ),
            Idea(
                "no residual connection",
                lambda x_TD, f_TKD, w_TK, kept_TK: (f_TKD * (w_TK * kept_TK).unsqueeze(-1)).sum(1),
                "That is the layer alone. A dropped "
                "token would become 0 and be lost. Add x: the residual connection carries it. Reread section 6.5.",
            ),
            Idea(
                "all or nothing",
                lambda x_TD, f_TKD, w_TK, kept_TK: (
                    x_TD + (f_TKD * (w_TK * kept_TK.all(-1, keepdim=True)).unsqueeze(-1)).sum(1)
                ),
                "You dropped the whole token when one of its slots was dropped. Slots queue one by one: the other one is still served. Reread section 6.5.",
            ),
        ),
    ),
    Exercise(
        "6.6",
        right=_STATEMENTS,
        praise="Capacity bounds the work, chooses whom to turn away, and teaches the router nothing about balance.",
        ideas=(
            Idea(
                "policies differ in number",
                _flipped[0],
                "Look at (a) again. Whatever the order of a queue, C of it stay. The policies differ in "
                "whom. Reread section 6.4.",
            ),
            Idea(
                "skew is all",
                _flipped[1],
                "Look at (b) again. At the same shares, more experts mean a smaller even share, so the busiest is further above it. "
                "Reread section 6.3.",
            ),
            Idea(
                "a large batch cures skew",
                _flipped[2],
                "Look at (c) again. A large batch smooths chance. Popularity is no chance: it grows with the batch. "
                "Reread section 6.3.",
            ),
            Idea(
                "position sees the future",
                _flipped[3],
                "Look at (d) again. Position asks who came before, so what comes later changes nothing. Score compares "
                "with later tokens too. Reread section 6.7.",
            ),
            Idea(
                "capacity stops collapse",
                _flipped[4],
                "Look at (e) again. The tokens that got in still teach the favourite, and those turned away teach nobody. Reread "
                "section 6.8.",
            ),
            Idea(
                "neighbours do not matter",
                _flipped[5],
                "Look at (f) again. The queue is made of the other tokens of the batch: with others in it, the same token may "
                "find no room. Reread section 6.7.",
            ),
        ),
    ),
)
