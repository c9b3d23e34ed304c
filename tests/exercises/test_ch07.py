"""Chapter 7: right answers that differ from the checker's own, and wrong ones that must be refused."""

import math
import statistics

import torch

from moe_book.checks import check


def kth_by_leaving_out(H_TE, K):
    columns = [
        torch.cat([H_TE[:, :e], H_TE[:, e + 1 :]], -1).topk(K).values[:, -1]
        for e in range(H_TE.shape[1])
    ]
    return torch.stack(columns, -1)


def kth_by_rank(H_TE, K):
    ranked_TE, rank_TE = (
        H_TE.sort(-1, descending=True).values,
        H_TE.argsort(-1, descending=True).argsort(-1),
    )
    return ranked_TE.gather(-1, torch.where(rank_TE < K, K, K - 1))


def load_by_leaving_out(h_TE, std_TE, epsilon_TE, K):
    return (
        torch.distributions.Normal(0, 1)
        .cdf((h_TE - kth_by_leaving_out(h_TE + std_TE * epsilon_TE, K)) / std_TE)
        .sum(0)
    )


def load_by_erf(h_TE, std_TE, epsilon_TE, K):
    z_TE = (h_TE - kth_by_rank(h_TE + std_TE * epsilon_TE, K)) / std_TE
    return [
        column.sum().item() for column in (0.5 * (1 + torch.erf(z_TE / math.sqrt(2)))).unbind(-1)
    ]


def scale_from_the_standard_library(gap, share):
    return gap / (2**0.5 * statistics.NormalDist().inv_cdf(1 - share))


def scale_by_bisection(gap, share):
    low, high = 1e-3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        wins = 0.5 * math.erfc(gap / (2 * middle))
        low, high = (middle, high) if wins < share else (low, middle)
    return torch.tensor(high)


def careful_test(jitter):
    torch.manual_seed(0)
    x = torch.randn(50, 20)
    x[0, 0] = 0
    before = x.clone()
    assert torch.equal(jitter(x, 0.1, False), before)
    one, two = jitter(x, 0.1, True), jitter(x, 0.1, True)
    assert torch.equal(x, before) and not torch.equal(one, two)
    assert one[0, 0] == 0
    factor = one[1:] / x[1:]
    assert 0.9 <= factor.min() < 0.95 and 1.05 < factor.max() <= 1.1001
    assert (factor.std(-1) > 0.01).all()


def short_test(jitter):
    x = torch.ones(1, 4000)
    y, z = jitter(x, 0.5, True), jitter(x, 0.5, True)
    return bool(
        abs(y.mean() - 1) < 0.05
        and y.std() > 0.1
        and (y != z).any()
        and (x == 1).all()
        and jitter(x, 0.5, False).equal(x)
        and jitter(0 * x, 0.5, True).abs().max() == 0
    )


RIGHT = {
    "7.1": [kth_by_leaving_out, kth_by_rank],
    "7.2": [load_by_leaving_out, load_by_erf],
    "7.3": [scale_from_the_standard_library, scale_by_bisection],
    "7.4": [
        lambda S: torch.linspace(4, 0, S),
        lambda S: [1.5 if s < 80 else 0 for s in range(S)],
        lambda S: [1 + math.cos(math.pi * s / S) for s in range(S)],
    ],
    "7.5": ["DB", ["b", "d"], {"B", "D"}, "B, D", "B and D"],
    "7.6": [careful_test, short_test],
    "7.7": [
        lambda g, c: torch.where(c * g < 1, torch.full_like(g, 1 / c), g),
        lambda g, c: [max(w, 1 / c) for w in g.tolist()],
    ],
    "7.8": [
        "TFFTFT",
        " tfftft ",
        list("TFFTFT"),
        "T F F T F T",
        [True, False, False] * 1 + [True, False, True],
    ],
}


def by_value(f):
    """The same numbers, without a gradient."""

    def answer(*case):
        with torch.no_grad():
            return f(*case)

    return answer


def phi(z):
    return torch.special.ndtr(z)


def eager(jitter):
    return jitter(torch.ones(3, 4), 0.1, True).shape == (3, 4)


def only_eval(jitter):
    x = torch.randn(3, 4)
    return torch.equal(jitter(x, 0.1, False), x)


def only_range(jitter):
    x = torch.rand(50, 20) + 0.5
    f = jitter(x, 0.1, True) / x
    return bool((f > 0.8999).all() and (f < 1.1001).all())


def only_zero(jitter):
    return bool((jitter(torch.zeros(3, 4), 0.1, True) == 0).all())


def only_differs(jitter):
    x = torch.ones(3, 4)
    return not torch.equal(jitter(x, 0.1, True), jitter(x, 0.1, True))


def too_strict(jitter):
    torch.manual_seed(0)
    x = torch.ones(3, 4)
    y = jitter(x, 0.1, True)
    torch.manual_seed(0)
    return torch.equal(y, x * (0.9 + 0.2 * torch.rand(3, 4)))


