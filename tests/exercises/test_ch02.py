"""Chapter 2: right answers that differ from the checker's own, and wrong ones a class would hand in."""

import torch

from moe_book.checks import check


def route_by_renormalising(h_E, K):
    p_K, index_K = torch.softmax(h_E, 0).topk(K)
    return index_K, p_K / p_K.sum()


def route_in_plain_python(h_E, K):
    order = sorted(range(len(h_E)), key=lambda e: -h_E[e])[:K]
    top = [float(torch.exp(h_E[e])) for e in order]
    return order, [v / sum(top) for v in top]


def gradient_by_autograd(h_E, f_E, K, norm):
    h_E = h_E.clone().requires_grad_()
    w_K, index_K = torch.softmax(h_E, 0).topk(K)
    y = ((w_K / w_K.sum() if norm else w_K) * f_E[index_K]).sum()
    return torch.autograd.grad(y, h_E)[0]


def gradient_by_small_steps(h_E, f_E, K, norm):
    h_E, f_E = h_E.double(), f_E.double()

    def y(h):
        w_K, index_K = torch.softmax(h, 0).topk(K)
        return ((w_K / w_K.sum() if norm else w_K) * f_E[index_K]).sum()

    steps = 1e-5 * torch.eye(len(h_E), dtype=torch.float64)
    return [float(y(h_E + step) - y(h_E - step)) / 2e-5 for step in steps]


def temperature_from_a_grid(h_TE, H):
    grid = torch.logspace(-2, 2, 20001)
    best = min(grid[::100], key=lambda t: abs(entropy(h_TE / t) - H))
    near = grid[(grid > best / 1.1) & (grid < best * 1.1)]
    return min(near[::5], key=lambda t: abs(entropy(h_TE / t) - H))


def entropy(h_TE):
    return torch.distributions.Categorical(logits=h_TE).entropy().mean().item()


def temperature_by_halving(h_TE, H):
    low, high = 0.01, 100.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(h_TE / middle) < H else (low, middle)
    return low


def finds_by_formula(route):
    torch.manual_seed(0)
    h_E, f_E = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    h_E.requires_grad_()
    index_K, w_K = route(h_E, 3)
    y = (w_K * f_E[index_K]).sum()
    assert torch.allclose(w_K.sum(), torch.tensor(1.0).double())
    (gradient_E,) = torch.autograd.grad(y, h_E)
    expected_E = torch.zeros(6).double().scatter(0, index_K, (w_K * (f_E[index_K] - y)).detach())
    assert torch.allclose(gradient_E, expected_E, atol=1e-6)


def finds_by_hand(route):
    h_E = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    index_K, w_K = route(h_E, 2)
    (w_K * torch.tensor([1.0, 3.0, 10.0])[index_K]).sum().backward()
    right = torch.tensor([-0.3932, 0.3932, 0.0])
    return bool(torch.allclose(h_E.grad, right, atol=1e-3) and abs(w_K.sum() - 1) < 1e-4)


def ties_by_argsort(h_TE, K):
    return torch.argsort(-h_TE, dim=-1, stable=True)[:, :K]


def ties_in_plain_python(h_TE, K):
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:K] for row in h_TE.tolist()]


def ties_by_sort(h_TE, K):
    return h_TE.sort(dim=-1, descending=True, stable=True)[1][:, :K]


def from_the_right(h_TE, K):
    return (h_TE.shape[-1] - 1) - torch.sort(h_TE.flip(-1), stable=True).indices.flip(-1)[:, :K]


RIGHT = {
    "2.1": [route_by_renormalising, route_in_plain_python],
    "2.2": [gradient_by_autograd, gradient_by_small_steps],
    "2.3": [temperature_from_a_grid, temperature_by_halving],
    "2.4": ["FFTFTF", " fftftf ", [False, False, True, False, True, False], "F F T F T F"],
    "2.5": [ties_by_argsort, ties_in_plain_python, ties_by_sort, from_the_right],
    "2.6": ["BE", ["e", "b"], {"B", "E"}],
    "2.7": [finds_by_formula, finds_by_hand],
}


def parts(h_E, K):
    top_K, index_K = h_E.topk(K)
    return top_K, index_K


