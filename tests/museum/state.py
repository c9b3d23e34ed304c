"""State: what a router learns outside the gradient, and what recomputation must not change."""

import torch

from moe_core import Experts, TopKRouter
from moe_core.routers.loss_free import LossFreeRouter

from .bug import Bug, certain, reads_logits, route


# 11 ------------------------------------------------------------------------------------------------------------------------------
class IdleExpertsAreSkipped(torch.nn.Module):
    def __init__(self, d_model, d_ff, n_experts):
        super().__init__()
        self.experts = torch.nn.ModuleList(
            torch.nn.Linear(d_model, d_model) for _ in range(n_experts)
        )

    def forward(self, x, routing):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = (routing.expert_indices == e).any(-1)
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return y


def every_expert_has_a_gradient(make):
    """After a backward pass every parameter has a gradient, zeros where no token came; or else ranks wait for each other."""
    experts, x = make(4, 8, 3), torch.randn(1, 5, 4)
    experts(x, route(certain([0, 0, 2, 0, 2], 3))).sum().backward()
    without = [name for name, parameter in experts.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient for {', '.join(without)}"


# 14 ------------------------------------------------------------------------------------------------------------------------------
class TiesByChance(TopKRouter):
    calls = 0  # plays the part of a GPU, whose topk promises no order among equal values

    def forward(self, x, padding_mask=None, token_ids=None):
        self.calls += 1
        logits = self.logits(x)
        scores = logits.softmax(-1)
        order = torch.arange(self.n_experts).roll(self.calls)
        weights, place = scores[..., order].topk(self.top_k)
        return self.routing(order[place], weights, logits, scores, padding_mask=padding_mask)


def recomputation_takes_the_same_route(make):
    """Activation checkpointing runs forward again in the backward pass: tied tokens must get the same experts."""
    router = make(8, 8, 2)
    x = torch.zeros(1, 4, 8)  # all logits equal
    first, again = router(x).expert_indices, router(x).expert_indices
    assert torch.equal(first, again), "the second forward takes another route"


# 15 ------------------------------------------------------------------------------------------------------------------------------
class CountsInForward(LossFreeRouter):
    counted = 0

    def forward(self, x, padding_mask=None, token_ids=None):
        routing = super().forward(x, padding_mask)
        self.counted = self.counted + routing.slots_per_expert()
        return routing

    @torch.no_grad()
    def update(self, routings):
        self.expert_bias += (
            self.bias_update_rate * (self.counted.sum() - self.n_experts * self.counted).sign()
        )
        self.expert_bias -= self.expert_bias.mean()
        self.counted = 0


def recomputation_counts_once(make):
    """Running a micro-batch's forward twice, as checkpointing does, leaves the bias update as it was."""
    router = reads_logits(make(2, 2, 1))
    first, second = (
        certain([0] * 3, 2),
        certain([1] * 5, 2),
    )  # expert 1 has more, so its bias must go down
    routings = [router(first), router(second)]
    router(first)
    router.update(routings)
    assert router.expert_bias[1] < 0, (
        f"the busier expert's bias went up, to {router.expert_bias[1].item():.4f}"
    )


# 16 ------------------------------------------------------------------------------------------------------------------------------
class CountsInBfloat16(LossFreeRouter):
    @torch.no_grad()
    def update(self, routings):
        counts = torch.zeros(self.n_experts, dtype=torch.bfloat16)
        for routing in routings:
            counts += routing.slots_per_expert()
        self.expert_bias += self.bias_update_rate * (counts.mean() - counts).sign().float()
        self.expert_bias -= self.expert_bias.mean()


def many_small_micro_batches_add_up(make):
    """600 micro-batches of one token are more than one of 400."""
    router = reads_logits(make(2, 2, 1))
    router.update([router(certain([0], 2))] * 600 + [router(certain([1] * 400, 2))])
    assert router.expert_bias[0] < 0, (
        f"the busier expert's bias went up, to {router.expert_bias[0].item():.4f}"
    )


# 18 ------------------------------------------------------------------------------------------------------------------------------
class BiasNotCentred(LossFreeRouter):
    @torch.no_grad()
    def update(self, routings):
        counts = sum(routing.slots_per_expert() for routing in routings)
        self.expert_bias += self.bias_update_rate * (counts.sum() - self.n_experts * counts).sign()


def the_mean_bias_stays_zero(make):
    """However uneven the load, the biases add up to 0."""
    router = reads_logits(make(4, 4, 1))
    routing = router(certain([0, 0, 0, 0, 1, 2, 3], 4))
    for _ in range(1000):
        router.update([routing])
    mean = router.expert_bias.mean().item()
    assert abs(mean) < 1e-4, f"after 1000 steps the mean bias is {mean:.2f}"


BUGS = [
    Bug(
        11,
        "an expert without a token is skipped",
        "training hangs, or the optimiser fails, when an expert gets no token",
        "its parameters have no gradient at all, so gradient reduction waits for them",
        "DeepSpeed #5066; PaddleFormers #3010; Megatron-LM #1877",
        IdleExpertsAreSkipped,
        Experts,
        every_expert_has_a_gradient,
        r"no gradient for experts\.1",
    ),
    Bug(
        14,
        "ties are broken anew on recomputation",
        "gradients of experts the forward pass never used, or a shape error",
        "the order among equal scores depends on more than the scores",
        "torchtitan #3146, #3336, #1117",
        TiesByChance,
        TopKRouter,
        recomputation_takes_the_same_route,
        "another route",
    ),
    Bug(
        15,
        "recomputation counts twice",
        "biases move for loads that never were",
        "forward adds to a counter, and checkpointing runs it again",
        "torchtitan #1593, #1114; Megatron-LM #1330",
        CountsInForward,
        LossFreeRouter,
        recomputation_counts_once,
        "bias went up",
    ),
    Bug(
        16,
        "counts in bfloat16",
        "the busiest expert is made still more attractive",
        "above 256, adding 1 changes nothing",
        "Megatron-LM #7081",
        CountsInBfloat16,
        LossFreeRouter,
        many_small_micro_batches_add_up,
        "bias went up",
    ),
    Bug(
        18,
        "the bias is not re-centred",
        "all biases drift in one direction, until scores drown in them",
        "more experts are below the mean than above it, so the signs do not cancel",
        "torchtitan #1506",
        BiasNotCentred,
        LossFreeRouter,
        the_mean_bias_stays_zero,
        "the mean bias is 0.5",
    ),
]
