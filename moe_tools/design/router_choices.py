"""The router: which one, with which losses, noise and capacity, and why."""

from moe_core.config import MoEConfig

from .plan import Plan
from .rules import Choice, choice


def router_design(plan: Plan) -> tuple[MoEConfig, list[Choice]]:
    """The MoE layer's config, and the choices in it."""
    shape, router = plan.shape, plan.budget.router_name
    values, choices = {"loss_free": _loss_free, "topk": _topk, "expert_threshold": _threshold}[
        router
    ](plan)
    if shape.top_k == 1 and router != "expert_threshold":
        values["norm_topk_prob"] = False
        choices.append(choice("weights", "not renormalised", "top_k is 1", "top-1 weights"))
    if router != "expert_threshold":
        choices.append(
            choice("capacity", "none (dropless)", "experts run as grouped products", "dropless")
        )
        choices.append(
            choice(
                "if you need static shapes",
                "1.25 in training, 2.0 in evaluation",
                "then watch the drop rate",
                "capacity",
            )
        )
        choices.append(choice("noise", "none", "it costs quality", "no jitter"))
    if shape.n_shared_experts:
        choices.append(
            choice(
                "shared experts",
                str(shape.n_shared_experts),
                "as wide as a routed one",
                "shared expert",
            )
        )
    config = MoEConfig(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        n_experts=shape.n_experts,
        top_k=shape.top_k,
        router=router,
        n_shared_experts=shape.n_shared_experts,
        **values,
    )
    return config, choices


def _loss_free(plan: Plan) -> tuple[dict, list[Choice]]:
    groups = (
        {"n_groups": plan.exchange.nodes, "topk_groups": plan.max_nodes} if plan.max_nodes else {}
    )
    choices = [
        choice(
            "router",
            "loss_free",
            "balance without a loss that pulls at the weights",
            "loss-free bias",
        ),
        choice(
            "scores", "sigmoid, normalised over the chosen", "goes with the bias", "sigmoid scores"
        ),
        choice(
            "balance",
            "bias +- 0.001 a step, sequence loss 0.0001",
            "the bias acts on batches, the loss on sequences",
            "sequence loss",
        ),
    ]
    if groups:
        choices.append(
            choice(
                "groups",
                f"{plan.max_nodes} of {plan.exchange.nodes} nodes",
                "without it the exchange passes 30 % of the step",
                "node limit",
            )
        )
    return {
        "router_options": {"bias_update_rate": 0.001, "sequence_loss_weight": 0.0001, **groups}
    }, choices


def _topk(plan: Plan) -> tuple[dict, list[Choice]]:
    choices = [
        Choice("router", "topk, softmax, weights renormalised", "asked for"),
        choice(
            "balance loss",
            "0.01",
            "raise it 2 to 5 times where the busiest expert has over 3 times its share",
            "balance loss",
        ),
        choice("z-loss", "0.001", "keeps the logits small", "z-loss"),
    ]
    return {"norm_topk_prob": True, "aux_loss_weight": 0.01, "z_loss_weight": 0.001}, choices


def _threshold(plan: Plan) -> tuple[dict, list[Choice]]:
    """The paper's memory is 1000 of 20 000 steps; a shorter run has a shorter one."""
    memory = max(1, min(1000, plan.budget.steps // 20))
    decay = round(1 - 1 / memory, 6)
    choices = [
        choice(
            "router",
            "expert_threshold",
            "a token's experts hang on that token alone" if plan.budget.streaming else "asked for",
            "threshold routing",
        ),
        Choice(
            "threshold",
            f"EMA decay {decay:g}, warm-up {4 * memory} steps",
            (
                f"a memory of {memory} steps, at most a twentieth of the run"
                if memory < 1000
                else "the paper's"
            ),
        ),
        Choice(
            "experts per token",
            f"{plan.shape.top_k} on average",
            "a token may take any number, none included",
        ),
        Choice("capacity", "band 0.5 in training, none after", "evaluation is the pure threshold"),
        Choice("losses and noise", "none", "thresholds balance by themselves"),
        Choice(
            "not for",
            "a stream that drifts faster than the memory, or batches under E/K tokens",
            "the threshold lags, or is too high",
        ),
    ]
    return {
        "router_options": {"ema_decay": decay, "warmup_steps": 4 * memory, "capacity_band": 0.5}
    }, choices
