"""Chapter 1: an MoE on one page."""

import torch
import torch.nn.functional as F

from .exercise import Exercise, Idea, which, write_test

# 1.1: a layer within two budgets
_D, _DENSE, _TIMES, _K = 1024, 3 * 1024 * 4096, 16, 4


def _fits(answer):
    F_, E = (float(number) for number in answer)
    if F_ != int(F_) or E != int(E) or min(F_, E) < 1:
        return "Width and number of experts are whole numbers, 1 or more."
    if E < _K:
        return "A token visits 4 different experts, so there must be as many at least."
    work, memory = _K * 3 * _D * F_ + _D * E, E * (3 * _D * F_ + _D)
    if work > _DENSE:
        return f"The work is {work / _DENSE:.4f} times that of the dense FFN, and may be 1 at most. Count the router too."
    if memory > _TIMES * _DENSE:
        return f"That takes {memory / _DENSE:.2f} times the parameters of the dense FFN, and there is room for {_TIMES} times."
    if work < 0.95 * _DENSE:
        return f"You use {work / _DENSE:.0%} of the work that is allowed: the experts can be wider."
    if memory < 0.95 * _TIMES * _DENSE:
        return (
            f"You use {memory / _TIMES / _DENSE:.0%} of the memory: there is room for more experts."
        )
    return True


# 1.2: implementations for a test of dispatch and combine
def _by_expert(x_TD, w_TK, e_TK, experts, rows=None, weigh=None, put=None, last=None):
    """Dispatch and combine by a loop over experts, with places where it can go wrong."""
    y_TD = torch.zeros_like(x_TD)
    for e, expert in enumerate(experts[:last]):
        t, k = torch.where(e_TK == e)
        w_A = (weigh or (lambda t, k: w_TK[t, k]))(t, k)
        out_AD = w_A.unsqueeze(-1) * expert(x_TD[t] if rows is None else x_TD[rows(t)])
        y_TD = (put or (lambda y, t, out: y.index_add(0, t, out)))(y_TD, t, out_AD)
    return y_TD


def _dense(x_TD, w_TK, e_TK, experts):
    w_TE = torch.zeros(len(x_TD), len(experts), dtype=w_TK.dtype).scatter(1, e_TK, w_TK)
    return sum(w_TE[:, e, None] * expert(x_TD) for e, expert in enumerate(experts))


def _put_over(x_TD, w_TK, e_TK, experts):
    def put(y, t, out):
        y = y.clone()
        y[t] = out
        return y

    return _by_expert(x_TD, w_TK, e_TK, experts, put=put)


def _unweighted(x_TD, w_TK, e_TK, experts):
    return _by_expert(x_TD, w_TK, e_TK, experts, weigh=lambda t, k: torch.ones_like(w_TK[t, k]))


def _first_weight(x_TD, w_TK, e_TK, experts):
    return _by_expert(x_TD, w_TK, e_TK, experts, weigh=lambda t, k: w_TK[t, 0])


def _first_rows(x_TD, w_TK, e_TK, experts):
    return _by_expert(x_TD, w_TK, e_TK, experts, rows=lambda t: torch.arange(len(t)))


def _last_idle(x_TD, w_TK, e_TK, experts):
    return _by_expert(x_TD, w_TK, e_TK, experts, last=-1)


def _added_to_input(x_TD, w_TK, e_TK, experts):
    return x_TD + _by_expert(x_TD, w_TK, e_TK, experts)


def _balance(share="slots", factor=True, scores="probability"):
    def balance(p_TE, indices_TK):
        E, K = p_TE.shape[1], indices_TK.shape[1]
        f_E = F.one_hot(indices_TK, E).sum((0, 1)).to(p_TE.dtype) / len(p_TE)
        f_E = f_E / K if share == "slots" else f_E
        if scores == "chosen":
            p_TE = p_TE * F.one_hot(indices_TK, E).sum(1)
        P_E = p_TE.mean(0)
        if scores == "none":
            P_E = f_E
        return (E if factor else 1) * (f_E * P_E).sum()

    return balance


_generator = torch.Generator().manual_seed(3)
_probabilities = torch.softmax(torch.randn(12, 4, generator=_generator) * 1.5, -1)
_routed = (_probabilities, _probabilities.topk(2).indices)
_collapsed = (torch.tensor([[0.97, 0.02, 0.01]] * 5), torch.tensor([[0]] * 5))
_noisy = (_probabilities, _probabilities.flip(-1).topk(3).indices)  # not the most probable ones

_tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [-1.0, 4.0]], dtype=torch.float64)
_sent_w = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
_sent_to = torch.tensor([[2, 0], [0, 3], [2, 3], [3, 0]])  # nobody chose expert 1
_functions = [lambda x: 10 * x, lambda x: x - 1, lambda x: x * x, lambda x: -3 * x + 1]
_three = (
    torch.cat([_tokens, _tokens[:1] + 5]),
    torch.tensor([[0.5, 0.3, 0.2]] * 5, dtype=torch.float64),
    torch.tensor([[0, 1, 2], [3, 0, 1], [2, 1, 3], [1, 0, 3], [0, 2, 3]]),
)


def _dispatch(token=lambda order, T, K: order // K, back="scatter", weights="slot"):
    def dispatch(x_TD, w_TK, e_TK, experts):
        T, K = e_TK.shape
        order = e_TK.flatten().argsort(stable=True)
        counts = torch.bincount(e_TK.flatten(), minlength=len(experts)).tolist()
        rows = x_TD[token(order, T, K)].split(counts)
        results = torch.cat([f(r) for f, r in zip(experts, rows)])
        if weights == "unsorted":
            return torch.zeros_like(x_TD).index_add(
                0, order // K, w_TK.flatten().unsqueeze(-1) * results
            )
        slots = (
            results
            if back == "none"
            else results[order]
            if back == "gather"
            else torch.empty_like(results).index_copy(0, order, results)
        )
        weighted = slots.view(T, K, -1) * (
            w_TK if weights == "slot" else torch.ones_like(w_TK)
        ).unsqueeze(-1)
        if (
            back == "overwrite"
        ):  # the slots of a token in the order of their experts; the last one written stays
            return weighted[torch.arange(T), e_TK.argmax(-1)]
        return weighted.sum(1)

    return dispatch


# 1.6: what equal tokens do to the busiest expert
def _at_least(share=lambda n_V, T: n_V.max() / T, times=lambda E, K: E / K, low=1.0):
    def at_least(tokens_T, E, K):
        n_V = torch.bincount(tokens_T)
        return max(low, float(share(n_V[n_V > 0].double(), len(tokens_T))) * times(E, K))

    return at_least


_lines = (
    (torch.tensor([32, 32, 32, 32, 32, 7, 9, 9]), 8, 2),
    (torch.tensor([1, 2, 3, 4, 4]), 4, 2),  # 0.8 of the even share: the mean decides
    (torch.tensor([5] * 6 + [0] * 3 + [8]), 16, 4),
    (torch.tensor([4, 4, 4]), 6, 1),
)


EXERCISES = (
    Exercise(
        "1.1",
        right=(1018, 64),
        accepts=_fits,
        praise="Sixteen times the parameters for the same work. The router takes its part: of 1024 columns per expert it costs a few.",
        ideas=(
            Idea(
                "router forgotten",
                (1024, 64),
                "The experts alone do exactly the work of the dense FFN, and the router comes on top: D numbers for each of the "
                "E experts, all of them used by every token. So 1024 is a little too wide. Reread section 1.8.",
            ),
            Idea(
                "as wide as before",
                (4096, 16),
                "Sixteen experts as wide as the FFN: the memory is about right, but a token visits 4 of them and so works four "
                "times as much. Make each narrower, and have more of them. Reread section 1.8.",
            ),
            Idea(
                "swapped",
                (64, 1018),
                "First the width F, then the number of experts E. The other way round these are very many tiny experts.",
            ),
        ),
    ),
    write_test(
        "1.2",
        good=(_by_expert, _dense),
        broken={
            "overwritten": (
                _put_over,
                "One broken version passes: it writes the last result of a token over the others. With K = 1 nobody sees it; "
                "give a token two experts, both with a weight.",
            ),
            "no weights": (
                _unweighted,
                "One broken version passes: it adds the results up without their weights. Weights that are all 1 hide it.",
            ),
            "first weight": (
                _first_weight,
                "One broken version passes: it takes the weight of the first slot for all slots of a token. Equal weights, "
                "or K = 1, hide it.",
            ),
            "first rows": (
                _first_rows,
                "One broken version passes: an expert with n slots gets the first n tokens and not its own. Tokens that are "
                "all equal hide it, and so does one token alone.",
            ),
            "last expert": (
                _last_idle,
                "One broken version passes: the last expert never runs. Let some token choose it.",
            ),
            "input added": (
                _added_to_input,
                "One broken version passes: it adds the input to the output. That is the residual path, which belongs to the "
                "block and not to the layer. Compare the values, not only differences or shapes.",
            ),
        },
        praise="It finds all six. Different tokens, different weights, different experts, K above 1, each expert in use: that is the recipe.",
    ),
    which(
        "1.3",
        options="ABCDE",
        right="AD",
        says={
            "B": "B is right: minlength gives it one number for each expert, used or not. Test it with an idle last expert.",
            "C": "C is right: a 1 for each slot at its expert, added up over tokens and slots.",
            "E": "E is right: index_add adds as often as an index occurs. That is its difference from count[index] += 1.",
        },
        praise="A counts each expert once, however often it was chosen. D leaves idle experts out, so its numbers belong to nobody.",
    ),
    Exercise(
        "1.4",
        right=_balance(),
        cases=(_routed, _collapsed, _noisy),
        differentiable="p_TE",
        praise="1 at perfect balance, about E/K in collapse, whatever E and K are.",
        ideas=(
            Idea(
                "no E",
                _balance(factor=False),
                "The factor E is missing. Without it perfect balance gives 1/E, and the same coefficient "
                "means something else for each number of experts. Reread section 1.9.",
            ),
            Idea(
                "sums to K",
                _balance(share="tokens"),
                "Your f sums to K and not to 1: you divided by the number of tokens. There are T * K "
                "slots. (The Mixtral code in a well-known library does it your way; its loss is K at perfect balance.) Reread section 1.9.",
            ),
            Idea(
                "first choice only",
                lambda p_TE, indices_TK: _balance()(p_TE, indices_TK[:, :1]),
                "Your f counts first choices only. All K slots of a "
                "token are work for some expert, so all count. Reread section 1.9.",
            ),
            Idea(
                "no probabilities",
                _balance(scores="none"),
                "You multiplied f by f. Counts have no gradient, so this loss would teach the "
                "router nothing. One of the two must be the mean probability P. Reread section 1.9.",
            ),
            Idea(
                "chosen only",
                _balance(scores="chosen"),
                "Your P adds up only the probabilities of chosen experts. P is the mean over all "
                "tokens: what a token that did not choose e would have given it counts too. Reread section 1.9.",
            ),
        ),
    ),
    Exercise(
        "1.5",
        right=_dispatch(),
        cases=((_tokens, _sent_w, _sent_to, _functions), (*_three, _functions)),
        praise="One gather, one stretch of rows per expert, one way back, and no search for slots inside the loop. This is what DispatchPlan does.",
        ideas=(
            Idea(
                "no way back",
                _dispatch(back="none"),
                "Your results are still in the order of the experts: row i belongs to slot order[i], not to "
                "slot i. Undo the sort before you add up. Reread section 1.5.",
            ),
            Idea(
                "sorted twice",
                _dispatch(back="gather"),
                "You wrote results[order], which sorts a second time. The way back is the inverse: "
                "slots[order] = results, or results[order.argsort()].",
            ),
            Idea(
                "tokens repeated in blocks",
                _dispatch(token=lambda order, T, K: order % T),
                "You took slot s for token s % T, as if all first slots "
                "came before all second ones. e_TK.flatten() goes token by token: slot s belongs to token s // K.",
            ),
            Idea(
                "weights not sorted",
                _dispatch(weights="unsorted"),
                "Your rows are sorted by expert and your weights are not, so each result gets "
                "the weight of another slot. Sort both: w_TK.flatten()[order].",
            ),
            Idea(
                "overwritten",
                _dispatch(back="overwrite"),
                "Only one result of each token is left. y[t] = ... with a repeated t keeps the last "
                "one written; the results of a token must be added up, for example by index_add. Reread section 1.5.",
            ),
            Idea(
                "no weights",
                _dispatch(weights="none"),
                "You added the results up without their weights. Then the router decides who speaks but not "
                "how loud, and gets no gradient. Reread section 1.3.",
            ),
        ),
    ),
    Exercise(
        "1.6",
        right=_at_least(),
        cases=_lines,
        praise="A share q of equal tokens gives q T slots to each of its K experts, and the even share is T K / E: so q E / K times. The text alone makes the load uneven.",
        ideas=(
            Idea(
                "K forgotten",
                _at_least(times=lambda E, K: E),
                "You compared with T / E, the even share for one slot per token. There are T K slots, so the even share is T K / E. "
                "Reread section 1.9.",
            ),
            Idea(
                "slots spread",
                _at_least(times=lambda E, K: E / K**2),
                "You divided the tokens among their K experts. But each of them visits *all* K: each of those experts gets one slot "
                "from each such token.",
            ),
            Idea(
                "a share",
                _at_least(times=lambda E, K: 1.0, low=0.0),
                "You have the share of the commonest token. The question is how many times its even share of the slots an expert "
                "gets from it. Reread section 1.9.",
            ),
            Idea(
                "slot share",
                _at_least(times=lambda E, K: 1 / K, low=0.0),
                "You have a share of all slots. Divide it by the even share, 1 / E. Reread section 1.9.",
            ),
            Idea(
                "below the mean",
                _at_least(low=0.0),
                "Below 1 in one case: but the busiest expert cannot get less than the mean of all experts, which is its even share.",
            ),
            Idea(
                "as many as different tokens",
                _at_least(share=lambda n_V, T: n_V.mean() / T),
                "You took the mean count of a token. The busiest expert is bound by the commonest one.",
            ),
        ),
    ),
)
