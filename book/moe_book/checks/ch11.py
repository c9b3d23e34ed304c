"""Chapter 11: the router zoo."""

import math

import torch

from moe_core.routers.balanced_assignment import balanced_assignment

from .exercise import Exercise, Idea, which, write_test


# 11.1: a balanced table
def _greedy(frequencies, E, descending=True):
    busy_E, table = [0] * E, [0] * len(frequencies)
    for token in sorted(
        range(len(frequencies)), key=lambda v: -frequencies[v] if descending else frequencies[v]
    ):
        table[token] = busy_E.index(min(busy_E))
        busy_E[table[token]] += frequencies[token]
    return table


def _busiest(table, frequencies, E):
    loads = [0] * E
    for expert, frequency in zip(table, frequencies, strict=True):
        loads[int(expert)] += frequency
    return max(loads)


def _packs(table, frequencies, E):
    if len(table) != len(frequencies):
        return f"There are {len(frequencies)} ids, and your table has {len(table)} entries: one expert for each id."
    if any(int(e) != e or not 0 <= e < E for e in table):
        return f"An entry of the table is the number of an expert, from 0 to {E - 1}."
    busiest, goal = (_busiest(each, frequencies, E) for each in (table, _greedy(frequencies, E)))
    return (
        True
        if busiest <= goal
        else f"Your busiest expert has {busiest} to do; large pieces first gives {goal}."
    )


def _by_rank(frequencies, E):
    table = [0] * len(frequencies)
    for rank, token in enumerate(sorted(range(len(frequencies)), key=lambda v: -frequencies[v])):
        table[token] = rank % E
    return table


# 11.2: Sinkhorn
_generator = torch.Generator().manual_seed(11)
_wide_TE, _square_TE = (
    torch.randn(6, 3, generator=_generator),
    torch.randn(4, 4, generator=_generator),
)


def _scale(p_TE, rounds, row=None, column=None, order="rc"):
    T, E = p_TE.shape
    for _ in range(rounds):
        for side in order:
            p_TE = (
                p_TE / p_TE.sum(1, keepdim=True) * (row or 1 / T)
                if side == "r"
                else p_TE / p_TE.sum(0) * (column or 1 / E)
            )
    return p_TE


# 11.5: balanced and best
def exact(h_TE):
    """The package's solution of the assignment."""
    return balanced_assignment(h_TE.double())


