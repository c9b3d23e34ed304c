"""Chapter 1: right answers that differ from the checker's own, and wrong ones a class would hand in."""

import torch

from moe_book.checks import check


def load_by_scatter(indices_TK, E):
    return torch.zeros(E).scatter_add_(0, indices_TK.flatten(), torch.ones(indices_TK.numel()))


def random_case(T=12, D=3, E=4, K=2):
    torch.manual_seed(0)
    w_TK, e_TK = torch.softmax(torch.randn(T, E), -1).topk(K)
    return torch.randn(T, D), w_TK, e_TK, [torch.nn.Linear(D, D) for _ in range(E)]


def finds_with_random_input(layer):
    x_TD, w_TK, e_TK, experts = random_case()
    expected = torch.stack(
        [
            sum(w * experts[e](x) for w, e in zip(w_K, e_K))
            for x, w_K, e_K in zip(x_TD, w_TK, e_TK.tolist())
        ]
    )
    assert torch.allclose(layer(x_TD, w_TK, e_TK, experts), expected, atol=1e-5)


def finds_by_hand(layer):
    x_TD, w_TK = torch.tensor([[1.0], [10.0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    experts = [lambda x: x, lambda x: 2 * x, lambda x: 4 * x]
    out = layer(x_TD, w_TK, torch.tensor([[2, 0], [2, 1]]), experts)
    return out.flatten().tolist() == [3.25, 30.0]


def at_least_in_plain_python(tokens_T, E, K):
    tokens = tokens_T.tolist()
    most = max(tokens.count(v) for v in tokens)
    return max(1, most / (len(tokens) * K / E))


def at_least_by_mode(tokens_T, E, K):
    share = (tokens_T == tokens_T.mode().values).double().mean()
    return torch.clamp(share * E / K, min=1)


def balance_by_scatter(p_TE, indices_TK):
    E = p_TE.shape[1]
    return (load_by_scatter(indices_TK, E) * p_TE.mean(0)).sum() * E / indices_TK.numel()


def balance_in_plain_python(p_TE, indices_TK):
    E, slots = p_TE.shape[1], indices_TK.flatten().tolist()
    return E * sum(slots.count(e) / len(slots) * float(p_TE[:, e].mean()) for e in range(E))


def dispatch_with_index_add(x_TD, w_TK, e_TK, experts):
    order = e_TK.flatten().argsort()
    token_A = order.div(e_TK.shape[1], rounding_mode="floor")
    counts = [int((e_TK == e).sum()) for e in range(len(experts))]
    results = torch.cat([f(rows) for f, rows in zip(experts, x_TD[token_A].split(counts))])
    return torch.zeros_like(x_TD).index_add(0, token_A, w_TK.flatten()[order, None] * results)


def dispatch_with_the_inverse_permutation(x_TD, w_TK, e_TK, experts):
    order = e_TK.flatten().sort(stable=True).indices
    rows = x_TD.repeat_interleave(e_TK.shape[1], 0)[order]
    results = torch.stack([experts[e](row) for e, row in zip(e_TK.flatten()[order].tolist(), rows)])
    return torch.einsum("tk,tkd->td", w_TK, results[order.argsort()].unflatten(0, e_TK.shape))


RIGHT = {
    "1.1": [(1000, 65), [1018.0, 64], torch.tensor([1010, 64])],
    "1.2": [finds_with_random_input, finds_by_hand],
    "1.3": ["AD", {"D", "A"}, "d, a"],
    "1.4": [balance_by_scatter, balance_in_plain_python],
    "1.5": [dispatch_with_index_add, dispatch_with_the_inverse_permutation],
    "1.6": [at_least_in_plain_python, at_least_by_mode],
}


def passes_all(layer):
    return True


def one_token(layer):
    out = layer(torch.ones(1, 2), torch.ones(1, 1), torch.tensor([[0]]), [lambda x: 3 * x])
    return out.tolist() == [[3.0, 3.0]]


def top_1(layer):
    x_TD = torch.tensor([[1.0], [10.0]])
    experts = [lambda x: x, lambda x: 2 * x]
    return layer(x_TD, torch.ones(2, 1), torch.tensor([[1], [0]]), experts).tolist() == [
        [2.0],
        [10.0],
    ]


def only_the_shape(layer):
    given = random_case()
    return layer(*given).shape == given[0].shape


def equal_weights(layer):
    x_TD, w_TK = torch.tensor([[1.0], [10.0]]), torch.full((2, 2), 0.5)
    experts = [lambda x: x, lambda x: 2 * x, lambda x: 4 * x]
    out = layer(x_TD, w_TK, torch.tensor([[2, 0], [2, 1]]), experts)
    return out.flatten().tolist() == [2.5, 30.0]


def weights_of_one(layer):
    x_TD, w_TK = torch.tensor([[1.0], [10.0]]), torch.ones(2, 2)
    experts = [lambda x: x, lambda x: 2 * x, lambda x: 4 * x]
    out = layer(x_TD, w_TK, torch.tensor([[2, 0], [2, 1]]), experts)
    return out.flatten().tolist() == [5.0, 60.0]


def last_expert_idle(layer):
    x_TD, w_TK = torch.tensor([[1.0], [10.0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    experts = [lambda x: x, lambda x: 2 * x, lambda x: 4 * x, lambda x: 8 * x]
    out = layer(x_TD, w_TK, torch.tensor([[2, 0], [2, 1]]), experts)
    return out.flatten().tolist() == [3.25, 30.0]


def too_strict(layer):
    given = random_case()
    return torch.equal(layer(*given), given[0])


def balance(f_E, P_E, factor):
    return factor * (f_E * P_E).sum()


def parts(p_TE, indices_TK):
    E, slots = p_TE.shape[1], indices_TK.numel()
    return torch.bincount(indices_TK.flatten(), minlength=E) / slots, p_TE.mean(0), E


def by_argmax(p_TE, indices_TK):
    E = p_TE.shape[1]
    return E * (torch.bincount(p_TE.argmax(-1), minlength=E) / len(p_TE) * p_TE.mean(0)).sum()


def mean_for_sum(p_TE, indices_TK):
    f_E, P_E, E = parts(p_TE, indices_TK)
    return E * (f_E * P_E).mean()


def sum_for_mean(p_TE, indices_TK):
    f_E, P_E, E = parts(p_TE, indices_TK)
    return E * (f_E * P_E).sum() * len(p_TE)


def softmax_again(p_TE, indices_TK):
    f_E, _, E = parts(p_TE, indices_TK)
    return E * (f_E * torch.softmax(p_TE, -1).mean(0)).sum()


def minus_one(p_TE, indices_TK):
    return balance(*parts(p_TE, indices_TK)) - 1


def k_times_e(p_TE, indices_TK):
    return balance(*parts(p_TE, indices_TK)) * indices_TK.shape[1]


def e_over_k(p_TE, indices_TK):
    return balance(*parts(p_TE, indices_TK)) / indices_TK.shape[1]


def squares_of_p(p_TE, indices_TK):
    _, P_E, E = parts(p_TE, indices_TK)
    return E * (P_E * P_E).sum()


def coefficient_of_variation(p_TE, indices_TK):
    f_E, _, _ = parts(p_TE, indices_TK)
    return f_E.var() / f_E.mean() ** 2


def largest_share(p_TE, indices_TK):
    f_E, _, E = parts(p_TE, indices_TK)
    return E * f_E.max()


def order_of_experts_kept(x_TD, w_TK, e_TK, experts):
    order = e_TK.flatten().argsort(stable=True)
    return x_TD[order // e_TK.shape[1]]


def all_experts_all_tokens(x_TD, w_TK, e_TK, experts):
    return sum(expert(x_TD) for expert in experts)


def first_slot_only(x_TD, w_TK, e_TK, experts):
    return torch.stack([experts[e](x) for x, e in zip(x_TD, e_TK[:, 0].tolist())])


def idle_experts_skipped(x_TD, w_TK, e_TK, experts):
    order = e_TK.flatten().argsort(stable=True)
    counts = torch.bincount(e_TK.flatten()).clamp(min=1).tolist()
    rows = x_TD[order // e_TK.shape[1]].split(counts)
    results = torch.cat([f(r) for f, r in zip(experts, rows)])
    return torch.zeros_like(x_TD).index_add(0, order // 2, w_TK.flatten()[order, None] * results)


def weights_by_first_slot(x_TD, w_TK, e_TK, experts):
    w_TK = w_TK[:, :1].expand_as(w_TK)
    return dispatch_with_index_add(x_TD, w_TK, e_TK, experts)


def renormalised_again(x_TD, w_TK, e_TK, experts):
    return dispatch_with_index_add(x_TD, torch.softmax(w_TK, -1), e_TK, experts)


def residual_added(x_TD, w_TK, e_TK, experts):
    return x_TD + dispatch_with_index_add(x_TD, w_TK, e_TK, experts)


def without_the_order(x_TD, w_TK, e_TK, experts):
    return dispatch_with_index_add(x_TD, w_TK, e_TK.sort(-1).values, experts)


def share_of_commonest(tokens_T, E, K):
    return torch.bincount(tokens_T).max() / len(tokens_T)


def times_e(tokens_T, E, K):
    return max(1, share_of_commonest(tokens_T, E, K) * E)


def times_k(tokens_T, E, K):
    return max(1, share_of_commonest(tokens_T, E, K) * E * K)


def no_bound(tokens_T, E, K):
    return share_of_commonest(tokens_T, E, K) * E / K


def at_most(tokens_T, E, K):
    return E / K


def one_always(tokens_T, E, K):
    return 1.0


def added_to_one(tokens_T, E, K):
    return 1 + share_of_commonest(tokens_T, E, K) * E / K


def over_different_tokens(tokens_T, E, K):
    return max(1, len(set(tokens_T.tolist())) / len(tokens_T) * E / K)


def in_slots(tokens_T, E, K):
    return float(torch.bincount(tokens_T).max())


def spread_over_k(tokens_T, E, K):
    return max(1, share_of_commonest(tokens_T, E, K) * E / K / K)


WRONG = {  # number -> (answer, the idea that is named, or None where the message shows the case)
    "1.1": [
        ((1024, 64), "router forgotten"),
        ((4096, 16), "as wide as before"),
        ((64, 1018), "swapped"),
        ((1024, 4), None),
        ((512, 64), None),
        ((1018, 16), None),
        ((1018, 70), None),
        ((1018.5, 64), None),
        ((4096, 8), None),
        ((16384, 4), None),
        ((0, 64), None),
        ((1018, 64, 4), None),
        (1018, None),
        ("1018, 64", None),
    ],
    "1.2": [
        (one_token, "overwritten"),
        (top_1, "overwritten"),
        (equal_weights, "first weight"),
        (weights_of_one, "no weights"),
        (last_expert_idle, "last expert"),
        (only_the_shape, "overwritten"),
        (too_strict, None),
    ],
    "1.3": [
        ("A", "one missing"),
        ("D", None),
        ("AB", None),
        ("BD", "B named"),
        ("CD", "C named"),
        ("DE", "E named"),
        ("ABD", None),
        ("BCE", None),
        ("ABCDE", None),
        ("", None),
    ],
    "1.4": [
        (by_argmax, None),
        (mean_for_sum, "no E"),
        (sum_for_mean, None),
        (softmax_again, None),
        (minus_one, None),
        (k_times_e, "sums to K"),
        (e_over_k, None),
        (squares_of_p, None),
        (coefficient_of_variation, None),
        (largest_share, None),
    ],
    "1.5": [
        (order_of_experts_kept, None),
        (all_experts_all_tokens, None),
        (first_slot_only, None),
        (idle_experts_skipped, None),
        (weights_by_first_slot, None),
        (renormalised_again, None),
        (residual_added, None),
        (without_the_order, None),
    ],
    "1.6": [
        (share_of_commonest, "a share"),
        (times_e, "K forgotten"),
        (times_k, None),
        (no_bound, "below the mean"),
        (at_most, None),
        (one_always, None),
        (added_to_one, None),
        (over_different_tokens, None),
        (in_slots, None),
        (spread_over_k, "slots spread"),
    ],
}


def test_a_test_that_passes_everything_has_not_found_the_broken():
    assert check("1.2", passes_all).status == "wrong"


def test_a_balance_loss_through_which_no_gradient_flows_is_right_with_a_remark():
    assert "gradient" in check("1.4", balance_in_plain_python).message
    assert "remark" not in check("1.4", balance_by_scatter).message
