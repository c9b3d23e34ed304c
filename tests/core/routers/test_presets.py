"""Presets: published routers by name, and the table of how they differ."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moe_core
from moe_core import TopKRouter
from moe_core.routers.presets import PRESETS, preset
from moe_tools.router_differences import differences, markdown, measure_router

from ..helpers import randn

SMALL = {"d_model": 16, "n_experts": 32}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_plain_topk_router_that_routes(name):
    router = preset(name, **SMALL)
    assert type(router) is TopKRouter
    routing = router(randn(2, 5, 16)).check()
    assert routing.top_k == PRESETS[name].sizes["top_k"] and PRESETS[name].source


def test_a_preset_has_the_sizes_of_its_model_unless_told_otherwise():
    with torch.device("meta"):
        router = preset("deepseek_v3")
        assert (
            router.d_model,
            router.n_experts,
            router.top_k,
            router.n_groups,
            router.topk_groups,
        ) == (7168, 256, 8, 8, 4)
        assert preset("mixtral", top_k=1).top_k == 1


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="preset='mistral' must be one of 'gshard', 'switch', 'mixtral'"
    ):
        preset("mistral")


def test_a_size_that_the_family_leaves_open_is_asked_for():
    with pytest.raises(ValueError, match="preset 'gshard' needs d_model and n_experts"):
        preset("gshard")


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="norm_topk"):
        preset("mixtral", norm_topk=True)


def test_the_table_has_a_row_for_every_preset_and_tells_all_but_twins_apart():
    rows = {row["name"]: row["facts"] for row in differences()}
    assert list(rows) == list(PRESETS)
    told_apart = {
        tuple(
            vars(replace(facts, top_k=0, least=0.0, most=0.0, scale=round(facts.scale, 3))).items()
        )
        for facts in rows.values()
    }
    # softmax whose weights sum to 1: gshard, mixtral, qwen3_moe, granite; or not: switch, olmoe, qwen2_moe; and five of their own
    assert len(told_apart) == 2 + 5


def test_the_measured_facts_are_those_of_the_papers():
    facts = {row["name"]: row["facts"] for row in differences()}
    assert (
        facts["deepseek_v3"].groups == "best 4 of 8 by top2_sum"
        and facts["deepseek_v3"].bias == "selection"
    )
    assert facts["deepseek_v2"].groups == "best 3 of 8 by max" and facts[
        "deepseek_v2"
    ].scale == pytest.approx(16)
    assert facts["gpt_oss"].bias == "logits" and facts["llama4"].score_func == "sigmoid"
    assert facts["deepseek_v4"].score_func == "sqrt_softplus" and facts[
        "deepseek_v4"
    ].most == pytest.approx(1.5)
    assert [name for name in facts if facts[name].sees_unchosen] == [
        "switch",
        "olmoe",
        "qwen2_moe",
        "deepseek_v2",
    ]


@pytest.mark.parametrize(
    "changes, fact, value",
    [
        ({"bias": True, "expert_bias": True}, "bias", "both"),
        ({"score_func": "sqrt_softplus"}, "score_func", "sqrt_softplus"),
        ({"n_groups": 4, "topk_groups": 2}, "groups", "best 2 of 4 by max"),
        ({"top_k": 3}, "top_k", 3),
        ({"routed_scaling_factor": 3.0, "norm_topk_prob": False}, "scale", pytest.approx(3.0)),
        ({"norm_topk_prob": False}, "sees_unchosen", True),
    ],
)
def test_a_changed_option_is_found_by_the_experiment(changes, fact, value):
    options = {"d_model": 64, "n_experts": 64, "top_k": 8}
    assert getattr(measure_router(TopKRouter(**options)), fact) != value
    assert getattr(measure_router(TopKRouter(**{**options, **changes})), fact) == value


def test_the_command_prints_the_table():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "moe_core.routers"],
        cwd=Path(moe_core.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == markdown() and done.stdout.count("\n") == 2 + len(PRESETS)
