"""Chapter 5: right answers that differ from the checker's own."""

import torch

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


def gradient_by_autograd(h_TE, K):
    h_TE = h_TE.clone().requires_grad_()
    return torch.autograd.grad(losses.load_balance(routing_of(h_TE, K)), h_TE)[0]


def gradient_token_by_token(h_TE, K):
    T, E = h_TE.shape
    f_E = torch.bincount(h_TE.topk(K).indices.flatten(), minlength=E) / (T * K)
    rows = []
    for h_E in h_TE:
        p_E = torch.softmax(h_E, 0)
        rows.append((torch.diag(p_E) - torch.outer(p_E, p_E)) @ f_E * E / T)
    return torch.stack(rows)


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


def coefficient_of_the_package(coefficient, convention, E, K):
    return losses.convert_coefficient(coefficient, convention, "moe_core", n_experts=E, top_k=K)


def coefficient_by_hand(coefficient, convention, E, K):
    if convention == "fairscale":
        return coefficient / E / E
    return coefficient * K if convention == "huggingface" else coefficient


def spread_by_moments(load_E):
    return float((load_E**2).mean() / load_E.mean() ** 2 - 1)


def z_of_the_package(h_TE, real_T):
    E = h_TE.shape[1]
    router = TopKRouter(E, E, 1)
    router.weight.data = torch.eye(E)
    return losses.z_loss(router(h_TE.unsqueeze(0), padding_mask=real_T.unsqueeze(0)))


def z_in_plain_steps(h_TE, real_T):
    z_T = h_TE.double().exp().sum(-1).log()
    return (z_T**2 * real_T).sum() / real_T.sum()


def global_of_the_package(micro, K):
    return losses.global_balance([routing_of(h_TE, K) for h_TE in micro])


def global_by_counting(micro, K):
    counts, scores, T = 0, 0, 0
    for h_TE in micro:
        counts = counts + torch.bincount(h_TE.topk(K).indices.flatten(), minlength=h_TE.shape[1])
        scores = scores + torch.softmax(h_TE, -1).sum(0)
        T += len(h_TE)
    return float(len(counts) * (counts / (T * K) * scores / T).sum())


RIGHT = {
    "5.1": [loss_of_the_package, loss_by_bincount],
    "5.2": [gradient_by_autograd, gradient_token_by_token],
    "5.3": [model_of_the_package, model_in_a_loop],
    "5.4": [coefficient_of_the_package, coefficient_by_hand],
    "5.5": [losses.cv_squared, spread_by_moments],
    "5.6": [z_of_the_package, z_in_plain_steps],
    "5.7": [global_of_the_package, global_by_counting],
    "5.8": ["FFFTFT", " ffftft "],
}
