"""Sparse upcycling: start a Mixture-of-Experts from a dense model that is trained already."""

import copy
from dataclasses import replace

import torch

from moe_core.config import MoEConfig
from moe_core.experts import Experts, FeedForward
from moe_core.layer import MixtureOfExperts
from moe_core.lm import LanguageModel
from moe_core.routers import TopKRouter
from moe_core.validate import at_least


def upcycle(
    dense: FeedForward | LanguageModel,
    config: MoEConfig,
    *,
    noise: float = 0.0,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
) -> MixtureOfExperts | LanguageModel:
    r"""Copy a dense feed-forward layer into every expert, under a router drawn at random.

    .. math:: y = \sum_k w_k \, f_{e_k}(x) = f(x) \sum_k w_k = f(x) \quad \text{where} \quad \sum_k
        w_k = 1

    So at step 0 the outputs are the dense model's, up to rounding, whatever the router chooses, as
    long as its weights are normalised and no slot is dropped: with a capacity (or a router that
    skips slots) a token keeps the share w_k of what stays. Where the weights sum to a
    routed_scaling_factor gamma, the experts' down_proj is divided by it. Shared experts, if there
    are any, start with an output of zero. Equal experts also mean that the router's gradient
    through the output is 0 at first (and stays so for K = 1 with renormalised weights): the experts
    part before it learns whom to choose.

    Fine-grained experts: when d_ff of the config is F/m, expert c * m + s gets slice s of the dense
    layer, with its down_proj times m, and the m experts of a copy c have the same row in the
    router. They tie, so a token takes whole copies, and the outputs are equal again: the slices of
    one copy share its weight, sum_s m * (w_c / m) f_s(x) = w_c f(x). E and K must be multiples of
    m.

    Args:
        dense: a ``FeedForward``, or a dense ``LanguageModel``, in which every feed-forward layer is
            replaced.
        config: of the MoE layer or layers; d_model, activation, glu, ... as in the dense layer.
        noise: breaks the symmetry of the copies: each expert's weights get normal noise with this
            many times the standard deviation of its own. Outputs are then only about equal. Without
            it experts part because their tokens differ.
        router_std: of the router's weight, where the router does not prescribe its own start.
        generator: draws router and noise; torch's own if None.

    Returns:
        A ``MixtureOfExperts``, or a ``LanguageModel`` whose other weights are copies; dtype, device
        and mode of the dense one.

    Raises:
        ValueError: the weights of the router are not normalised, or it sends tokens to experts that
            compute nothing; a size or an option of the config is not the dense layer's; the model
            is not dense; or a number is negative.

    Source: Komatsuzaki et al. 2022 (arXiv 2212.05055); the slices as in He et al. 2024 (arXiv
    2410.07524), virtual group initialization.
    """
    at_least(0, noise=noise, router_std=router_std)
    if isinstance(dense, LanguageModel):
        if dense.config.moe is not None:
            raise ValueError("dense is a LanguageModel with MoE layers already")
        model = copy.deepcopy(dense)
        model.config = replace(dense.config, d_ff=None, moe=config)
        for block in model.blocks:
            block.feed_forward = upcycle(
                block.feed_forward, config, noise=noise, router_std=router_std, generator=generator
            )
        return model
    weight = dense.gate_up_proj.weight
    seed = int(
        torch.randint(
            2**62, (), generator=generator, device="cpu" if generator is None else generator.device
        )
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        moe = MixtureOfExperts(config).to(weight.dtype).eval()
        m = _slices(dense, moe)
        _copy_into(moe.experts, dense, m, _sum_of_weights(moe))
        if noise > 0:
            for bank in moe.experts.parameters():
                std_E = bank.flatten(1).std(dim=1, correction=0)
                bank += noise * std_E.view(-1, *[1] * (bank.ndim - 1)) * torch.randn_like(bank)
        if moe.router.weight is not None and not moe.router.prescribes_start:
            copies = router_std * torch.randn_like(moe.router.weight[::m])
            moe.router.weight.copy_(copies.repeat_interleave(m, dim=0))
        if moe.shared_experts is not None:
            for parameter in moe.shared_experts.down_proj.parameters():
                parameter.zero_()
    return moe.to(weight.device).train(dense.training)


def _slices(dense: FeedForward, moe: MixtureOfExperts) -> int:
    """m, into how many experts the dense layer is cut; after a check that the two fit together."""
    config = moe.config
    d_ff, d_model = dense.down_proj.in_features, dense.down_proj.out_features
    if config.d_model != d_model:
        raise ValueError(f"d_model={config.d_model} must be {d_model}, the dense layer's")
    options = {
        "activation": dense.activation,
        "glu": dense.glu,
        "bias": dense.down_proj.bias is not None,
        "glu_limit": dense.act.limit,
        "up_offset": dense.act.up_offset,
    }
    for name, value in options.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} must be {value!r}, the dense layer's"
            )
    if d_ff % config.d_ff:
        raise ValueError(f"d_ff={config.d_ff} must be {d_ff}, the dense layer's, or divide it")
    m = d_ff // config.d_ff
    if m == 1:
        return m
    if config.router != "topk":
        raise ValueError(
            f"d_ff={config.d_ff} cuts the dense layer into {m} slices that must be chosen "
            f"together: only router='topk' does, not {config.router!r}"
        )
    group = config.n_experts // moe.router.n_groups
    for name, value in (
        ("top_k", config.top_k),
        ("n_experts", config.n_experts),
        ("experts per group", group),
    ):
        if value % m:
            raise ValueError(
                f"{name}={value} must be a multiple of {m}, the slices of d_ff={config.d_ff} in "
                f"{d_ff}"
            )
    return m