def swapped_pair(h_E, K):
    top_K, index_K = parts(h_E, K)
    return torch.softmax(top_K, 0), index_K


def smallest(h_E, K):
    top_K, index_K = h_E.topk(K, largest=False)
    return index_K, torch.softmax(top_K, 0)


def divided_logits(h_E, K):
    top_K, index_K = parts(h_E, K)
    return index_K, top_K / top_K.sum()


def sigmoid_weights(h_E, K):
    top_K, index_K = parts(h_E, K)
    return index_K, torch.sigmoid(top_K) / torch.sigmoid(top_K).sum()


def by_magnitude(h_E, K):
    index_K = h_E.abs().topk(K).indices
    return index_K, torch.softmax(h_E[index_K], 0)


def weights_of_all(h_E, K):
    return parts(h_E, K)[1], torch.softmax(h_E, 0)


def first_weights(h_E, K):
    p_E = torch.softmax(h_E, 0)
    return parts(h_E, K)[1], p_E[:K] / p_E[:K].sum()


def masked_mixture(h_E, f_E, K, norm):
    p_E = torch.softmax(h_E, 0)
    w_E = p_E * (h_E >= h_E.topk(K).values[-1])
    return p_E, w_E / w_E.sum() if norm else w_E


def only_weights(h_E, f_E, K, norm):
    return masked_mixture(h_E, f_E, K, norm)[1]


def sign_turned(h_E, f_E, K, norm):
    return -gradient_by_autograd(h_E, f_E, K, norm)


def always_renormalised(h_E, f_E, K, norm):
    return gradient_by_autograd(h_E, f_E, K, True)


def plus_y(h_E, f_E, K, norm):
    _, w_E = masked_mixture(h_E, f_E, K, norm)
    return w_E * (f_E + (w_E * f_E).sum())


def minus_mean(h_E, f_E, K, norm):
    _, w_E = masked_mixture(h_E, f_E, K, norm)
    return w_E * (f_E - f_E.mean())


def diagonal(h_E, f_E, K, norm):
    _, w_E = masked_mixture(h_E, f_E, K, norm)
    return w_E * (1 - w_E) * f_E


def w_for_p(h_E, f_E, K, norm):
    p_E, w_E = masked_mixture(h_E, f_E, K, norm)
    return p_E * (f_E - (w_E * f_E).sum())


def no_gradient(h_E, f_E, K, norm):
    return torch.zeros_like(h_E)


def one_always(h_TE, H):
    return 1.0


def the_entropy(h_TE, H):
    return entropy(h_TE)


def ratio(h_TE, H):
    return H / entropy(h_TE)


def inverse(h_TE, H):
    return 1 / temperature_by_halving(h_TE, H)


def negative(h_TE, H):
    return -temperature_by_halving(h_TE, H)


def in_bits(h_TE, H):
    return temperature_by_halving(h_TE, H * 0.6931)


def first_token(h_TE, H):
    return temperature_by_halving(h_TE[:1], H)


def of_the_mean_logits(h_TE, H):
    return temperature_by_halving(h_TE.mean(0, keepdim=True), H)


def too_coarse(h_TE, H):
    return min((0.25, 0.5, 1.0, 2.0, 4.0), key=lambda t: abs(entropy(h_TE / t) - H))


def by_topk(h_TE, K):
    return torch.topk(h_TE, K).indices


def values(h_TE, K):
    return torch.sort(h_TE, descending=True).values[:, :K]


def last_first(h_TE, K):
    return torch.sort(h_TE, dim=-1, stable=True).indices[:, -K:].flip(-1)


def over_tokens(h_TE, K):
    return torch.sort(h_TE, dim=0, descending=True, stable=True).indices[:, :K]


def ranks(h_TE, K):
    return torch.argsort(torch.argsort(-h_TE, stable=True), stable=True)[:, :K]


def first_k(h_TE, K):
    return torch.arange(K).expand(len(h_TE), K)


def always_three(h_TE, K):
    return ties_by_argsort(h_TE, 3)


def rounded(h_TE, K):
    return ties_by_argsort(h_TE.round(), K)


def passes_all(route):
    return True


