"""Arguments out of range are refused where they are given, with their name, their value and what is allowed."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from moe_core import (
    CapacityRule,
    Experts,
    FeedForward,
    LMConfig,
    MixtureOfExperts,
    MoEConfig,
    TopKRouter,
)

from .helpers import config

MOE, LM, ROUTER, EXPERTS, DENSE = (
    (config, {}),
    (LMConfig, {"d_ff": 64}),
    (TopKRouter, {"d_model": 8, "n_experts": 4, "top_k": 2}),
    (Experts, {"d_model": 8, "d_ff": 16, "n_experts": 4}),
    (FeedForward, {"d_model": 8, "d_ff": 16}),
)
SHARED = (config, {"n_shared_experts": 2})
WHOLE, AT_LEAST_0, BELOW_1 = (
    "must be a whole number, at least 1",
    "must be at least 0 and finite",
    "must be at least 0.0 and below 1.0",
)
ACTIVATION = "must be one of 'silu', 'gelu', 'relu', 'relu2', 'quick_gelu'"

WRONG = [
    *[
        (made, name, value, WHOLE)
        for value in (0, -1, 2.0, True, "8", None)
        for made, name in [
            (MOE, "d_model"),
            (MOE, "d_ff"),
            (MOE, "n_experts"),
            (ROUTER, "d_model"),
            (ROUTER, "n_experts"),
            (EXPERTS, "d_model"),
            (EXPERTS, "d_ff"),
            (EXPERTS, "n_experts"),
            (DENSE, "d_model"),
            (LM, "vocab_size"),
            (LM, "n_layers"),
            (LM, "max_seq_len"),
            (LM, "d_model"),
            (LM, "n_heads"),
        ]
    ],
    *[(LM, "d_ff", value, WHOLE) for value in (0, 2.0, True)],
    *[
        (made, "top_k", value, "must be between 1 and n_experts=4")
        for value in (0, 5, -1, 1.0, True, None)
        for made in (MOE, ROUTER)
    ],
    *[
        (made, name, value, AT_LEAST_0)
        for value in (-0.1, math.nan, math.inf, "0", True)
        for made in (MOE, ROUTER)
        for name in ("capacity_factor", "aux_loss_weight", "z_loss_weight")
    ],
    *[
        (made, "jitter_noise", value, BELOW_1)
        for value in (-0.1, 1.0, math.nan, None)
        for made in (MOE, ROUTER)
    ],
    *[
        (made, "drop_path", value, BELOW_1)
        for value in (-0.1, 1.0, math.nan, None)
        for made in (MOE, EXPERTS)
    ],
    *[
        (made, "dropout", value, BELOW_1)
        for value in (-0.1, 1.0, None)
        for made in (MOE, EXPERTS, DENSE)
    ],
    *[
        (made, "glu_limit", value, AT_LEAST_0)
        for value in (-1.0, math.nan, "7")
        for made in (MOE, EXPERTS, DENSE)
    ],
    *[
        (made, "bias", value, "must be True or False")
        for value in (1, None)
        for made in (MOE, EXPERTS, DENSE)
    ],
    *[(SHARED, "shared_d_ff", value, WHOLE) for value in (0, 2.0, True)],
    (SHARED, "shared_gate", 1, "must be True or False"),
    (SHARED, "shared_combine", "max", "must be one of 'sum', 'mean'"),
    *[
        (made, "activation", value, ACTIVATION)
        for value in ("swish", "", None, ["silu"])
        for made in (MOE, EXPERTS, DENSE)
    ],
    *[
        (made, "backend", "triton", "must be one of 'auto', 'loop', 'padded', 'grouped', 'fused'")
        for made in (MOE, EXPERTS)
    ],
    *[
        (MOE, "n_shared_experts", value, "must be a whole number, at least 0")
        for value in (-1, 0.5, True)
    ],
    *[
        (made, name, value, "must be True or False")
        for value in ("no", 1, None)
        for made, name in [
            (MOE, "glu"),
            (EXPERTS, "glu"),
            (DENSE, "glu"),
            (LM, "glu"),
            (MOE, "norm_topk_prob"),
            (ROUTER, "norm_topk_prob"),
        ]
    ],
    (MOE, "router", "top-k", "must be one of 'topk'"),
    *[(EXPERTS, "ep_size", value, WHOLE) for value in (0, 1.5, True)],
]


@pytest.mark.parametrize(
    ("made", "name", "value", "allowed"),
    WRONG,
    ids=[f"{make.__name__}-{name}={value}" for (make, _), name, value, _ in WRONG],
)
def test_a_wrong_argument_is_named_with_its_value_and_its_range(made, name, value, allowed):
    make, good = made
    with pytest.raises(ValueError) as error:
        make(**{**good, name: value})
    assert str(error.value).startswith(f"{name}={value!r} {allowed}")


@pytest.mark.parametrize("made", [MOE, ROUTER, EXPERTS, DENSE, LM])
def test_a_misspelt_argument_is_refused(made):
    make, good = made
    with pytest.raises(TypeError, match="capacity_facter"):
        make(**good, capacity_facter=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 4},
        {"n_experts": 1, "top_k": 1},
        {"capacity_factor": 0},
        {"capacity_factor": None},
        {"d_model": 1, "d_ff": 1},
        {"jitter_noise": 0.999},
        {"n_shared_experts": 0},
        {"aux_loss_weight": 0, "z_loss_weight": 1},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_allowed(changes):
    assert MixtureOfExperts(config(**changes)).config == config(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of d_ff"),
        ({"d_ff": 8, "moe": config()}, "give exactly one of d_ff"),
        ({"moe": config()}, "moe.d_model=8 must equal d_model=128"),
        (
            {"d_ff": 8, "d_model": 20, "n_heads": 4},
            r"d_model=20 must be a multiple of 2 \* n_heads=8",
        ),
    ],
)
def test_a_language_model_that_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LMConfig(**arguments)


@pytest.mark.parametrize(
    "cfg",
    [
        config(),
        config(
            capacity_factor=1.25,
            norm_topk_prob=False,
            aux_loss_weight=0.01,
            n_shared_experts=2,
            activation="relu2",
            glu=False,
        ),
        LMConfig(d_ff=64),
        LMConfig(d_model=8, n_heads=2, moe=config(top_k=1)),
    ],
    ids=["defaults", "everything", "dense", "moe"],
)
def test_a_config_survives_json(cfg):
    assert type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_a_config_dict_holds_every_field():
    assert set(config().to_dict()) == {field.name for field in fields(MoEConfig)}


@pytest.mark.parametrize("cls", [MoEConfig, LMConfig])
def test_unknown_keys_are_refused_by_name(cls):
    with pytest.raises(ValueError, match=f"unknown keys in {cls.__name__}: depth, width"):
        cls.from_dict({"d_model": 8, "width": 3, "depth": 0.1})


def test_the_keys_inside_moe_are_checked_too():
    with pytest.raises(ValueError, match="unknown keys in MoEConfig: experts"):
        LMConfig.from_dict({"moe": {"experts": 8}})


def test_a_config_cannot_be_changed_and_can_be_a_key():
    with pytest.raises(FrozenInstanceError):
        config().top_k = 1
    assert {config(): 1}[config()] == 1


# The router and its options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"router_options": {"vocab_sise": 3}},
            r"router_options\['vocab_sise'\]: router='topk' has no such option; it has score_func, ",
        ),
        (
            {"router": "base", "top_k": 1, "router_options": {"a": 3}},
            r"router_options\['a'\]: router='base' has no such option; it has none",
        ),
        (
            {"router_options": {"top_k": 2}},
            r"router_options\['top_k'\]: give it as the field top_k of MoEConfig",
        ),
        (
            {"router_options": {"jitter_noise": 0.1}},
            r"router_options\['jitter_noise'\]: give it as the field jitter_noise of MoEConfig",
        ),
        (
            {"router": "relu", "router_options": {"expansion": 1.5}},
            r"router_options\['expansion'\]: give it as the field top_k of MoEConfig",
        ),
        ({"router": "hash"}, r"router='hash' needs router_options\['vocab_size'\]"),
        (
            {"router": "relu", "router_options": {"l1_weight": -1}},
            "l1_weight=-1 must be at least 0",
        ),
        ({"router": "switch"}, "top_k=2 must be 1: router='switch' has no other"),
        ({"router": "base", "top_k": 3}, "top_k=3 must be 1: router='base' has no other"),
        ({"router": "gshard", "top_k": 1}, "top_k=1 must be 2: router='gshard' has no other"),
        ({"top_k": 1.5}, "top_k=1.5 must be between 1 and n_experts=4"),
        ({"router": "relu", "top_k": 4.5}, "expansion=4.5 must be above 0 and at most n_experts=4"),
        ({"router": "relu", "top_k": "2"}, "expansion='2' must be above 0 and at most n_experts=4"),
        ({"router_options": [("score_func", "sigmoid")]}, "must be a dict"),
        (
            {"router_options": {"score_func": {1, 2}}},
            "must be a dict of names to plain JSON values",
        ),
        (
            {"router_options": {"score_func": ("sigmoid",)}},
            "must be a dict of names to plain JSON values",
        ),
        (
            {"router_options": {"norm_eps": math.nan}},
            "must be a dict of names to plain JSON values",
        ),
    ],
)
def test_what_the_router_cannot_use_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("router", "field", "value"),
    [
        ("relu", "capacity_factor", 1.0),
        ("relu", "aux_loss_weight", 0.1),
        ("relu", "norm_topk_prob", True),
        ("relu", "norm_topk_prob", False),
        ("gshard", "jitter_noise", 0.1),
        ("expert_choice", "capacity_factor", 1.0),
        ("hash", "z_loss_weight", 0.1),
        ("zero_computation", "capacity_factor", 2.0),
        ("loss_free", "aux_loss_weight", 0.01),
    ],
)
def test_a_field_that_the_router_has_no_use_for_is_refused_and_never_ignored(router, field, value):
    options = {"vocab_size": 8} if router == "hash" else {}
    with pytest.raises(
        ValueError, match=f"{field}={value} must be .*: router='{router}' has no such option"
    ):
        config(router=router, router_options=options, **{field: value})


def test_a_field_left_alone_is_what_the_routers_class_says():
    switch = config(router="switch", top_k=1)
    assert (switch.capacity_factor, switch.aux_loss_weight) == (
        CapacityRule(factor=1.25, eval_factor=2.0),
        0.01,
    )
    assert switch.norm_topk_prob is None and config().norm_topk_prob is True
    assert (
        config(router="switch", top_k=1, capacity_factor=None).capacity_factor is None
    )  # asked for: dropless
    assert (
        MixtureOfExperts(
            config(router="switch", top_k=1, aux_loss_weight=0.0)
        ).router.aux_loss_weight
        == 0
    )


def test_options_reach_the_router():
    moe = MixtureOfExperts(
        config(router="relu", top_k=1.5, router_options={"l1_weight": 0.5, "l1_multiplier": 2.0})
    )
    assert (moe.router.expansion, moe.router.l1_weight, moe.router.l1_multiplier) == (1.5, 0.5, 2.0)
    assert (
        MixtureOfExperts(config(router_options={"score_func": "sigmoid"})).router.score_func
        == "sigmoid"
    )


@pytest.mark.parametrize(
    "cfg",
    [
        config(router="relu", top_k=0.5, router_options={"l1_weight": 1e-3}),
        config(router="switch", top_k=1),
        config(router="hash", router_options={"vocab_size": 8, "frequencies": [1.0] * 8}),
        config(capacity_factor=CapacityRule(factor=1.0, overflow="shared"), n_shared_experts=1),
        LMConfig(d_model=8, n_heads=2, moe=config(router_options={"score_func": "sigmoid"})),
    ],
    ids=["relu", "switch", "hash", "rule", "lm"],
)
def test_a_config_with_options_survives_json(cfg):
    again = type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg and hash(again) == hash(cfg)
    MixtureOfExperts(again.moe if isinstance(again, LMConfig) else again)


def test_configs_with_other_options_are_not_equal_and_the_options_are_a_copy():
    options = {"score_func": "sigmoid"}
    cfg = config(router_options=options)
    options["score_func"] = "softmax"
    cfg.to_dict()["router_options"]["score_func"] = "softmax"
    assert cfg.router_options == {"score_func": "sigmoid"} and cfg != config(router_options=options)


def test_making_a_config_draws_no_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for router, top_k in [("topk", 2), ("base", 1), ("noisy_topk", 2), ("zero_computation", 2)]:
        config(router=router, top_k=top_k)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_overflow_needs_a_shared_expert_to_go_to():
    with pytest.raises(ValueError, match="n_shared_experts=0 must be at least 1"):
        config(capacity_factor=CapacityRule(factor=1.0, overflow="shared"))
