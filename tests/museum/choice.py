"""Choice: which experts win, with which weight, and what noise may do."""

import torch
import torch.nn.functional as F

from moe_core import Experts, TopKRouter
from moe_core.metrics import expert_sets
from moe_core.routers.loss_free import LossFreeRouter
from moe_core.routers.noisy_topk import NoisyTopKRouter, probabilities
from moe_core.routers.switch import SwitchRouter

from .bug import Bug, reads_logits, route


# 4 -------------------------------------------------------------------------------------------------------------------------------
class BiasInTheWeights(LossFreeRouter):
    def forward(self, x, padding_mask=None, token_ids=None):
        logits = self.logits(x)
        scores = logits.sigmoid()
        biased, indices = torch.topk(scores + self.expert_bias, self.top_k)
        weights = biased / biased.sum(-1, keepdim=True)
        return self.routing(
            indices, weights, logits, scores, padding_mask=padding_mask, normalized=True
        )


def the_bias_selects_and_does_not_weigh(make):
    """The weights are the unbiased scores of the chosen experts, divided by their sum; the bias changes who is chosen."""
    router = reads_logits(make(8, 8, 2))
    x = torch.randn(1, 50, 8)
    before = router(x)
    with torch.no_grad():
        router.expert_bias.copy_(torch.randn(8))
    after = router(x)
    chosen = x.sigmoid().gather(-1, after.expert_indices)
    off = (after.expert_weights - chosen / chosen.sum(-1, keepdim=True)).abs().max().item()
    assert not torch.equal(before.expert_indices, after.expert_indices), "the bias does not select"
    assert off < 1e-6, f"the bias moves the weights by up to {off:.2f}"


