"""Chapter 6: capacity and dropping."""

import math

import torch

from .exercise import Exercise, Idea, statements, which, write_test

# 6.1: drops and empty places by hand
_BY_SEQUENCE = ((4, 5, 0, 3), (8, 0, 4, 0))  # slots per expert in each of two sequences


def _four(answer) -> tuple | None:
    """Four numbers out of (4, 12, 5, 13), ((4, 12), (5, 13)), a list or a tensor."""
    numbers = torch.as_tensor(answer).flatten().tolist()
    return tuple(numbers) if len(numbers) == 4 else None


# First come, first served: used below
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


# 6.2: the most certain first
_logits = torch.tensor(
    [-3.0, -1.0, -0.5, -4.0, -2.0, -0.2, -6.0, -2.5]
)  # of the chosen expert: all negative, and in no order
_drawn = torch.randn(60, generator=_generator)
_SCORED = (
    (_wants, _logits, 4, 2),
    (_many, _drawn, 5, 7),
    (_many, _drawn - 5, 5, 3),
    (_wants[:3], _logits[:3], 4, 5),  # more places than tokens
)


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


def _first_of_all(wants_T, logit_T, E, C):
    kept_T = torch.zeros(len(wants_T), dtype=torch.bool)
    kept_T[logit_T.argsort(descending=True, stable=True)[: C * E]] = True
    return kept_T


def _place_as_token(wants_T, logit_T, E, C):
    """The numbers that a sort of the queue gives, taken for numbers of the batch."""
    kept_T = torch.zeros(len(wants_T), dtype=torch.bool)
    for e in range(E):
        kept_T[logit_T[wants_T == e].argsort(descending=True, stable=True)[:C]] = True
    return kept_T


# 6.3: the layer and its residual connection
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


def _layer(f_TKD, w_TK, kept_TK):
    return (f_TKD * (w_TK * kept_TK).unsqueeze(-1)).sum(1)


# 6.4: a factor for batches that have not come yet
def _stream(chance_E, slots, seed, bursts=0.0):
    """A function of how many batches -> (S, E) loads; a share ``bursts`` of them sends two slots of three to expert 0."""
    chance_E = torch.tensor(chance_E, dtype=torch.float64)
    burst_E = torch.full_like(chance_E, 1 / 3 / (len(chance_E) - 1))
    burst_E[0] = 2 / 3
    draw = torch.Generator().manual_seed(seed)

    def batches(S):
        odd_S = torch.arange(S) % 100 < 100 * bursts
        rows = [
            torch.multinomial(burst_E if odd else chance_E, slots, True, generator=draw)
            for odd in odd_S.tolist()
        ]
        return torch.stack([row.bincount(minlength=len(chance_E)) for row in rows])

    return batches


def _loads():
    streams = (
        _stream([1.0] * 32, 160, 1),
        _stream([4.0, 2, 2, 2, 2, 2, 1, 1], 1024, 2),
        _stream([1.0] * 8, 512, 3, bursts=0.01),
    )
    return tuple((stream(200), stream(400)) for stream in streams)


_STREAMS = _loads()  # (seen, to come)


def _rate(load_SE, factor) -> float:
    """Share of the slots dropped."""
    slots, E = int(load_SE[0].sum()), load_SE.shape[-1]
    C = math.ceil(slots / E * factor)
    return float((load_SE - C).clamp(min=0).sum() / load_SE.sum())


def _choose(load_SE):
    return next(f / 100 for f in range(100, 6400) if _rate(load_SE, f / 100) <= 0.01)


def _good_factor(factor, load_SE):
    factor = float(factor)
    fresh_SE = next(fresh for seen, fresh in _STREAMS if torch.equal(seen, load_SE))
    rate, needed = _rate(fresh_SE, factor), _choose(fresh_SE)
    if rate > 0.0125:
        return f"With a factor of {factor:.2f}, {rate:.1%} of the slots of other batches of this stream are dropped."
    if factor > 1.1 * needed:
        return (
            f"With a factor of {factor:.2f} no more than {rate:.2%} of the slots of other batches are dropped, but you pay for "
            f"{factor / needed - 1:.0%} more places than 1 % asks for."
        )
    return True