def _sum_of_weights(moe: MixtureOfExperts) -> float:
    """What the K weights of a token sum to; the router itself is asked."""
    x = torch.zeros(1, 1, moe.config.d_model, dtype=moe.experts.down_proj.dtype)
    router, routing = moe.router, moe(x, token_ids=torch.zeros(1, 1, dtype=torch.int64))[1]
    problem = None
    if moe.zero_computation_experts is not None:
        problem = "sends tokens to experts that compute nothing"
    elif routing.weights_on == "input" and moe.config.top_k > 1:
        problem = "weighs the input of the experts"
    elif routing.normalized:
        return 1.0
    elif (
        isinstance(router, TopKRouter)
        and router.routed_scaling_factor > 0
        and router.norm_eps <= 1e-6
        and (router.norm_topk_prob or router.score_after_topk and router.score_func == "softmax")
    ):
        return (
            router.routed_scaling_factor
        )  # no promise, as K sigmoids may all underflow; else it holds
    else:
        problem = "has weights that do not sum to the same for all tokens"
    raise ValueError(
        f"router={moe.config.router!r} with norm_topk_prob={moe.config.norm_topk_prob} {problem}: "
        "the outputs would not be the dense model's"
    )


def _copy_into(experts: Experts, dense: FeedForward, m: int, weights: float) -> None:
    copies, halves = experts.n_experts // m, 2 if dense.glu else 1
    # (2F, D) as [gate; up] -> m slices of (2F/m, D), each [gate; up] again
    gate_up = dense.gate_up_proj.weight.unflatten(0, (halves, m, -1)).transpose(0, 1).flatten(1, 2)
    experts.gate_up_proj.copy_(gate_up.repeat(copies, 1, 1))
    experts.down_proj.copy_(
        m
        / weights
        * dense.down_proj.weight.unflatten(1, (m, -1)).transpose(0, 1).repeat(copies, 1, 1)
    )
    if dense.gate_up_proj.bias is not None:
        gate_up_bias = (
            dense.gate_up_proj.bias.unflatten(0, (halves, m, -1)).transpose(0, 1).flatten(1)
        )
        experts.gate_up_bias.copy_(gate_up_bias.repeat(copies, 1))
        experts.down_bias.copy_(
            (dense.down_proj.bias / weights).expand_as(experts.down_bias)
        )  # whole, in every slice
