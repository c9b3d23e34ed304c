"""Losses: what is averaged, what carries a gradient, and what padding does."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from moe_core import TopKRouter, losses
from moe_core.lm import next_token_loss

from .bug import Bug, certain, route


# 1 -------------------------------------------------------------------------------------------------------------------------------
def pooled_over_layers(routings):
    fields = "expert_indices", "expert_weights", "capacity_mask", "logits", "scores", "drop_reason"
    pooled = {name: torch.cat([getattr(routing, name) for routing in routings]) for name in fields}
    return losses.load_balance(replace(routings[0], **pooled))


def layer_by_layer(routings):
    return torch.stack([losses.load_balance(routing) for routing in routings]).mean()


def collapse_in_one_layer_is_not_made_good_by_another(loss):
    """Two layers that collapse onto different experts are as bad as one that collapses: the loss is E, not 1."""
    left, right = route(certain([0, 0, 0, 0], 2)), route(certain([1, 1, 1, 1], 2))
    value = loss([left, right]).item()
    assert abs(value - 2) < 1e-4, f"two collapsed layers have a balance loss of {value:.4f}, not 2"


# 2 -------------------------------------------------------------------------------------------------------------------------------
def softmax_twice(routing):
    return losses.load_balance(replace(routing, scores=torch.softmax(routing.scores, dim=-1)))


def a_collapsed_router_has_loss_e(loss):
    """When every token goes to one expert with certainty, the balance loss is E."""
    value = loss(route(certain([3] * 6, 8))).item()
    assert abs(value - 8) < 1e-4, f"a collapsed router has a balance loss of {value:.4f}, not 8"


# 3 -------------------------------------------------------------------------------------------------------------------------------
def loss_as_a_number(lm_loss, routings):
    return lm_loss + sum(routing.aux_loss.item() for routing in routings)


def loss_behind_a_flag(lm_loss, routings, output_router_logits=False):
    if output_router_logits:
        lm_loss = lm_loss + sum(routing.aux_loss for routing in routings)
    return lm_loss


def loss_as_a_tensor(lm_loss, routings):
    return lm_loss + sum(routing.aux_loss for routing in routings)


def the_balance_loss_trains_the_router(total):
    """With a coefficient above 0 the gradient of the total loss reaches the router's weight."""
    router = TopKRouter(4, 4, 1, aux_loss_weight=0.01)
    lm_loss = torch.zeros(
        (), requires_grad=True
    )  # stands for a loss that does not depend on this router
    total(lm_loss, [router(torch.randn(1, 6, 4))]).backward()
    reached = router.weight.grad is not None and router.weight.grad.abs().max() > 0
    assert reached, "the balance loss does not reach the router"


# 17 ------------------------------------------------------------------------------------------------------------------------------
def padding_counts_too(routing):
    E = routing.n_experts
    share_E = F.one_hot(routing.expert_indices, E).float().mean((0, 1, 2))
    return E * (share_E * routing.scores.mean((0, 1))).sum()


def padding_changes_nothing(loss):
    """A batch has the same loss with and without padding behind it."""
    logits, padding = torch.randn(1, 6, 4), torch.randn(1, 10, 4)
    mask = torch.arange(16).view(1, 16) < 6
    bare, padded = (
        loss(route(logits)).item(),
        loss(route(torch.cat([logits, padding], 1), padding_mask=mask)).item(),
    )
    assert abs(bare - padded) < 1e-5, f"padding changes the loss from {bare:.4f} to {padded:.4f}"


# 25 ------------------------------------------------------------------------------------------------------------------------------
def z_loss_of_zeroed_padding(routing):
    logits = routing.logits * routing.real_tokens.unsqueeze(-1)
    return torch.logsumexp(logits, dim=-1).square().sum() / routing.real_tokens.sum()


# 26 ------------------------------------------------------------------------------------------------------------------------------
def balance_of_the_top_k_only(routing):
    unchosen = torch.ones_like(routing.scores, dtype=torch.bool).scatter(
        -1, routing.expert_indices, False
    )
    return losses.load_balance(
        replace(
            routing, scores=torch.softmax(routing.logits.masked_fill(unchosen, -torch.inf), dim=-1)
        )
    )


