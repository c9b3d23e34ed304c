"""Expert-side routing: who is admitted, what learns, and what sees the future."""

import torch
import torch.nn.functional as F

from moe_core import Experts, Router
from moe_core.routers.expert_threshold import ExpertThresholdRouter
from moe_tools.probe import probe

from .bug import Bug


# 28 ------------------------------------------------------------------------------------------------------------------------------
class AsWrittenUp(ExpertThresholdRouter):
    def forward(self, x, padding_mask=None, token_ids=None):
        scores = F.cosine_similarity(x.unsqueeze(-2), self.weight, dim=-1)
        threshold_E = scores.mean((0, 1)) - scores.std((0, 1))  # "approximately the median"
        chosen = scores > threshold_E
        return self.routing(
            self.every_expert(x),
            chosen.float(),
            scores,
            scores,
            padding_mask=padding_mask,
            selected_BNK=chosen,
        )


def calibrated(make, x):
    router = make(x.shape[-1], 16)
    if hasattr(router, "calibrate"):
        router.calibrate([x])
    return router.eval()


def each_expert_admits_its_share(make):
    """An expert admits about one token in E."""
    x = torch.randn(4, 500, 32)
    admitted = calibrated(make, x)(x).capacity_mask.double().mean().item()
    assert abs(admitted - 1 / 16) < 0.01, (
        f"{admitted:.0%} of the tokens are admitted, not {1 / 16:.0%}"
    )


def the_gate_trains_the_router(make):
    """A loss on the layer's output has a gradient for the router."""
    x, experts = torch.randn(1, 50, 8), Experts(8, 16, 16)
    router = calibrated(make, x)
    experts(x, router(x)).square().sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().max() > 0, (
        "the router has no gradient"
    )


# 29 ------------------------------------------------------------------------------------------------------------------------------
class ExpertsChoose(Router):
    def forward(self, x, padding_mask=None, token_ids=None):
        logits = self.logits(x)
        scores = logits.softmax(-1)
        best = (
            scores.flatten(0, 1).topk(x.shape[0] * x.shape[1] // self.n_experts, dim=0).indices
        )  # each expert, over all tokens
        chosen = (
            torch.zeros_like(scores.flatten(0, 1), dtype=torch.bool)
            .scatter(0, best, True)
            .view(scores.shape)
        )
        return self.routing(
            self.every_expert(x),
            scores,
            logits,
            scores,
            padding_mask=padding_mask,
            selected_BNK=chosen,
        )


def the_future_does_not_matter(make):
    """No token's experts depend on tokens that come after it."""
    x = torch.randn(2, 32, 8)
    found = probe(calibrated(make, x), x)
    assert found.causal, (
        f"{found.later_tokens.rerouted:.1%} of the tokens get other experts when later tokens change"
    )


BUGS = [
    Bug(
        28,
        "a threshold at the mean minus one deviation",
        "84 % of the tokens go to every expert; the layer is dense again",
        "the 16th percentile of a normal distribution, called its median",
        "a published write-up of expert-threshold routing",
        AsWrittenUp,
        ExpertThresholdRouter,
        each_expert_admits_its_share,
        "8[345]% of the tokens are admitted",
    ),
    Bug(
        28,
        "a gate of zeros and ones",
        "the router keeps its initial weights for ever",
        "the mask itself is the weight, and a comparison has no gradient",
        "a published write-up of expert-threshold routing",
        AsWrittenUp,
        ExpertThresholdRouter,
        the_gate_trains_the_router,
        "the router has no gradient",
    ),
    Bug(
        29,
        "expert choice in a causal language model",
        "an excellent training loss, and nonsense when it generates",
        "whether an expert takes a token depends on the later tokens it competes with",
        "Zhou et al. 2022 (arXiv 2202.09368), limitations; flaxformer's docstring; Wang et al. 2024 (arXiv 2408.15664)",
        ExpertsChoose,
        ExpertThresholdRouter,
        the_future_does_not_matter,
        "when later tokens change",
    ),
]