def by_places_left(h_TE):
    """Token after token, the best that can be had with so many places left at each expert."""
    T, E = h_TE.shape
    best = {(T // E,) * E: (0.0, [])}
    for row in h_TE.tolist():
        after = {}
        for left, (value, way) in best.items():
            for e in range(E):
                if left[e]:
                    key = (*left[:e], left[e] - 1, *left[e + 1 :])
                    after[key] = max(after.get(key, (-math.inf, [])), (value + row[e], [*way, e]))
        best = after
    ((_, way),) = best.values()
    return torch.tensor(way)


def best_expert(h_TE):
    """Each token's favourite: no balance at all."""
    return h_TE.argmax(1)


def rounded_plan(h_TE):
    """A balanced plan, and the largest share of each row."""
    return _scale(h_TE.double().exp(), 50).argmax(1)


def in_turn(h_TE):
    """0, 1, 0, 1: balanced, whatever the scores are."""
    return torch.arange(len(h_TE)) % h_TE.shape[1]


def first_come(h_TE):
    """In the order of the text, each to its favourite that has a place left."""
    T, E = h_TE.shape
    left, found = [T // E] * E, []
    for row in h_TE.tolist():
        e = max((e for e in range(E) if left[e]), key=lambda e: row[e])
        left[e] -= 1
        found.append(e)
    return torch.tensor(found)


def worst(h_TE):
    """Balanced, with the smallest sum."""
    return exact(-h_TE)


# 11.6: what is left
_LEFT = ("loss_free", "quantile_balancing")
_ROWS = (
    "topk noisy_topk switch gshard loss_free hash expert_choice expert_threshold sinkhorn base quantile_balancing relu "
    "zero_computation"
).split()


def _remaining(names):
    unknown = [name for name in names if name not in _ROWS]
    if unknown:
        return f"There is no row {unknown[0]!r} on the bench; write the names as its tables do."
    if set(names) == set(_LEFT):
        return True
    wrong = [name for name in names if name not in _LEFT]
    if wrong:
        return f"{wrong[0]!r} fails one of the demands, or learns nothing: find its row in the table of 11.1."
    return "What you named is right. One more row passes: go through the table of 11.1 again."


EXERCISES = (
    Exercise(
        "11.1",
        _greedy,
        (
            Idea(
                "modulo",
                lambda f, E: [v % E for v in range(len(f))],
                "You spread the ids. Ids do not occur equally often, so the load is not "
                "even: look at the frequencies before you place anything. Reread section 11.2.",
            ),
            Idea(
                "by rank",
                _by_rank,
                "You dealt the ids like cards, in order of their frequency. The expert that gets the first card of each round "
                "always gets the largest: look at how much each has so far. Reread the case by hand in 11.2.",
            ),
            Idea(
                "smallest first",
                lambda f, E: _greedy(f, E, descending=False),
                "You give each id to the expert with the least to do, but you start "
                "with the rare ones: the frequent ones come last and land on top. Place the large pieces first, as in 11.2.",
            ),
        ),
        "Large pieces first, each where there is most room: a few lines, and no expert can complain.",
        cases=(
            ([3, 6, 1, 2], 2),
            ([5, 1, 4, 2, 9, 3, 7, 1], 3),
            ([8, 7, 6, 5, 4, 3, 2, 1, 1], 4),
            ([20, 1, 1, 1, 1, 1, 1, 1], 4),
        ),
        accepts=_packs,
    ),
    Exercise(
        "11.2",
        lambda h, rounds: _scale(h.exp(), rounds),
        (
            Idea(
                "sums of 1",
                lambda h, rounds: _scale(h.exp(), rounds, 1, 1),
                "Your sums are 1. A row of the plan must sum to 1/T and a column to "
                "1/E, so that both say the same about the whole: 1. Reread the formula in 11.3.",
            ),
            Idea(
                "columns first",
                lambda h, rounds: _scale(h.exp(), rounds, order="cr"),
                "You scale the columns first, so the rows come out exact and "
                "the columns do not. The exercise ends each round with the columns. See the figure in 11.3.",
            ),
            Idea(
                "rows only",
                lambda h, rounds: _scale(h.exp(), rounds, order="r"),
                "You scale the rows only: that is the softmax, divided by T. "
                "Nothing has been balanced yet; the columns must sum to 1/E. Reread section 11.3.",
            ),
            Idea(
                "no exponential",
                lambda h, rounds: _scale(h, rounds),
                "You scale the logits themselves. They may be negative, and a share may not: "
                "the plan starts from exp(h). Reread the formula in 11.3.",
            ),
        ),
        "By turns, and both sums end up right. All it takes to choose from it is an argmax per row.",
        cases=((_wide_TE, 30), (_square_TE, 1)),
    ),
    which(
        "11.3",
        options="ABCDE",
        right="CE",
        says={
            "A": "A is right: it is the rule of section 11.5, word by word.",
            "B": "B is right. To raise 1.2 to the power of 1 or -1 is to multiply or to divide by it.",
            "D": "D is right. Adding or subtracting log 1.2 before the exponential is multiplying or dividing by 1.2.",
        },
        praise="C pushes the wrong way: too many experts must make the penalty larger. And E is no inverse of itself: up by a fifth and down by "
        "a fifth is 1.2 times 0.8, so a router that is right on average loses four hundredths of its penalty with every pair of steps.",
    ),
    Exercise(
        "11.4",
        lambda K, E, Z, goal: goal * Z / (E * (K - goal)),
        (
            Idea(
                "upside down",
                lambda K, E, Z, goal: E * (K - goal) / (goal * Z),
                "That is 1 / tau. Put it into the formula of 11.6: with the bench's numbers tau has to come out as 3/4.",
            ),
            Idea(
                "share of slots",
                lambda K, E, Z, goal: goal / K,
                "That is the share of the slots that should be real. tau weighs one real expert against one cheap one, and there are "
                "E of the first and Z of the second. Set the formula of 11.6 equal to the goal and solve it.",
            ),
            Idea(
                "numbers forgotten",
                lambda K, E, Z, goal: goal / (K - goal),
                "That is the ratio of real slots to cheap ones. It is tau E : Z, so what is left is to multiply by Z and divide by E.",
            ),
            Idea(
                "E and Z swapped",
                lambda K, E, Z, goal: goal * E / (Z * (K - goal)),
                "You have E and Z the wrong way round. More real experts share the same slots, so each has to ask for less: tau falls with E.",
            ),
            Idea(
                "solved the other way",
                lambda K, E, Z, goal: K * goal * E / (goal * E + Z),
                "You put the goal in the place of tau. Set the formula of 11.6 equal to the goal, and solve for tau.",
            ),
        ),
        "Two lines of algebra, and a knob that one would otherwise turn by trial.",
        cases=((3, 8, 3, 2), (12, 512, 256, 8), (4, 16, 4, 1), (2, 6, 5, 1.5)),
        tolerance=1e-6,
    ),
    write_test(
        "11.5",
        good=(exact, by_places_left),
        broken={
            "no balance": (
                best_expert,
                "Your test lets the argmax pass: each token goes to its favourite, and nothing is balanced. Count the tokens of each expert.",
            ),
            "rounded plan": (
                rounded_plan,
                "Your test lets Sinkhorn's rounded plan pass. The plan is balanced, the largest share of each row need not be: "
                "with some scores it is, with others it isn't. Count on many inputs.",
            ),
            "in turn": (
                in_turn,
                "Your test lets 0, 1, 0, 1 pass. It is balanced and never looks at the scores: also compare the sum of the chosen scores with "
                "the largest that a balanced assignment can have.",
            ),
            "first come": (
                first_come,
                "Your test lets 'first come, first served' pass: balanced, each token with the best expert that still has a place. An early token "
                "takes the place of a later one that needs it more. Compare the sum with that of every other balanced assignment, on many inputs.",
            ),
            "worst": (
                worst,
                "Your test lets the worst balanced assignment pass: the one with the smallest sum. Compare the sum with the largest.",
            ),
        },
        praise="Two things to hold: the load of each expert, and that no other even assignment has a larger sum. A test of the first alone "
        "lets a router pass that never reads.",
    ),
    Exercise(
        "11.6",
        ("loss_free", "quantile_balancing"),
        (
            Idea(
                "a table learns",
                ("hash", "loss_free", "quantile_balancing"),
                "The hash meets every demand, but where a token goes is not learned: "
                "its table is fixed before training. Reread section 11.2.",
            ),
            Idea(
                "thresholds train alone",
                ("expert_threshold", "loss_free", "quantile_balancing"),
                "Expert threshold routes causally in eval. In "
                "training its experts still choose within the batch, so the two differ: see the column 'in training' in 11.1.",
            ),
            Idea(
                "balance loss is no loss",
                ("loss_free", "quantile_balancing", "topk"),
                "On the bench top-k is balanced by a loss with a coefficient: "
                "that is the extra loss you wanted to do without. See the last column in 11.1.",
            ),
            Idea(
                "plans look at the batch",
                ("loss_free", "quantile_balancing", "sinkhorn"),
                "Sinkhorn's plan is made from the whole batch in training, and in generation there is none: see the column 'in training' in 11.1.",
            ),
        ),
        "Two biases that are learned outside the gradient: one by small steps, one solved for.",
        unordered=True,
        accepts=lambda names: _remaining(names),
        reads=lambda names: (
            tuple(
                sorted(
                    str(name).strip().casefold()
                    for name in (
                        names.replace(",", " ").split() if isinstance(names, str) else names
                    )
                )
            )
            or None
        ),
        asks='Hand in a list of names of rows, such as ["topk", "hash"].',
    ),
    Exercise(
        "11.7",
        lambda n_routers, n_seeds: n_routers * (n_routers - 1) / 2 / 2 ** (n_seeds - 1),
        (
            Idea(
                "one of two",
                lambda n_routers, n_seeds: n_routers * (n_routers - 1) / 2 / 2**n_seeds,
                "That is how often one named router of the pair wins everywhere. Either of the two may: heads three times, or tails three times.",
            ),
            Idea(
                "pairs twice",
                lambda n_routers, n_seeds: n_routers * (n_routers - 1) / 2 ** (n_seeds - 1),
                "You counted each pair twice, as (p, q) and as (q, p). Thirteen routers make 78 pairs.",
            ),
            Idea(
                "share",
                lambda n_routers, n_seeds: 0.5 ** (n_seeds - 1),
                "That is the chance for one pair. Asked is the number among all pairs of the bench.",
            ),
            Idea(
                "pairs with itself",
                lambda n_routers, n_seeds: n_routers * (n_routers + 1) / 2 / 2 ** (n_seeds - 1),
                "You paired each router with itself as well. Thirteen routers make 13 times 12 halves, 78 pairs.",
            ),
            Idea(
                "routers for pairs",
                lambda n_routers, n_seeds: n_routers / 2 ** (n_seeds - 1),
                "You took the number of routers. It is pairs that agree or not, and thirteen routers make 78 of them.",
            ),
        ),
        "With three seeds a quarter of all pairs agree for nothing. It takes six seeds until it is one pair in 32: p = 0.03.",
        cases=((13, 3), (13, 6), (2, 3), (5, 1)),
    ),
)