# 5 -------------------------------------------------------------------------------------------------------------------------------
class OtherGroupsSetToZero(LossFreeRouter):
    def forward(self, x, padding_mask=None, token_ids=None):
        logits = self.logits(x)
        scores = logits.sigmoid()
        biased = scores + self.expert_bias
        groups = biased.unflatten(-1, (self.n_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
        allowed = torch.zeros(*groups.shape[:-1], 1, dtype=torch.bool).scatter(
            -2, best.unsqueeze(-1), True
        )
        masked = groups.masked_fill(~allowed, 0.0).flatten(-2)
        indices = masked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.routing(
            indices, weights, logits, scores, padding_mask=padding_mask, normalized=True
        )


def no_expert_outside_the_chosen_groups(make):
    """A token's experts lie in topk_groups groups, also where biases make every score negative."""
    router = reads_logits(make(8, 8, 2, n_groups=4, topk_groups=1))
    with torch.no_grad():
        router.expert_bias.fill_(-5.0)
    routing = router(torch.randn(1, 50, 8))
    group = routing.expert_indices // 2
    astray = (group != group[..., :1]).any(-1).sum().item()
    right = routing.scores.unflatten(-1, (4, 2)).sum(-1).argmax(-1)
    astray += (group[..., 0] != right).logical_and((group == group[..., :1]).all(-1)).sum().item()
    assert astray == 0, f"{astray} of 50 tokens got an expert outside their groups"


# 6 -------------------------------------------------------------------------------------------------------------------------------
def top_1_renormalised(d_model, n_experts):
    return TopKRouter(d_model, n_experts, 1, norm_topk_prob=True)


def top_1_as_switch(d_model, n_experts):
    return SwitchRouter(
        d_model, n_experts, capacity_factor=None, aux_loss_weight=0.0, jitter_noise=0.0
    )


def the_output_trains_the_router(make):
    """A loss on the layer's output has a gradient for the router."""
    router, experts, x = make(8, 4), Experts(8, 16, 4), torch.randn(1, 20, 8)
    experts(x, router(x)).square().sum().backward()
    size = 0.0 if router.weight.grad is None else router.weight.grad.abs().max().item()
    assert size > 1e-5, f"the router's gradient is {size:.0e}"


# 19 ------------------------------------------------------------------------------------------------------------------------------
class LogitsInBfloat16(TopKRouter):
    def logits(self, x):
        return F.linear(x.bfloat16(), self.weight.bfloat16()).float()


def a_bfloat16_model_routes_as_a_float64_one(make):
    """Rounding of the logits changes no token's experts."""
    router, x = make(64, 64, 8).bfloat16(), torch.randn(1, 500, 64).bfloat16()
    exact = (
        torch.einsum("bnd,ed->bne", x.double(), router.weight.double())
        .topk(8)
        .indices.sort()
        .values
    )
    changed = (router(x).expert_indices.sort().values != exact).any(-1).double().mean().item()
    assert changed <= 0.002, f"{changed:.1%} of the tokens have other experts"


# 21 ------------------------------------------------------------------------------------------------------------------------------
class NoiseAlsoInEval(NoisyTopKRouter):
    def forward(self, x, padding_mask=None, token_ids=None):
        logits = self.logits(x)
        noisy = logits + torch.randn_like(logits) * self.noise_std(x)
        weights, indices = torch.softmax(noisy, dim=-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.routing(
            indices, weights, logits, logits.softmax(-1), padding_mask=padding_mask, normalized=True
        )


def eval_gives_the_same_answer_twice(make):
    """In eval the same tokens get the same experts on every call."""
    router, x = make(8, 4, 2).eval(), torch.randn(1, 50, 8)
    changed = (expert_sets(router(x)) != expert_sets(router(x))).any(-1).double().mean().item()
    assert changed == 0, f"{changed:.0%} of the tokens have other experts on the second call"


# 22 ------------------------------------------------------------------------------------------------------------------------------
class JitterAdded(TopKRouter):
    def logits(self, x):
        if self.training:
            x = x + torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        return F.linear(x, self.weight)


def jitter_is_relative(make):
    """Jitter multiplies: a token of zeros stays one, and a token 1000 times as large is moved 1000 times as far."""
    router = make(8, 4, 2, jitter_noise=0.01).train()
    size = router(torch.zeros(1, 50, 8)).logits.abs().max().item()
    assert size == 0, f"jitter makes logits of {size:.2f} out of zeros"
    moved = (
        (router(torch.full((1, 50, 8), 1000.0)).logits - 1000 * router.weight.sum(-1))
        .abs()
        .max()
        .item()
    )
    assert 1 < moved < 1000 * 0.01 * router.weight.abs().sum(-1).max(), (
        f"jitter moves logits of 1000 by {moved:.2g}"
    )


# 24 ------------------------------------------------------------------------------------------------------------------------------
def logits_against_probabilities(logits, noisy, std, indices):
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, True)
    K = indices.shape[-1]
    top = torch.softmax(noisy, dim=-1).topk(K + 1, dim=-1).values
    threshold = torch.where(chosen, top[..., K:], top[..., K - 1 : K])
    return torch.special.ndtr((logits - threshold) / std)


def with_little_noise_the_load_is_the_count(estimate):
    """As noise vanishes, the chance to be among the K becomes 1 for those who are and 0 for the others."""
    logits = torch.randn(1, 50, 8).double() * 3
    indices = logits.topk(2).indices
    chosen = torch.zeros_like(logits).scatter(-1, indices, 1.0)
    off = (
        (estimate(logits, logits, torch.full_like(logits, 1e-6), indices) - chosen)
        .abs()
        .mean()
        .item()
    )
    assert off < 0.01, f"the chances are off by {off:.2f} on average"


# 30 ------------------------------------------------------------------------------------------------------------------------------
def one_hot_twice(routing):
    chosen_BNE = expert_sets(
        routing
    ).long()  # one-hot already: zeros and ones, taken for the indices of experts
    return F.one_hot(chosen_BNE, routing.n_experts).any(-2)


def every_token_visits_its_own_experts(called):
    """The experts that are called for a token are the ones with the highest logits."""
    logits = torch.randn(1, 50, 8)
    expected = torch.zeros(1, 50, 8, dtype=torch.bool).scatter(-1, logits.topk(2).indices, True)
    found = called(route(logits, top_k=2)).bool()
    visited = found.any(1).nonzero()[:, 1].tolist()
    assert torch.equal(found, expected), f"of 8 experts only {visited} are ever called"


BUGS = [
    Bug(
        4,
        "the selection bias leaks into the weights",
        "slightly wrong outputs, worse the longer the bias has moved",
        "the values that topk returns, bias included, become the weights",
        "transformers #41647, #41663, #39581; vllm #12002; mlx-lm #1883",
        BiasInTheWeights,
        LossFreeRouter,
        the_bias_selects_and_does_not_weigh,
        "the bias moves the weights",
    ),
    Bug(
        5,
        "groups are masked with 0",
        "experts outside the chosen groups, once biases are negative",
        "0 is taken for less than any score, but score plus bias may be below it: mask with -inf",
        "transformers #45440; DeepSeek-V3 #741; flashinfer #2168",
        OtherGroupsSetToZero,
        LossFreeRouter,
        no_expert_outside_the_chosen_groups,
        "outside their groups",
    ),
    Bug(
        6,
        "one expert, renormalised",
        "the router never learns from the language model's loss",
        "p / p = 1: with K = 1 the weight is a constant",
        "minimind #858; Megatron-LM #894",
        top_1_renormalised,
        top_1_as_switch,
        the_output_trains_the_router,
        "gradient is [0-9]e-(0[6-9]|1|2)|gradient is 0e",
    ),
    Bug(
        19,
        "router logits in bfloat16",
        "other experts than in training, and another model than the one evaluated",
        "8 bits of mantissa cannot tell near logits apart",
        "sglang #33764; vllm #14027; torchtitan #2389",
        LogitsInBfloat16,
        TopKRouter,
        a_bfloat16_model_routes_as_a_float64_one,
        "of the tokens have other experts",
    ),
    Bug(
        21,
        "noise in eval",
        "the same prompt, another answer, at temperature 0",
        "the noise does not ask for self.training",
        "makeMoE; fairscale top-2 gate",
        NoiseAlsoInEval,
        NoisyTopKRouter,
        eval_gives_the_same_answer_twice,
        "on the second call",
    ),
    Bug(
        22,
        "jitter is added",
        "noise that drowns small inputs and does nothing to large ones",
        "x += noise around 1 instead of x *= noise around 1",
        "fastmoe SwitchGate; Keras Switch example",
        JitterAdded,
        TopKRouter,
        jitter_is_relative,
        "out of zeros",
    ),
    Bug(
        24,
        "logits are compared with probabilities",
        "a load loss that pushes experts the wrong way",
        "the thresholds come from softmaxed values, what is compared with them does not",
        "davidmrau/mixture-of-experts #31",
        logits_against_probabilities,
        probabilities,
        with_little_noise_the_load_is_the_count,
        "off by 0",
    ),
    Bug(
        30,
        "one-hot of a one-hot",
        "only experts 0 and 1 are ever called",
        "zeros and ones are taken for indices",
        "transformers nllb_moe, 5.23.0",
        one_hot_twice,
        expert_sets,
        every_token_visits_its_own_experts,
        r"only \[0, 1\]",
    ),
]
