"""Chapter 2: right answers that differ from the checker's own."""

import torch


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


def entropy_from_the_library(h_TE, temperature):
    return torch.distributions.Categorical(logits=h_TE / temperature).entropy().mean()


def entropy_from_logits(h_TE, temperature):
    h_TE = h_TE / temperature
    return float((torch.logsumexp(h_TE, -1) - (torch.softmax(h_TE, -1) * h_TE).sum(-1)).mean())


def ties_by_argsort(h_TE, K):
    return torch.argsort(-h_TE, dim=-1, stable=True)[:, :K]


def ties_in_plain_python(h_TE, K):
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:K] for row in h_TE.tolist()]


RIGHT = {
    "2.1": [route_by_renormalising, route_in_plain_python],
    "2.2": [gradient_by_autograd, gradient_by_small_steps],
    "2.3": [entropy_from_the_library, entropy_from_logits],
    "2.4": ["FFTFTF", " fftftf "],
    "2.5": [ties_by_argsort, ties_in_plain_python],
}