def _busiest(load_SE):
    """(S,) the factor that each batch would need to drop nobody."""
    return load_SE.amax(-1) / load_SE.double().mean(-1)


# 6.6: layers to be tested: 4 experts, one for each entry of x; the largest entry decides, its softmax is the weight
_FACTORS = torch.tensor([2.0, 3.0, 5.0, 7.0])  # expert e multiplies by this


def _served(x_TD, kept_T):
    wants_T = x_TD.argmax(-1)
    p_T = x_TD.softmax(-1).gather(-1, wants_T.unsqueeze(-1)).squeeze(-1)
    return (p_T * _FACTORS.to(x_TD)[wants_T] * kept_T).unsqueeze(-1) * x_TD


def _good_layer(x_TD, C):
    return _served(x_TD, _first_come(x_TD.argmax(-1), 4, C))


def _good_loop(x_TD, C):
    """Token after token; the last of a queue is turned away here too, but by counting down the places that are left."""
    free, y_TD = [C] * 4, torch.zeros_like(x_TD)
    for t, row in enumerate(x_TD):
        e = int(row.argmax())
        if free[e] > 0:
            free[e] -= 1
            y_TD[t] = row.softmax(-1)[e] * _FACTORS[e] * row
    return y_TD


def _good_by_score(x_TD, C):
    """Another policy: the surest first."""
    wants_T = x_TD.argmax(-1)
    return _served(x_TD, _best_first(wants_T, x_TD.amax(-1), 4, C))


def _copies(x_TD, C):
    p_T1 = x_TD.softmax(-1).amax(-1, keepdim=True)
    kept_T = _first_come(x_TD.argmax(-1), 4, C)
    return torch.where(kept_T.unsqueeze(-1), _served(x_TD, kept_T), p_T1 * x_TD)


def _everybody(x_TD, C):
    return _served(x_TD, torch.ones(len(x_TD), dtype=torch.bool) & (C > 0))


def _closed(x_TD, C):
    wants_T = x_TD.argmax(-1)
    return _served(x_TD, (wants_T.bincount(minlength=4) <= C)[wants_T])


def _one_short(x_TD, C):
    return _served(x_TD, _place(x_TD.argmax(-1), 4) + 1 < C)


# 6.7: the gradient at a dropped slot
_pull_w = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
_pull_kept = torch.tensor(
    [[True, False], [False, True], [True, True], [False, False], [True, False]]
)
_pull_a = torch.tensor([[4.0, 1.0], [2.0, -3.0], [1.0, 5.0], [3.0, 2.0], [-2.0, 6.0]])
_PULLS = ((_pull_w, _pull_kept, _pull_a), (_pull_w[:1], _pull_kept[:1], _pull_a[:1]))


def _pull(w_TK, kept_TK, a_TK):
    y_T1 = (w_TK * kept_TK * a_TK).sum(-1, keepdim=True)
    return w_TK * (kept_TK * a_TK - y_T1)