REFUSED = {  # what a class would hand in; none may pass
    "7.1": [
        lambda H, K: H.topk(K, -1).values,
        lambda H, K: H.topk(K, -1).values[:, -1],
        lambda H, K: H.topk(K + 1, -1).indices[:, K:].expand_as(H),
        lambda H, K: H.sort(-1).values[:, K : K + 1].expand_as(H),
        lambda H, K: kth_by_rank(H.abs(), K),
        lambda H, K: kth_by_rank(H, K).T,
        lambda H, K: kth_by_rank(H.softmax(-1), K),
        lambda H, K: kth_by_rank(H, K - 1) if K > 1 else kth_by_rank(H, K) + 1,
        lambda H, K: torch.stack([kth_by_rank(H.T, 1)[0]] * len(H)) if H.shape[1] > 9 else H,
        lambda H, K: H - kth_by_rank(H, K),
        lambda H, K: torch.where(
            H > H.topk(K, -1).values[:, -1:],
            H.topk(K + 1, -1).values[:, K:],
            H.topk(K, -1).values[:, -1:],
        ),
    ],
    "7.2": [
        lambda h, s, n, K: phi((kth_by_rank(h + s * n, K) - h) / s).sum(0),
        lambda h, s, n, K: phi((h - kth_by_rank(h + s * n, K)) / s**2).sum(0),
        lambda h, s, n, K: phi((h - kth_by_rank(h + s * n, K)) / s).sum(),
        lambda h, s, n, K: phi((h - kth_by_rank(h + s * n, K)) / s),
        lambda h, s, n, K: (h - kth_by_rank(h + s * n, K)).div(s).sum(0),
        lambda h, s, n, K: phi((h - kth_by_rank(n, K)) / s).sum(0),
        lambda h, s, n, K: (1 + torch.erf((h - kth_by_rank(h + s * n, K)) / s)).sum(0) / 2,
        lambda h, s, n, K: phi((h.softmax(-1) - kth_by_rank(h + s * n, K)) / s).sum(0),
        lambda h, s, n, K: K * phi((h - kth_by_rank(h + s * n, K)) / s).mean(0),
        lambda h, s, n, K: phi((h - kth_by_rank(h + s * n, 1)) / s).sum(0),
        lambda h, s, n, K: phi((h - kth_by_rank(h + s.mean() * n, K)) / s.mean()).sum(0),
    ],
    "7.3": [
        lambda gap, share: gap / math.sqrt(2) * share,
        lambda gap, share: gap / (2 * math.log((1 - share) / share)),
        lambda gap, share: gap * math.sqrt(2) / statistics.NormalDist().inv_cdf(1 - share),
        lambda gap, share: statistics.NormalDist().cdf(-gap / math.sqrt(2)),
        lambda gap, share: gap / (math.sqrt(2) * statistics.NormalDist().inv_cdf(1 - share / 2)),
        lambda gap, share: gap / (math.sqrt(2) * statistics.NormalDist().cdf(1 - share)),
        lambda gap, share: 1.0,
        lambda gap, share: (gap, share),
    ],
    "7.4": [
        lambda S: 1.0,
        lambda S: [1.2] * S,
        lambda S: [1.5] * S,
        lambda S: [0.7] * S,
        lambda S: [4.0] * S,
        lambda S: [2 * 0.9**s for s in range(S)],
        lambda S: [2 / (1 + s) for s in range(S)],
        lambda S: [2 if s < 15 else 0 for s in range(S)],
        lambda S: [0 if s < 75 else 1 for s in range(S)],
        lambda S: [2 * (1 - s / S) for s in range(S - 1)],
        lambda S: [-2.0] * S,
        lambda S: [float("nan")] * S,
        lambda S: [float("inf")] * S,
        lambda S: ["much"] * S,
        lambda S: torch.ones(S, S),
    ],
    "7.5": [
        "",
        "A",
        "B",
        "C",
        "BCD",
        "ABC",
        "DE",
        "BC",
        "ABCDE",
        "F",
        2,
        ["B", "E"],
        "TFFTF",
        True,
    ],
    "7.6": [
        eager,
        only_eval,
        only_range,
        only_zero,
        only_differs,
        too_strict,
        lambda jitter: True,
        lambda jitter: False,
        lambda jitter: jitter(torch.ones(3, 4)),
        lambda jitter: only_eval(jitter) and only_zero(jitter) and only_range(jitter),
        lambda jitter: only_eval(jitter) and only_zero(jitter) and only_differs(jitter),
    ],
    "7.7": [
        lambda g, c: g / c,
        lambda g, c: 1 / c,
        lambda g, c: torch.full_like(g, 1 / c),
        lambda g, c: 2 * g * g,
        lambda g, c: 1 - g,
        lambda g, c: g / (2 * g).clamp(max=1),
        lambda g, c: (g / (c * g).clamp(max=1)).mean(),
        lambda g, c: g / (c * g).clamp(min=1),
        lambda g, c: (g / (c * g).clamp(max=1))[:, None],
        lambda g, c: c * g,
    ],
    "7.8": [
        "",
        "TTTTTT",
        "FFFFFF",
        "TFTFTF",
        "TFFTF",
        "TFFTFTT",
        5,
        "ABCDEF",
        ["T"] * 6,
        "yes",
        True,
    ],
}


def test_a_load_without_gradient_is_right_with_a_remark():
    verdict = check("7.2", by_value(load_by_leaving_out))
    assert verdict.right and "remark" in verdict.message
    assert "remark" not in check("7.2", load_by_leaving_out).message


def test_a_schedule_that_fails_hears_by_how_much():
    assert "worst of five seeds" in check("7.4", lambda S: [1.5] * S).message
    assert "not found in time" in check("7.4", lambda S: [0.7] * S).message
    assert "one number for each" in check("7.4", lambda S: [1.0]).message
