"""How published routers differ: not what their descriptions say, but what they do to numbers.

``measure`` sees a router as a function from logits to weights, so it works on anybody's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.routers.presets import PRESETS, preset
from moe_core.routers.topk import GROUP_SCORES, SCORE_FUNCS, TopKRouter, keep_best_groups


@dataclass(frozen=True)
class Facts:
    """What an experiment found.

    Attributes:
        top_k: experts per token.
        score_func: the score to which the weights of a token are proportional, a key of
            ``SCORE_FUNCS``.
        least, most: of a token's K weights together, over all tokens.
        scale: the factor between weight and score; where the sum is the same for all tokens, that
            sum.
        sees_unchosen: whether the logit of an expert that is not chosen changes the weights of
            those that are.
        bias: "none", in the "logits", in the "selection" only, or "both".
        groups: "none", or which groups a token may choose from.
    """

    top_k: int
    score_func: str
    least: float
    most: float
    scale: float
    sees_unchosen: bool
    bias: str
    groups: str


def measure(
    weigh: Callable[[Tensor], Tensor],
    n_experts: int,
    *,
    bias: Tensor | None = None,
    expert_bias: Tensor | None = None,
    n_groups: int = 1,
) -> Facts:
    """Experiment on a router.

    Args:
        weigh: logits (T, E) -> weights (T, E), exactly 0 for experts that are not chosen.
        bias, expert_bias: tensors the router reads that may be biases; they are left at zero.
        n_groups: the number of groups its experts stand in.

    Raises:
        ValueError: no score function of ours, or no rule of groups, explains the weights.
    """
    generator = torch.Generator().manual_seed(0)
    logits_TE = 2 * torch.randn(256, n_experts, generator=generator)
    shift_E = torch.randn(n_experts, generator=generator)
    for tensor in (bias, expert_bias):
        if tensor is not None:
            tensor.data.zero_()
    weights_TE = weigh(logits_TE)
    chosen_TE = weights_TE != 0
    top_k = int(chosen_TE.sum(-1).max())
    score_func, scale_TK = _explain(weights_TE, logits_TE, top_k)
    total_T = weights_TE.sum(-1)
    same_sum = _spread(total_T) < 1e-4

    lowest_T1 = logits_TE.masked_fill(chosen_TE, torch.inf).argmin(-1, keepdim=True)
    lowered_TE = weigh(logits_TE.scatter_add(-1, lowest_T1, -torch.ones(lowest_T1.shape)))
    same_T = ((lowered_TE != 0) == chosen_TE).all(-1)
    sees_unchosen = not torch.allclose(lowered_TE[same_T], weights_TE[same_T], rtol=1e-4)

    where = []
    if bias is not None:  # in the logits: the same as logits shifted by hand
        shifted_TE = weigh(logits_TE + shift_E)
        bias.data.copy_(shift_E)
        where += ["logits"] * torch.allclose(weigh(logits_TE), shifted_TE, rtol=1e-4)
        bias.data.zero_()
    if expert_bias is not None:
        # In the selection only: others are chosen, but weights follow from the logits alone.
        expert_bias.data.copy_(shift_E)
        biased_TE = weigh(logits_TE)
        other_choice = not torch.equal(biased_TE != 0, chosen_TE)
        same_score = _explain(biased_TE, logits_TE, top_k)[0] == score_func
        where += ["selection"] * (other_choice and same_score)
    score = SCORE_FUNCS[score_func]
    shift = 0 if expert_bias is None else expert_bias
    groups = _groups(weigh(logits_TE) != 0, score(logits_TE) + shift, n_groups, top_k)
    if expert_bias is not None:
        expert_bias.data.zero_()
    return Facts(
        top_k=top_k,
        score_func=score_func,
        least=float(total_T.min()),
        most=float(total_T.max()),
        scale=float(total_T.mean() if same_sum else scale_TK.mean()),
        sees_unchosen=sees_unchosen,
        bias="both" if len(where) == 2 else where[0] if where else "none",
        groups=groups,
    )


def _explain(weights_TE: Tensor, logits_TE: Tensor, top_k: int) -> tuple[str, Tensor]:
    """The score function to which a token's K weights are proportional, and the factor (T, K)."""
    index_TK = (weights_TE != 0).float().topk(top_k, dim=-1).indices
    for name, score in SCORE_FUNCS.items():
        factor_TK = weights_TE.gather(-1, index_TK) / score(logits_TE).gather(-1, index_TK)
        if (_spread(factor_TK.T) if top_k > 1 else _spread(factor_TK)) < 1e-4:
            return name, factor_TK
    raise ValueError("no score function explains these weights")


def _groups(chosen_TE: Tensor, choice_TE: Tensor, n_groups: int, top_k: int) -> str:
    """The rule of groups under which the K best are the chosen ones."""
    if n_groups == 1:
        return "none"
    for group_score in GROUP_SCORES:
        for topk_groups in range(1, n_groups + 1):
            kept_TE = keep_best_groups(choice_TE, n_groups, topk_groups, group_score)
            best_TK = kept_TE.topk(top_k, dim=-1).indices
            if torch.equal(torch.zeros_like(chosen_TE).scatter(-1, best_TK, True), chosen_TE):
                return f"best {topk_groups} of {n_groups} by {group_score}"
    raise ValueError("no rule of groups explains this choice")


def _spread(values: Tensor) -> float:
    """The largest relative difference along the first dimension."""
    return float(((values.amax(0) - values.amin(0)) / values.amax(0)).max())


@torch.no_grad()
def measure_router(router: TopKRouter) -> Facts:
    """``measure`` for a TopKRouter with d_model = n_experts; its weight becomes the identity."""
    router.eval().weight.copy_(torch.eye(router.n_experts))  # x is then the logits

    def weigh(logits_TE: Tensor) -> Tensor:
        routing = router(logits_TE.unsqueeze(0))
        return routing.by_expert(routing.expert_weights)[0]

    biases = {"bias": router.bias, "expert_bias": router.expert_bias}
    return measure(weigh, router.n_experts, n_groups=router.n_groups, **biases)


N_EXPERTS = 64  # of the routers measured: 8 groups of 8


def differences() -> list[dict]:
    """One row per preset: its name, its ``Facts``, the router measured, and the source."""
    routers = {name: preset(name, d_model=N_EXPERTS, n_experts=N_EXPERTS) for name in PRESETS}
    return [
        {
            "name": name,
            "facts": measure_router(router),
            "router": router,
            "source": PRESETS[name].source,
        }
        for name, router in routers.items()
    ]


def markdown() -> str:
    """``differences()`` as a markdown table."""
    rows = []
    for row in differences():
        facts, router = row["facts"], row["router"]
        same = facts.most - facts.least < 1e-4 * facts.most
        total = f"{facts.most:.4g}" if same else f"{facts.least:.2f} to {facts.most:.2f}"
        rows.append(
            {
                "router": row["name"],
                "K": facts.top_k,
                "score": facts.score_func,
                "scored": "after top-k" if router.score_after_topk else "before top-k",
                "divided by the sum": "yes" if router.norm_topk_prob else "no",
                "scale": f"{facts.scale:.4g}",
                "K weights sum to": total,
                "an unchosen logit matters": "yes" if facts.sees_unchosen else "no",
                "bias in": {"selection": "selection only"}.get(facts.bias, facts.bias),
                "groups": facts.groups,
                "weight multiplies": router.weights_on,
                "source": row["source"],
            }
        )
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