EXERCISES = (
    Exercise(
        "6.1",
        right=(4, 12, 5, 13),
        reads=_four,
        asks="Hand in four numbers: dropped and empty for the batch, then dropped and empty for the sequences.",
        praise="Places are counted from the tokens that queue together: 24 slots give 8 places, 12 give 4. The queue per sequence drops one "
        "more and leaves one more empty: a short queue is less even.",
        ideas=(
            Idea(
                "rounded down",
                (5, 9, 9, 9),
                "You rounded the places down. 7.5 places are 8, and 3.75 are 4: with fewer than the formula says, even a perfectly even "
                "load could lose somebody. Reread section 6.2.",
            ),
            Idea(
                "the batch's places for a sequence",
                (4, 12, 0, 40),
                "You gave each sequence the places of the whole batch. With a queue per sequence, C is counted from the slots of that "
                "sequence alone. Reread section 6.7.",
            ),
            Idea(
                "a sequence's places for the batch",
                (9, 1, 5, 13),
                "You gave the whole batch the places of one sequence. With one queue for the batch, C is counted from all its slots. "
                "Reread section 6.7.",
            ),
            Idea(
                "scope is all the same",
                (4, 12, 4, 12),
                "You took the same numbers for both. A place that one sequence leaves empty cannot serve the other, once each has its own "
                "queues. Count each sequence by itself. Reread section 6.7.",
            ),
            Idea(
                "empty without the dropped",
                (4, 8, 5, 8),
                "You took all slots off the places. Those that were dropped fill none: empty places are places minus the slots that got in. "
                "Reread section 6.2.",
            ),
            Idea(
                "one sequence",
                (4, 12, 1, 5),
                "For the second pair you counted the first sequence only. Add the second. Reread section 6.7.",
            ),
            Idea(
                "exchanged",
                (12, 4, 13, 5),
                "The numbers are right and exchanged: first the dropped, then the empty. Reread the exercise.",
            ),
        ),
    ),
    Exercise(
        "6.2",
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
                "largest absolute value",
                lambda wants_T, logit_T, E, C: _best_first(wants_T, logit_T.abs(), E, C),
                "You ranked by the absolute value. A logit of -6 is a weak wish, not a strong one. Reread section 6.4.",
            ),
            Idea(
                "one ranking for all",
                _global,
                "You ranked all tokens together. The number is right, but some experts now have more than C tokens and "
                "others fewer than they could take. Each queue is ranked by itself. Reread section 6.4.",
            ),
            Idea(
                "as many as there are places",
                _first_of_all,
                "You kept the best of the whole batch, as many as all experts have places. A place at an expert is of use only to those who "
                "want that expert: rank each queue by itself. Reread section 6.4.",
            ),
            Idea(
                "C in all",
                lambda wants_T, logit_T, E, C: _first_of_all(wants_T, logit_T, 1, C),
                "You kept C tokens in all. C is the number of places of *each* expert. Reread section 6.2.",
            ),
            Idea(
                "place in the queue taken for the token",
                _place_as_token,
                "A sort of one queue numbers the tokens within that queue. You used these numbers as if they were places in the batch: look "
                "up which token stands there. Reread section 6.4.",
            ),
            Idea(
                "the dropped ones",
                lambda wants_T, logit_T, E, C: ~_best_first(wants_T, logit_T, E, C),
                "That is the exact opposite: True where a token is turned away. The answer says who gets in. Reread the exercise.",
            ),
            Idea(
                "position",
                lambda wants_T, logit_T, E, C: _first_come(wants_T, E, C),
                "You kept the earliest; the logits play no part in your "
                "answer. That is the policy `position`. Reread section 6.4.",
            ),
        ),
    ),
    Exercise(
        "6.3",
        right=_block,
        cases=_BLOCKS,
        differentiable="w_TK",
        praise="A dropped slot adds exactly 0 and its weight is not handed on. A token without any slot leaves as it came.",
        ideas=(
            Idea(
                "the mask has no effect",
                lambda x_TD, f_TKD, w_TK, kept_TK: x_TD + (f_TKD * w_TK.unsqueeze(-1)).sum(1),
                "Your answer does not depend on kept_TK: every slot is served. Multiply by it, so that a dropped slot adds 0. Reread section 6.5.",
            ),
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
                lambda x_TD, f_TKD, w_TK, kept_TK: _layer(f_TKD, w_TK, kept_TK),
                "That is the layer alone. A dropped "
                "token would become 0 and be lost. Add x: the residual connection carries it. Reread section 6.5.",
            ),
            Idea(
                "a dropped token becomes 0",
                lambda x_TD, f_TKD, w_TK, kept_TK: (
                    (x_TD + _layer(f_TKD, w_TK, kept_TK)) * kept_TK.any(-1, keepdim=True)
                ),
                "A token without any slot leaves your block as 0. The *layer* gives 0 there; x is added all the same. Reread section 6.5.",
            ),
            Idea(
                "a dropped token is doubled",
                lambda x_TD, f_TKD, w_TK, kept_TK: (
                    x_TD + _layer(f_TKD, w_TK, kept_TK) + x_TD * (~kept_TK.any(-1, keepdim=True))
                ),
                "A token without any slot leaves your block as 2x: you passed x on as the layer's output, and the residual connection "
                "added it again. Reread section 6.5.",
            ),
            Idea(
                "x once for each slot",
                lambda x_TD, f_TKD, w_TK, kept_TK: (
                    w_TK.shape[1] * x_TD + _layer(f_TKD, w_TK, kept_TK)
                ),
                "You added x once for each slot. The residual connection goes around the whole layer: once. Reread section 6.5.",
            ),
            Idea(
                "weights forgotten",
                lambda x_TD, f_TKD, w_TK, kept_TK: x_TD + _layer(f_TKD, 1 + 0 * w_TK, kept_TK),
                "You added the experts' outputs without their weights. Reread section 6.5.",
            ),
            Idea(
                "all or nothing",
                lambda x_TD, f_TKD, w_TK, kept_TK: (
                    x_TD + _layer(f_TKD, w_TK, kept_TK & kept_TK.all(-1, keepdim=True))
                ),
                "You dropped the whole token when one of its slots was dropped. Slots queue one by one: the other one is still served. Reread section 6.5.",
            ),
        ),
    ),
    Exercise(
        "6.4",
        right=_choose,
        cases=tuple((seen,) for seen, _ in _STREAMS),
        accepts=_good_factor,
        praise="You let the batches vote with their slots, not with their maxima: chance in a small batch, a standing favourite and a rare burst "
        "ask for different factors, and no rule of thumb fits all three.",
        ideas=(
            Idea(
                "the mean load",
                lambda load_SE: float(_busiest(load_SE.double().mean(0, keepdim=True))[0]),
                "You averaged the loads over the batches first. That removes chance, but each batch has a chance of its own, and it is the "
                "single batch that overflows. Reread section 6.3.",
            ),
            Idea(
                "the worst batch",
                lambda load_SE: float(_busiest(load_SE).max()),
                "That is what the worst batch so far would have needed to drop nobody. One odd batch in a hundred then decides what you pay in "
                "every batch. A slot in a hundred may be lost: use that. Reread section 6.3.",
            ),
            Idea(
                "the mean of the busiest",
                lambda load_SE: float(_busiest(load_SE).mean()),
                "That is 1 + MaxVio, averaged over batches: about half the batches drop nobody at all. It says how far the busiest expert is above the "
                "mean, not how many slots stand there. Count the slots that a factor drops. Reread section 6.3.",
            ),
            Idea(
                "1.25 always",
                lambda load_SE: 1.25,
                "You took 1.25, as Switch trains. Whether it fits depends on the load, and these three streams differ. Reread section 6.3.",
            ),
            Idea(
                "2 always",
                lambda load_SE: 2.0,
                "You took 2, as Switch evaluates. Whether it fits depends on the load, and these three streams differ. Reread section 6.3.",
            ),
        ),
    ),
    which(
        "6.5",
        options="ABCDE",
        right="BE",
        says={
            "A": "A counts, for each token, the earlier ones with the same wish: `tril(-1)` leaves out the token itself. It needs T x T memory, but it is right.",
            "C": "C counts the token itself, so the first has number 1, and it compares with <=. Two changes that cancel: it is right.",
            "D": "D lines up the queues by a stable sort and subtracts where each begins. That is how the package does it.",
        },
        praise="B counts the token itself and compares with <, so each expert loses its last place. E counts in int8, which ends at 127: the next "
        "count is -128, and that is below any C. It passes every test with a short queue, and then drops nobody it should.",
    ),
    write_test(
        "6.6",
        good=(_good_layer, _good_loop, _good_by_score),
        broken={
            "a copy of the input": (
                _copies,
                "One layer passes your test and should not: where a token is dropped, it gives p x instead of 0. Look at what a dropped token "
                "leaves behind: it must be exactly 0. Reread the box in section 6.5.",
            ),
            "nobody is dropped": (
                _everybody,
                "One layer passes your test and should not: with any place at all, it serves everybody. C = 0 alone doesn't show it. Send a crowd "
                "to one expert and count who comes out. Reread the box in section 6.5.",
            ),
            "a full queue is closed": (
                _closed,
                "One layer passes your test and should not: if more than C tokens want an expert, it turns *all* of them away. Of a crowd, exactly "
                "C are served: count them. Reread section 6.2.",
            ),
            "one place short": (
                _one_short,
                "One layer passes your test and should not: it serves C - 1 tokens of a crowd. Count how many are served, not only that someone is "
                "dropped. Reread section 6.2.",
            ),
        },
        praise="Your test looks at both ends: nobody without a place, and of a crowd exactly C. Each of the four faulty layers runs without an error.",
    ),
    Exercise(
        "6.7",
        right=_pull,
        cases=_PULLS,
        praise="Weights that sum to 1 are tied together: to raise one is to lower the other. So a dropped slot is felt as long as the token's other slot is "
        "kept, and not at all where both are dropped.",
        ideas=(
            Idea(
                "no gradient at a dropped slot",
                lambda w_TK, kept_TK, a_TK: kept_TK * _pull(w_TK, kept_TK, a_TK),
                "You set the gradient at dropped slots to 0. Its own output is gone, but its logit also stands in the other slot's weight: "
                "w_1 falls when h_2 rises. Reread section 6.8.",
            ),
            Idea(
                "as if nobody were dropped",
                lambda w_TK, kept_TK, a_TK: _pull(w_TK, torch.ones_like(kept_TK), a_TK),
                "That is the gradient with every slot kept. A dropped slot adds nothing to y, so its a plays no part. Reread section 6.8.",
            ),
            Idea(
                "weights not tied",
                lambda w_TK, kept_TK, a_TK: w_TK * kept_TK * a_TK,
                "You differentiated each weight by its own logit alone, as if exp(h) were the weight. The weights are divided by their sum, and the "
                "sum moves with each logit. Reread section 6.8.",
            ),
            Idea(
                "by the weight, not by the logit",
                lambda w_TK, kept_TK, a_TK: kept_TK * a_TK,
                "That is dy/dw, the gradient by the weights. One step further: how do the weights move with the logits? Reread section 6.8.",
            ),
            Idea(
                "diagonal only",
                lambda w_TK, kept_TK, a_TK: w_TK * (1 - w_TK) * kept_TK * a_TK,
                "You have dw_k/dh_k = w_k (1 - w_k), and left out the other half: the other weight moves too, by -w_1 w_2. Reread section 6.8.",
            ),
            Idea(
                "sign",
                lambda w_TK, kept_TK, a_TK: -_pull(w_TK, kept_TK, a_TK),
                "The sign is the other way round: this is the gradient of y, not the step that lowers it. Reread the exercise.",
            ),
            Idea(
                "weights renormalised over the kept",
                lambda w_TK, kept_TK, a_TK: (
                    w_TK
                    * kept_TK
                    * (
                        a_TK
                        - (w_TK * kept_TK * a_TK).sum(-1, keepdim=True)
                        / (w_TK * kept_TK).sum(-1, keepdim=True).clamp(min=1e-9)
                    )
                ),
                "You compared with the mean over the kept slots. Their weights are not divided again after the drop: what is left sums to less than 1. "
                "Reread section 6.5.",
            ),
        ),
    ),
    statements(
        "6.8",
        "FTTFTF",
        says=(
            "Look at (a) again. Whatever the order of a queue, C of it stay. The policies differ in whom. Reread section 6.4.",
            "Look at (b) again. At the same skew, more experts mean a smaller even share, so the busiest is further above it. Reread section 6.3.",
            "Look at (c) again. Position asks who came before, so what comes later changes nothing. Score compares with later tokens too. Reread section 6.7.",
            "Look at (d) again. A large batch smooths chance. Popularity is no chance: it grows with the batch. Reread section 6.3.",
            "Look at (e) again. The queue is made of the other tokens of the batch: with others in it, the same token may find no room. Reread section 6.7.",
            "Look at (f) again. The stored run has such models, without a balance loss: where does their busiest expert end? Reread section 6.8.",
        ),
        praise="Capacity bounds the work, chooses whom to turn away, and teaches the router nothing about balance.",
    ),
)
