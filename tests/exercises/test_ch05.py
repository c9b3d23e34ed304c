"""Chapter 5: right answers that differ from the checker's own, and wrong ones that a class hands in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_book import runs
from moe_book.checks import ch05, check
from moe_core import TopKRouter, losses


def routing_of(h_TE, K):
    E = h_TE.shape[1]
    router = TopKRouter(E, E, K).double()
    router.weight.data = torch.eye(E).double()
    return router(h_TE.double().unsqueeze(0))


def loss_of_the_package(h_TE, K):
    return losses.load_balance(routing_of(h_TE, K))


def loss_by_bincount(h_TE, K):
    E = h_TE.shape[1]
    f_E = torch.bincount(h_TE.topk(K).indices.flatten(), minlength=E) / h_TE[:, :K].numel()
    return float(E * f_E @ torch.softmax(h_TE, -1).mean(0))


def squares(h_TE):
    return h_TE.shape[1] * torch.softmax(h_TE, -1).mean(0).square().sum()


def gradient_by_autograd(h_TE):
    h_TE = h_TE.clone().requires_grad_()
    return torch.autograd.grad(squares(h_TE), h_TE)[0]


def gradient_token_by_token(h_TE):
    T, E = h_TE.shape
    P_E = torch.softmax(h_TE, -1).mean(0)
    rows = []
    for h_E in h_TE:
        p_E = torch.softmax(h_E, 0)
        rows.append((torch.diag(p_E) - torch.outer(p_E, p_E)) @ (2 * E * P_E / T))
    return torch.stack(rows)


def gradient_in_numpy(h_TE):
    h = h_TE.double().numpy()
    p = np.exp(h) / np.exp(h).sum(-1, keepdims=True)
    P = p.mean(0)
    return 2 * h.shape[1] / len(h) * p * (P - p @ P[:, None])


def model_of_the_package(layers, real_T):
    values = []
    for h_TE in layers:
        E = h_TE.shape[1]
        router = TopKRouter(E, E, 1)
        router.weight.data = torch.eye(E)
        values.append(
            losses.load_balance(router(h_TE.unsqueeze(0), padding_mask=real_T.unsqueeze(0)))
        )
    return sum(values) / len(values)


def model_in_a_loop(layers, real_T):
    total = 0.0
    for h_TE in layers:
        rows = [row for row, real in zip(h_TE, real_T.tolist()) if real]
        total += loss_by_bincount(torch.stack(rows), 1)
    return total / len(layers)


def part_by_einsum(h_TE, K, counts_E):
    f_E = counts_E / counts_E.sum()
    return h_TE.shape[1] * torch.einsum("te,e->", h_TE.softmax(-1), f_E) * K / counts_E.sum()


def part_of_the_package(h_TE, K, counts_E):
    """The package's own loss with the shares of all, weighted with this GPU's share of the tokens."""
    own = losses.load_balance(routing_of(h_TE, K), share=(counts_E / counts_E.sum()).double())
    return own * len(h_TE) * K / counts_E.sum()


def part_in_a_loop(h_TE, K, counts_E):
    total, n = 0.0, int(counts_E.sum())
    for row in torch.softmax(h_TE, -1).tolist():
        total += sum(p * c / n for p, c in zip(row, counts_E.tolist()))
    return len(counts_E) * total / (n / K)


def reference(h_TE, K):
    p_TE = torch.softmax(h_TE, -1)
    f_E = F.one_hot(h_TE.topk(K).indices, h_TE.shape[1]).to(h_TE).mean((0, 1))
    return h_TE.shape[1] * (f_E * p_TE.mean(0)).sum()


def compares_with_a_reference(loss):
    generator = torch.Generator().manual_seed(0)
    for K in (1, 2, 3):
        h_TE = torch.randn(9, 5, generator=generator).double().requires_grad_()
        pair = [torch.autograd.grad(f(h_TE, K), h_TE)[0] for f in (loss, reference)]
        assert torch.isclose(loss(h_TE, K), reference(h_TE, K)) and torch.allclose(*pair)


def says_true_or_false(loss):
    h_TE = torch.tensor([[2.0, 1, 0, -1], [2.0, 0, 1.5, -1], [2.0, 0, 1, 3]], requires_grad=True)
    value = loss(h_TE, 2)
    return value.requires_grad and bool(torch.isclose(value, reference(h_TE, 2), rtol=1e-4))


RIGHT = {
    "5.1": [loss_of_the_package, loss_by_bincount],
    "5.2": [gradient_by_autograd, gradient_token_by_token, gradient_in_numpy],
    "5.3": [model_of_the_package, model_in_a_loop],
    "5.4": [part_by_einsum, part_of_the_package, part_in_a_loop],
    "5.5": ["DB", ["b", "d"], {"B", "D"}, "B and D"],
    "5.6": [compares_with_a_reference, says_true_or_false],
    "5.7": [0.1, "0.1", torch.tensor(0.1), "1e-1"],
    "5.8": [
        "f f f t f t f",
        " ffftftf ",
        list("FFFTFTF"),
        [False, False, False, True, False, True, False],
    ],
}


def soft(h_TE):
    return torch.softmax(h_TE, -1)


def f_of(h_TE, K):
    return F.one_hot(h_TE.topk(K).indices, h_TE.shape[1]).to(h_TE).mean((0, 1))


# What a class hands in: the name of the idea that must be recognised, or None where it is refused without one.
_BY_IDEA = {
    "5.1": [
        ("counts alone", lambda h, K: h.shape[1] * f_of(h, K).square().sum()),
        ("scores alone", lambda h, K: h.shape[1] * soft(h).mean(0).square().sum()),
        ("softmax of the mean", lambda h, K: h.shape[1] * f_of(h, K) @ soft(h.mean(0))),
        ("share of tokens", lambda h, K: K * reference(h, K)),
        ("no E", lambda h, K: f_of(h, K) @ soft(h).mean(0)),
        ("mean over experts", lambda h, K: (f_of(h, K) * soft(h).mean(0)).mean()),
        (
            "softmax twice",
            lambda h, K: (
                reference(soft(h).log(), K) * 0 + h.shape[1] * f_of(h, K) @ soft(soft(h)).mean(0)
            ),
        ),
        ("first choices only", lambda h, K: h.shape[1] * f_of(h, 1) @ soft(h).mean(0)),
        (None, lambda h, K: h.shape[1] * f_of(h, K) @ soft(h).sum(0)),
        (None, lambda h, K: h.shape[1] * f_of(h, K) @ h.mean(0)),
        (None, lambda h, K: h.shape[1] * f_of(h, K) @ torch.softmax(h, 0).mean(0)),
        (None, lambda h, K: torch.tensor(1.0)),
        (None, lambda h, K: -reference(h, K)),
        (None, lambda h, K: h.shape[1] * f_of(-h, K) @ soft(h).mean(0)),
        (None, lambda h, K: h.shape[1] * f_of(h, K) @ torch.sigmoid(h).mean(0)),
        (None, lambda h, K: h.shape[1] * (f_of(h, K) * soft(h).mean(0))),
    ],
    "5.2": [
        ("no 2", lambda h: gradient_by_autograd(h) / 2),
        ("no E", lambda h: gradient_by_autograd(h) / h.shape[1]),
        ("sum over tokens", lambda h: gradient_by_autograd(h) * len(h)),
        ("downhill", lambda h: -gradient_by_autograd(h)),
        ("no coupling", lambda h: 2 * h.shape[1] / len(h) * soft(h) * soft(h).mean(0)),
        (
            "everybody's mean",
            lambda h: (
                2
                * h.shape[1]
                / len(h)
                * soft(h)
                * (soft(h).mean(0) - soft(h).mean(0).square().sum())
            ),
        ),
        (
            "minus the even share",
            lambda h: 2 * h.shape[1] / len(h) * soft(h) * (soft(h).mean(0) - 1 / h.shape[1]),
        ),
        (
            None,
            lambda h: (
                2
                * h.shape[1]
                / len(h)
                * (soft(h).mean(0) - (soft(h) * soft(h).mean(0)).sum(-1, keepdim=True))
            ),
        ),
        (
            None,
            lambda h: (
                2
                * h.shape[1]
                / len(h)
                * soft(h)
                * (soft(h) - soft(h).square().sum(-1, keepdim=True))
            ),
        ),
        (None, lambda h: gradient_by_autograd(h).mean(0)),
        (None, lambda h: squares(h)),
        (None, lambda h: torch.zeros_like(h)),
        (None, lambda h: gradient_by_autograd(h) * h.shape[1]),
        (
            None,
            lambda h: (
                2
                * h.shape[1]
                / len(h)
                * soft(h)
                * (soft(h).mean(0) - (soft(h) * soft(h).mean(0)).sum(0))
            ),
        ),
    ],
    "5.3": [
        (
            "padding zeroed",
            lambda layers, real: sum(reference(h * real[:, None], 1) for h in layers) / len(layers),
        ),
        ("pooled layers", lambda layers, real: reference(torch.cat([h[real] for h in layers]), 1)),
        (
            "padding counted",
            lambda layers, real: sum(reference(h, 1) for h in layers) / len(layers),
        ),
        ("sum of layers", lambda layers, real: sum(reference(h[real], 1) for h in layers)),
        ("scores alone", lambda layers, real: sum(squares(h[real]) for h in layers) / len(layers)),
        (
            None,
            lambda layers, real: (
                sum(reference(h[~real], 1) for h in layers if (~real).any()) / len(layers)
            ),
        ),
        (None, lambda layers, real: reference(torch.stack(layers).mean(0)[real], 1)),
        (None, lambda layers, real: reference(layers[0][real], 1)),
        (None, lambda layers, real: max(reference(h[real], 1) for h in layers)),
        (None, lambda layers, real: sum(reference(h, 1) for h in layers)),
        (None, lambda layers, real: sum(reference(h[real], 2) for h in layers) / len(layers)),
    ],
    "5.4": [
        ("own loss", lambda h, K, counts: reference(h, K)),
        ("own mean", lambda h, K, counts: h.shape[1] * (counts / counts.sum()) @ soft(h).mean(0)),
        (
            "slots for tokens",
            lambda h, K, counts: (
                h.shape[1] * (counts / counts.sum()) @ soft(h).sum(0) / counts.sum()
            ),
        ),
        (
            "own counts",
            lambda h, K, counts: h.shape[1] * f_of(h, K) @ soft(h).sum(0) / (counts.sum() / K),
        ),
        (
            "sum of probabilities",
            lambda h, K, counts: h.shape[1] * (counts / counts.sum()) @ soft(h).sum(0),
        ),
        ("no E", lambda h, K, counts: part_by_einsum(h, K, counts) / h.shape[1]),
        ("share of tokens", lambda h, K, counts: part_by_einsum(h, K, counts) * K),
        (None, lambda h, K, counts: h.shape[1] * counts.to(h) @ soft(h).sum(0)),
        (None, lambda h, K, counts: h.shape[1] * counts.to(h) @ soft(h).mean(0)),
        (None, lambda h, K, counts: h.shape[1] * (counts / counts.sum()).square().sum()),
        (None, lambda h, K, counts: part_by_einsum(h, K, counts) / K),
        (None, lambda h, K, counts: reference(h, K) * len(h) / counts.sum()),
    ],
    "5.5": [
        (None, one)
        for one in (
            "A",
            "B",
            "D",
            "AB",
            "BC",
            "CD",
            "DE",
            "BE",
            "ABD",
            "ABCDE",
            "E",
            "AC",
            "F",
            "",
            3,
        )
    ],
    "5.6": [
        (None, lambda loss: False),
        ("constant", lambda loss: True),
        ("constant", lambda loss: abs(loss(torch.eye(4), 1) - 1) < 1e-6),
        (None, lambda loss: loss(torch.eye(4), 1) == 4),
        (
            "no gradient",
            lambda loss: (
                abs(loss(PAGE, 1) - 1.5) < 1e-4 and abs(loss(BOTH, 2) - reference(BOTH, 2)) < 1e-4
            ),
        ),
        (
            "share of tokens",
            lambda loss: (
                loss(PAGE.requires_grad_(), 1).requires_grad and abs(loss(PAGE, 1) - 1.5) < 1e-4
            ),
        ),
        (None, lambda loss: loss(PAGE, 1) < 1),
        (None, lambda loss: loss(PAGE)),
        (None, lambda loss: 1 / 0),
    ],
    "5.7": [
        (None, one)
        for one in (0, 0.0, 0.001, 0.01, "0.01", 1, 1.0, 0.05, "c", "ABC", [0.1, 1.0], float("nan"))
    ],
    "5.8": [
        (None, one)
        for one in (
            "TTTTTTT",
            "FFFTFT",
            "FFFTFTFF",
            "TTTFTFT",
            "FFFFFFF",
            "FTFTFTF",
            [True] * 7,
            5,
            "",
            "yes",
            "FFTTFTF",
            "FFFTFTT",
        )
    ],
}
WRONG = {n: [(answer, idea) for idea, answer in every] for n, every in _BY_IDEA.items()}
PAGE = (torch.tensor([[4, 3, 2, 1], [5, 2, 2, 1], [5, 1, 1, 3], [2, 6, 1, 1]]) / 10).log()
BOTH = torch.tensor([[2.0, 1, 0, -1], [2.0, 0, 1.5, -1], [2.0, 0, 1, 3]])


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("5.1", lambda h, K: reference(h.detach(), K)),
        ("5.1", lambda h, K: reference(h, K).item()),
        ("5.4", lambda h, K, counts: part_by_einsum(h, K, counts).item()),
    ],
)
def test_a_value_through_which_no_gradient_flows_gets_a_remark(number, answer):
    verdict = check(number, answer)
    assert verdict.right and "remark" in verdict.message


def test_the_coefficient_to_choose_is_the_one_that_the_stored_run_gives():
    run = runs.load("collapse")
    results, ends = run["results"], {}
    for coefficient in run["config"]["coefficients"]:
        reached = []
        for one in results[f"{coefficient:g}"]:
            slow = 8 * np.array(one["load"]).max(-1).mean(-1)
            time = np.interp(range(1, 601), one["step"], slow).cumsum()
            within = [i for i, s in enumerate(one["eval_step"]) if time[s - 1] <= 900]
            reached.append(one["valid_loss"][within[-1]])
        ends[coefficient] = np.mean(reached)
    best = min(ends, key=ends.get)
    (exercise,) = (one for one in ch05.EXERCISES if one.number == "5.7")
    assert exercise.right == best
    assert sorted(ends.values())[1] - ends[best] > 0.05
