"""Chapter 11: the router zoo."""

import torch

from .exercise import Exercise, Idea


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
    return all(0 <= int(e) < E for e in table) and _busiest(table, frequencies, E) <= _busiest(
        _greedy(frequencies, E), frequencies, E
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
        for which in order:
            p_TE = (
                p_TE / p_TE.sum(1, keepdim=True) * (row or 1 / T)
                if which == "r"
                else p_TE / p_TE.sum(0) * (column or 1 / E)
            )
    return p_TE


# 11.5: Soft MoE
_EXPERTS = (lambda v: 2 * v, lambda v: 1 - v)


def _soft(over_tokens=0, over_slots=1):
    def soft_moe(x_ND, phi_DS, experts):
        h_NS = x_ND @ phi_DS
        slots_SD = h_NS.softmax(over_tokens).T @ x_ND
        return h_NS.softmax(over_slots) @ torch.stack(
            [f(slot) for f, slot in zip(experts, slots_SD)]
        )

    return soft_moe


def _no_mixing_back(x_ND, phi_DS, experts):
    h_NS = x_ND @ phi_DS
    slots_SD = h_NS.softmax(0).T @ x_ND
    return torch.stack([experts[s](slots_SD[s]) for s in h_NS.argmax(1)])


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
        cases=(([3, 6, 1, 2], 2), ([5, 1, 4, 2, 9, 3, 7, 1], 3)),
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
    Exercise(
        "11.3",
        1.2,
        (
            Idea(
                "the other way",
                1 / 1.2,
                "You lower the coefficient when there are too many experts. A larger penalty pushes weights to zero, so "
                "too many experts must raise it. Reread section 11.5.",
            ),
            Idea(
                "only up",
                1.2**3,
                "You counted the three steps with too many experts. The two with too few divide by 1.2 again: lambda goes both "
                "ways. Reread section 11.5.",
            ),
            Idea(
                "every step",
                1.2**5,
                "You multiplied in each of the five steps. It grows only while tokens take more than K = 2 experts. "
                "Reread section 11.5.",
            ),
        ),
        "Three up, two down. Only on which side of k the number lies matters, not how far.",
    ),
    Exercise(
        "11.4",
        lambda K, E, Z, tau: K * tau * E / (tau * E + Z),
        (
            Idea(
                "no tau",
                lambda K, E, Z, tau: K * E / (E + Z),
                "You divide the slots evenly over all experts. The loss asks for tau slots at a real "
                "expert for each at a cheap one: weigh the real ones with tau. Reread section 11.6.",
            ),
            Idea(
                "tau on the cheap",
                lambda K, E, Z, tau: K * E / (E + tau * Z),
                "You gave tau to the cheap experts. A tau below 1 would then make "
                "real experts more frequent; it is there to make them rarer. Reread section 11.6.",
            ),
            Idea(
                "the cheap ones",
                lambda K, E, Z, tau: K * Z / (tau * E + Z),
                "That is what is left for the experts without computation. The real "
                "ones get the other part of the K slots. Reread section 11.6.",
            ),
        ),
        "The part of all shares that is real, times K. With the bench's numbers: 2.",
        cases=((3, 8, 3, 0.75), (12, 512, 256, 1.0), (2, 4, 4, 2.0)),
    ),
    Exercise(
        "11.5",
        _soft(),
        (
            Idea(
                "softmax over slots twice",
                _soft(1, 1),
                "Both of your softmaxes run over the slots. A slot must be a mean of tokens: its weights sum "
                "to 1 over the tokens, along dimension 0. Reread section 11.7.",
            ),
            Idea(
                "softmax over tokens twice",
                _soft(0, 0),
                "Both of your softmaxes run over the tokens. What a token gets back is a mean over slots: "
                "weights that sum to 1 along dimension 1. Reread section 11.7.",
            ),
            Idea(
                "swapped",
                _soft(1, 0),
                "You have the two softmaxes the wrong way round: over tokens when a slot is filled, over slots when a token "
                "gets its answer. Reread section 11.7.",
            ),
            Idea(
                "argmax on the way back",
                _no_mixing_back,
                "You give each token the answer of its best slot alone. That is a choice, and a choice "
                "has no gradient: Soft MoE mixes all answers. Reread section 11.7.",
            ),
        ),
        "Two softmaxes of the same numbers, along different sides. Nothing is chosen.",
        cases=(
            (
                torch.randn(5, 3, generator=_generator),
                torch.randn(3, 2, generator=_generator),
                _EXPERTS,
            ),
            (
                torch.randn(2, 4, generator=_generator),
                torch.randn(4, 2, generator=_generator),
                _EXPERTS,
            ),
        ),
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
        ),
        "Two biases that are learned outside the gradient: one by small steps, one solved for.",
        accepts=lambda names: sorted(names) == ["loss_free", "quantile_balancing"],
    ),
)