def an_expert_nobody_chose_is_pulled_up(loss):
    """The balance loss has a gradient for the logits of an expert that no token chose, and it raises them."""
    logits = (
        torch.randn(1, 8, 4) + torch.tensor([0.0, 0.0, 0.0, -9.0])
    ).requires_grad_()  # nobody takes expert 3
    loss(route(logits, top_k=2)).backward()
    assert (logits.grad[..., 3] < 0).all(), (
        f"the idle expert's logits have a gradient of {logits.grad[..., 3].abs().max():.1e}"
    )


# 28 ------------------------------------------------------------------------------------------------------------------------------
def loss_without_the_shift(logits_BNV, tokens_BN):
    return F.cross_entropy(logits_BNV.flatten(0, 1), tokens_BN.flatten())


def copying_the_input_predicts_nothing(loss):
    """A model that only repeats the token it sees has a high loss; one that names the next token has none."""
    tokens = torch.arange(20).view(2, 10) % 7
    copies, predicts = 50.0 * F.one_hot(tokens, 7), 50.0 * F.one_hot((tokens + 1) % 7, 7)
    assert loss(copies, tokens) > 1, (
        f"a model that repeats its input has a loss of {loss(copies, tokens).item():.4f}"
    )
    assert loss(predicts, tokens) < 1e-4


BUGS = [
    Bug(
        1,
        "the balance loss is pooled over layers",
        "the loss stays at 1 while layers collapse",
        "the tokens of all layers are concatenated before shares and probabilities are averaged",
        "transformers #28255, #31464",
        pooled_over_layers,
        layer_by_layer,
        collapse_in_one_layer_is_not_made_good_by_another,
        r"have a balance loss of 1\.0000",
    ),
    Bug(
        2,
        "softmax twice",
        "a loss near 1 whatever the router does, with hardly any gradient",
        "the loss expects logits and is given probabilities",
        "transformers #45120, #39055",
        softmax_twice,
        losses.load_balance,
        a_collapsed_router_has_loss_e,
        r"has a balance loss of 2\.2",
    ),
    Bug(
        3,
        "the balance loss is logged, not learned",
        "a balance loss in the log that never falls",
        "the loss is turned into a number before it is added",
        "transformers #48886; trl #7222; NeMo Automodel #1408",
        loss_as_a_number,
        loss_as_a_tensor,
        the_balance_loss_trains_the_router,
        "does not reach the router",
    ),
    Bug(
        3,
        "the balance loss waits for a flag",
        "a coefficient of 0.01 in the config, and collapse all the same",
        "the loss is added only if another option is on, which is off by default",
        "transformers #44242, #28093",
        loss_behind_a_flag,
        loss_as_a_tensor,
        the_balance_loss_trains_the_router,
        "does not reach the router",
    ),
    Bug(
        17,
        "padding counts in the balance loss",
        "the loss depends on how long the longest sequence of the batch is",
        "means are taken over all positions",
        "transformers #28505; Megatron-LM #1984; torchtitan #4594",
        padding_counts_too,
        losses.load_balance,
        padding_changes_nothing,
        "padding changes the loss",
    ),
    Bug(
        25,
        "z-loss of padding",
        "each padding token adds (ln E)^2",
        "the logits of padding are set to 0, and logsumexp of zeros is ln E",
        "flaxformer, router z-loss",
        z_loss_of_zeroed_padding,
        losses.z_loss,
        padding_changes_nothing,
        "padding changes the loss",
    ),
    Bug(
        26,
        "balance over the top K only",
        "an expert that has lost every token never comes back",
        "the loss takes the softmax of the chosen logits, so the others have no gradient",
        "nanoMoE",
        balance_of_the_top_k_only,
        losses.load_balance,
        an_expert_nobody_chose_is_pulled_up,
        "gradient of 0.0e",
    ),
    Bug(
        28,
        "a language model's loss without the shift",
        "the loss falls to almost 0 within minutes; the text is nonsense",
        "logits are compared with the tokens they were computed from",
        "a published write-up of expert-threshold routing",
        loss_without_the_shift,
        next_token_loss,
        copying_the_input_predicts_nothing,
        "repeats its input has a loss of 0.0000",
    ),
]
