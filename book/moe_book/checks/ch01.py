"""Chapter 1: an MoE on one page."""

import torch
import torch.nn.functional as F

from .exercise import Exercise, Idea

_MOE = [(64, 64, 8, 2), (4096, 14336, 8, 2), (32, 16, 16, 4)]  # D, F, E, K


def _counts(matrices=3, router_total=1, router_active=1, active=lambda E, K: K):
    def count(D, F, E, K):
        expert = matrices * D * F
        return E * expert + router_total * D * E, active(E, K) * expert + router_active * D * E

    return count


_p = torch.tensor([0.1, 0.4, 0.2, 0.3])
_outputs = torch.tensor([[1.0, 0.0], [2.0, 1.0], [4.0, -1.0], [8.0, 3.0]])
_p2 = torch.tensor([0.6, 0.05, 0.35])
_outputs2 = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 0.0], [-2.0, 0.5, 1.0]])


def _combine(weigh):
    def combine(p_E, outputs_ED, K):
        top, index = p_E.topk(K)
        return (weigh(p_E, top).unsqueeze(-1) * outputs_ED[index]).sum(0)

    return combine


def _weights(p_E, K):
    top = p_E.topk(K).values
    return top / top.sum()


def _duplicates_lost(indices_TK, E):
    count_E = torch.zeros(E, dtype=torch.int64)
    count_E[indices_TK.flatten()] += 1
    return count_E


_chosen = torch.tensor(
    [[0, 1], [1, 0], [3, 1], [1, 0]]
)  # expert 2 and the last one, 4, get nothing
_chosen2 = torch.tensor([[2, 0, 1], [2, 1, 0]])


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


EXERCISES = (
    Exercise(
        "1.1",
        right=_counts(),
        cases=tuple(_MOE),
        praise="The total grows with E, the active part with K. The router is in both, whole: small next to large experts, not next to tiny ones.",
        ideas=(
            Idea(
                "two matrices",
                _counts(matrices=2),
                "You counted two matrices per expert. A gated expert has three: gate, up and down. "
                "Reread section 1.2.",
            ),
            Idea(
                "no router",
                _counts(router_total=0, router_active=0),
                "The router is missing: it holds D numbers for each of the E "
                "experts, and every token uses all of them. Reread section 1.4.",
            ),
            Idea(
                "all active",
                _counts(active=lambda E, K: E),
                "Your active count is the total: a token visits K experts, not E. "
                "Reread section 1.8.",
            ),
            Idea(
                "one active",
                _counts(active=lambda E, K: 1),
                "Your active count holds one expert. A token visits K of them. Reread section 1.3.",
            ),
            Idea(
                "swapped",
                lambda D, F, E, K: _counts()(D, F, E, K)[::-1],
                "The two numbers are right, in the wrong order: total first, then active.",
            ),
            Idea(
                "router by K",
                lambda D, F, E, K: (E * 3 * D * F + D * E, K * (3 * D * F + D)),
                "You let a token use K rows of the "
                "router. It needs all E: without every logit nobody knows which K are the largest. Reread section 1.4.",
            ),
        ),
    ),
    Exercise(
        "1.2",
        right=_combine(lambda p, top: top / top.sum()),
        cases=((_p, _outputs, 2), (_p2, _outputs2, 2), (_p2, _outputs2, 3)),
        praise="Choose, renormalise over the chosen, add up: that is the whole combine step.",
        ideas=(
            Idea(
                "not renormalised",
                _combine(lambda p, top: top),
                "Your weights do not sum to 1: you kept the probabilities as they were "
                "over all experts. Some models do so; here we divide by the sum over the K chosen. Reread section 1.4.",
            ),
            Idea(
                "equal weights",
                _combine(lambda p, top: torch.full_like(top, 1 / len(top))),
                "You took the plain average of the K "
                "experts. Then the router would decide who speaks but not how loud, and no gradient would reach it. Reread section 1.3.",
            ),
            Idea(
                "softmax twice",
                _combine(lambda p, top: torch.softmax(top, -1)),
                "You applied a softmax to numbers that are "
                "probabilities already. The second softmax flattens them towards 1/K. Divide by their sum. Reread section 1.4.",
            ),
            Idea(
                "first rows",
                lambda p_E, outputs_ED, K: _weights(p_E, K) @ outputs_ED[:K],
                "Your weights are right, but they multiply the first K "
                "outputs and not those of the chosen experts. topk returns indices too: use them. Reread section 1.3.",
            ),
            Idea(
                "all experts",
                lambda p_E, outputs_ED, K: p_E @ outputs_ED,
                "You used every expert. That is a dense mixture: right in spirit, "
                "but it costs E experts per token and not K. Reread section 1.3.",
            ),
        ),
    ),
    Exercise(
        "1.3",
        right=lambda indices_TK, E: torch.bincount(indices_TK.flatten(), minlength=E),
        cases=((_chosen, 5), (_chosen2, 4)),
        praise="All slots counted, and experts without a token show up as zeros. Chapter 5 is about those zeros.",
        ideas=(
            Idea(
                "no empty experts",
                lambda indices_TK, E: torch.bincount(indices_TK.flatten()),
                "Your answer is shorter than E: experts "
                "behind the last one in use are missing. Idle experts are just what we look for; give the count its length E.",
            ),
            Idea(
                "first choice only",
                lambda indices_TK, E: torch.bincount(indices_TK[:, 0], minlength=E),
                "You counted first choices "
                "only. A token has K slots, and each of them is a row of work for some expert. Reread section 1.5.",
            ),
            Idea(
                "duplicates lost",
                _duplicates_lost,
                "Every expert in use counts 1. count[index] += 1 with a repeated index adds once, not each "
                "time: the right side is computed before anything is written. Use scatter_add_, bincount or one_hot.",
            ),
            Idea(
                "per slot",
                lambda indices_TK, E: F.one_hot(indices_TK, E).sum(0),
                "You have one row of counts for each slot. Add the slots up as "
                "well: the load is over all T * K of them.",
            ),
            Idea(
                "shares",
                lambda indices_TK, E: (
                    torch.bincount(indices_TK.flatten(), minlength=E) / indices_TK.numel()
                ),
                "These are shares that sum to 1. The question is for counts, which sum to T * K.",
            ),
        ),
    ),
    Exercise(
        "1.4",
        right=_balance(),
        cases=(_routed, _collapsed),
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
)