def sums_to_one(route):
    return abs(float(route(torch.tensor([2.0, 1.0, 0.0]), 2)[1].sum()) - 1) < 1e-5


def right_values(route):
    index_K, w_K = route(torch.tensor([2.0, 1.0, 0.0]), 2)
    return index_K.tolist() == [0, 1] and abs(float(w_K[0]) - 0.7311) < 1e-3


def some_gradient(route):
    h_E = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    index_K, w_K = route(h_E, 2)
    (w_K * torch.tensor([1.0, 3.0, 10.0])[index_K]).sum().backward()
    return bool(h_E.grad.abs().sum() > 1e-4) and abs(float(w_K.sum()) - 1) < 1e-5


def unchosen_is_zero(route):
    h_E = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    index_K, w_K = route(h_E, 2)
    (w_K * torch.tensor([1.0, 3.0, 10.0])[index_K]).sum().backward()
    return abs(float(h_E.grad[2])) < 1e-6


def size_of_gradient(route):
    h_E = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    index_K, w_K = route(h_E, 2)
    (w_K * torch.tensor([1.0, 3.0, 10.0])[index_K]).sum().backward()
    return bool(torch.allclose(h_E.grad.abs(), torch.tensor([0.3932, 0.3932, 0.0]), atol=1e-3))


def gradient_only(route):
    h_E = torch.tensor([2.0, 1.0], requires_grad=True)
    index_K, w_K = route(h_E, 2)
    (w_K * torch.tensor([1.0, 3.0])[index_K]).sum().backward()
    return bool(torch.allclose(h_E.grad, torch.tensor([-0.3932, 0.3932]), atol=1e-3))


def top_1(route):
    h_E = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    return float(route(h_E, 1)[1]) == 1


def exact_zero(route):
    h_E = torch.tensor([2.0, 1.0, 0.3], requires_grad=True)
    index_K, w_K = route(h_E, 2)
    (w_K * torch.tensor([1.0, 3.0, 10.0])[index_K]).sum().backward()
    return h_E.grad.tolist() == [-1.0, 1.0, 0.0]


WRONG = {  # number -> (answer, the idea that is named, or None where the message shows the case)
    "2.1": [
        (answer, None)
        for answer in (
            swapped_pair,
            smallest,
            divided_logits,
            sigmoid_weights,
            by_magnitude,
            weights_of_all,
            first_weights,
        )
    ],
    "2.2": [
        (answer, None)
        for answer in (
            only_weights,
            sign_turned,
            plus_y,
            minus_mean,
            diagonal,
            w_for_p,
            no_gradient,
        )
    ]
    + [(always_renormalised, "always renormalised")],
    "2.3": [
        (answer, None)
        for answer in (
            one_always,
            the_entropy,
            ratio,
            negative,
            first_token,
            of_the_mean_logits,
            too_coarse,
        )
    ]
    + [(inverse, "times temperature"), (in_bits, "bits")],
    "2.4": [
        ("FFTFTT", "(f)"),
        ("TFTFTF", "(a)"),
        ("FTTFTF", "(b)"),
        ("TTTTTT", None),
        ("FF", None),
        ([True] * 6, None),
        ("FFFFFF", None),
    ],
    "2.5": [
        (by_topk, "plain topk"),
        (values, None),
        (last_first, "last wins"),
        (over_tokens, None),
        (ranks, None),
        (first_k, None),
        (always_three, None),
        (rounded, None),
    ],
    "2.6": [
        ("B", "one missing"),
        ("E", None),
        ("AB", None),
        ("AE", "A named"),
        ("CE", "C named"),
        ("BDE", None),
        ("ABCDE", None),
        ("", None),
    ],
    "2.7": [
        (sums_to_one, "detached"),
        (right_values, "detached"),
        (some_gradient, "sum detached"),
        (unchosen_is_zero, "half a gradient"),
        (size_of_gradient, "wrong sign"),
        (gradient_only, "sum detached"),
        (top_1, "detached"),
        (exact_zero, None),
    ],
}


def test_a_test_that_passes_everything_has_not_found_the_broken():
    assert check("2.7", passes_all).status == "wrong"
