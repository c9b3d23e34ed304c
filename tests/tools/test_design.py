"""The design assistant: what it writes is what counting gives, and what cannot be built is refused with numbers that can."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from math import log10
from statistics import median, quantiles

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_core
from moe_core import MoEConfig
from moe_tools.accounting import (
    ACCELERATORS,
    AttentionSpec,
    activation_bytes_per_token,
    attainable_flops,
    forward_flops,
    state_memory,
    tokens_to_reach,
    training_flops,
)
from moe_tools.accounting.network import Network
from moe_tools.accounting.published import MODELS
from moe_tools.design import RULES, Design, DesignBudget, Impossible, Rule, design
from moe_tools.design.budget import number
from moe_tools.design.exchange_cost import ExchangeCost, cuts, node_limit
from moe_tools.design.gpu_memory import ep_sizes, gpu_memory
from moe_tools.design.model_shape import ASPECT, SPARSITY, WIDTH
from moe_tools.design.scaling_laws import (
    dense_params_of_equal_loss,
    fine_grained,
    fine_grained_dense,
    routed,
)

BASE = DesignBudget(active=1.5e9, tokens=200e9, gpus=64)


@pytest.fixture(scope="module")
def base() -> Design:
    return design(BASE)


# -- the numbers it writes ------------------------------------------------------------------------------------------------------------


def test_the_counts_are_those_of_a_spec_written_by_hand(base):
    s = base.shape
    assert (
        s.d_model,
        s.n_layers,
        s.n_heads,
        s.n_kv_heads,
        s.d_ff,
        s.n_experts,
        s.top_k,
        s.n_shared_experts,
        s.tied,
    ) == (2048, 24, 16, 4, 768, 128, 8, 1, False)
    D, L, F, V = 2048, 24, 768, 50304
    layer = (
        (2 * D * 16 * 128 + 2 * D * 4 * 128 + 2 * 128) + D * 128 + 2 * D
    )  # attention with its norms, router, norms
    assert base.spec.total_params == 2 * V * D + D + L * (layer + 129 * 3 * D * F)
    assert base.spec.active_params == 2 * V * D + D + L * (layer + 9 * 3 * D * F)
    report = base.markdown()
    assert (
        f"Total {base.spec.total_params:,} parameters" in report
        and f"Active {base.spec.active_params:,} with" in report
    )
    assert f"{base.spec.active_params_nonemb:,} without" in report


def test_the_layer_config_is_the_layer_of_the_spec(base):
    from moe_tools.accounting.from_lm_config import moe_spec

    for router in ("loss_free", "topk", "expert_threshold"):
        made = design(replace(BASE, router=router))
        assert {moe_spec(made.moe)} == set(made.spec.moe_layers)
        line = re.search(r"^    (MoEConfig\(.*\))$", made.markdown(), re.MULTILINE)[1]
        assert eval(line, {"MoEConfig": MoEConfig}) == made.moe  # what the report prints builds it


def test_flops_and_dense_equivalents_are_those_of_accounting(base):
    assert base.training_flops == training_flops(base.spec, 4096).total * 200e9
    for name, params in (
        ("equal active", base.spec.active_params),
        ("equal total", base.spec.total_params),
    ):
        dense = base.dense[name]
        assert (
            abs(dense.total_params - params) <= 3 * 2048 * 24 / 2
        )  # half of one unit of width in every layer
        assert not dense.moe_layers
    assert (
        f"| forward FLOPs a token | {forward_flops(base.spec, 4096).total:.4g} |" in base.markdown()
    )


def test_memory_adds_up_and_is_that_of_accounting(base):
    plan = base.plan
    state = state_memory(base.spec, "mixed", n_ranks=64, ep=plan.ep, sharded=plan.sharded)
    per_token = sum(activation_bytes_per_token(base.spec, recompute=plan.recompute).values())
    memory = plan.memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        state.weights,
        state.gradients,
        state.optimizer,
    )
    assert memory.activations == per_token * plan.micro_batch * 4096 and memory.gathered == 0
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations
    assert memory.total <= BASE.usable_memory == 0.9 * 80e9


def test_where_weights_are_sharded_two_layers_are_gathered(base):
    memory = gpu_memory(base.spec, gpus=64, ep=8, sharded="weights", recompute="layer", tokens=0)
    one_layer = 2048 * 128 * 3 * 768 / 8 * 2048 / 2048  # experts of a rank
    rest = (
        base.spec.parts["attention"]
        + base.spec.parts["router"]
        + base.spec.parts["shared"]
        + base.spec.parts["norms"]
    )
    assert memory.gathered == pytest.approx(2 * 2 * (one_layer + rest / 24), rel=1e-12)
    assert memory.weights == pytest.approx(2 * base.spec.total_params / 64, rel=1e-12)


def test_the_share_of_the_step_computed_by_hand(base):
    """EP 2 inside a node of H100: half of all rows leave, 8 a token, 2048 numbers of 2 bytes, at 450 GB/s."""
    plan = base.plan
    assert (plan.ep, plan.dp, plan.micro_batch, plan.micro_batches, plan.recompute) == (
        2,
        32,
        2,
        8,
        "nothing",
    )
    sent = 2 * 4096 * 8 * 2048 * 2 / 2
    exchange = (
        8 * 24 * 4 * sent / 450e9
    )  # micro-batches, layers, dispatch and combine forward and backward
    tokens = 64 * 16 * 4096
    assert BASE.tokens_per_step == tokens and BASE.steps == -(-200_000_000_000 // tokens)
    compute = (
        training_flops(base.spec, 4096).total * tokens / 64 / (989e12 * 0.4)
    )  # experts are past the ridge: nothing is slower
    assert plan.exchange.volume.dispatch == sent
    assert plan.exchange_seconds == pytest.approx(exchange, rel=1e-12)
    assert plan.compute_seconds == pytest.approx(compute, rel=1e-12)
    assert plan.replica_seconds < compute  # hidden
    assert plan.exchange_share == pytest.approx(exchange / (exchange + compute), rel=1e-12)
    assert plan.training_seconds == pytest.approx((exchange + compute) * 200e9 / tokens, rel=1e-12)
    assert f"| {plan.exchange_share:.1%} |" in base.markdown()


def test_the_traffic_of_replicas_computed_by_hand(base):
    """EP 2: in each of 8 nodes 4 ranks hold the same half of the experts, and 8 the same rest."""
    experts, total = base.spec.parts["experts"], base.spec.total_params
    halves = experts / 2 * 2 * (3 / 4 / 450e9 + 7 / 8 / 4 / 50e9)
    rest = (total - experts) * 2 * (7 / 8 / 450e9 + 7 / 8 / 8 / 50e9)
    assert base.plan.replica_seconds == pytest.approx(2 * (halves + rest), rel=1e-12)
    sharded = replace(base.plan, sharded="weights", micro_batch=4)
    assert sharded.replica_seconds == pytest.approx(3 * 4 * (halves + rest), rel=1e-12)
    wide = replace(
        base.plan, ep=16
    )  # four groups of two nodes: a rank's experts are on one rank of every second node
    assert wide.replica_seconds == pytest.approx(
        2 * (experts / 16 * 2 * (3 / 4 / 50e9) + rest), rel=1e-12
    )
    alone = replace(base.plan, ep=64)  # nobody else has them
    assert alone.replica_seconds == pytest.approx(2 * rest, rel=1e-12)


def test_replicas_that_outlast_computing_lengthen_the_step():
    made = design(replace(BASE, batch_tokens=1.0, seq_len=256))
    plan = made.plan
    assert plan.replica_seconds > plan.compute_seconds
    assert plan.step_seconds == plan.replica_seconds + plan.exchange_seconds
    assert "takes longer than computing" in made.markdown()


def test_experts_with_few_tokens_slow_their_part_of_the_step_by_the_roofline():
    made = design(DesignBudget(active=300e6, tokens=20e9, gpus=8))
    m, d, f = made.plan.micro_tokens * made.plan.ep * 8 / 128, made.shape.d_model, made.shape.d_ff
    share = attainable_flops(m, d, f, ACCELERATORS["h100"]) / 989e12
    assert made.plan.roofline["tokens_per_expert"] == m and share < 1
    experts = 6 * made.spec.active_parts["experts"]
    all_else = training_flops(made.spec, 4096).total - experts
    tokens = made.budget.sequences_per_step * 4096
    assert made.plan.compute_seconds == pytest.approx(
        (all_else + experts / share) * tokens / (989e12 * 0.4), rel=1e-12
    )


def test_layers_computed_again_cost_a_forward_pass_and_an_exchange():
    made = design(DesignBudget(active=37e9, total=671e9, tokens=14e12, gpus=2048, gpu="h200"))
    assert made.plan.recompute == "layer" and made.plan.exchange.passes == 3
    assert made.plan.flops_per_token == pytest.approx(
        4 * forward_flops(made.spec, 4096).total, rel=1e-12
    )
    assert (
        made.plan.exchange_seconds
        == made.plan.micro_batches * 3 * made.shape.n_layers * made.plan.exchange.forward_seconds
    )


# -- the exchange ---------------------------------------------------------------------------------------------------------------------


def test_the_volume_and_time_of_deepseek_v3s_dispatch():
    """T = 4096, k = 8, d = 7168, P = 64: 462.4 MB at 50 GB/s, and a quarter of the copies in one byte: 115.6 MB, 2.31 ms."""
    network = Network(1, 450e9, 50e9)  # every rank a node: one kind of link
    x = ExchangeCost(4096, 8, 7168, 64, network, 2, None, 1, 1)
    assert x.volume.dispatch == 4096 * 8 * 7168 * 2 * 63 / 64 == pytest.approx(462.4e6, rel=1e-4)
    assert x.forward_seconds == pytest.approx(2 * 9.25e-3, rel=1e-3)
    limited = replace(
        x, network=Network(8, 1e15, 50e9), max_nodes=4, dispatch_bytes=1
    )  # handing on inside a node costs next to nothing
    assert limited.once_per_node and limited.inter_copies == 4
    assert limited.volume.dispatch == pytest.approx(115.6e6, rel=1e-3)
    across = 4096 * 4 * 7168 * (1 + 2) * 56 / 64 / 50e9  # to the other 7 nodes
    assert limited.forward_seconds == pytest.approx(across, rel=1e-3)


def test_a_row_crosses_once_to_each_node_only_where_that_is_faster():
    x = ExchangeCost(4096, 8, 2048, 16, Network(8, 450e9, 50e9), 2, None, 1, 1)
    b = 4096 * 2048 * 2
    straight, twice = 8 * b * (8 / 16) / 50e9, 2 * b * (8 / 16) / 50e9 + 8 * b * (7 / 8) / 450e9
    assert (
        x.once_per_node
        and x.forward_seconds == pytest.approx(2 * twice, rel=1e-12)
        and twice < straight
    )
    slow = replace(x, network=Network(8, 50e9, 50e9))
    assert not slow.once_per_node and slow.inter_copies == 8
    assert slow.forward_seconds == pytest.approx(2 * straight, rel=1e-12)


def test_every_cut_shortens_the_exchange():
    x = ExchangeCost(4096, 8, 7168, 64, Network(8, 450e9, 50e9), 2, None, 60, 2)
    after = cuts(x)
    assert len(after) == 3 and all(cut.seconds < x.seconds for cut in after.values())
    assert list(cuts(replace(x, dispatch_bytes=1, max_nodes=4, copies=1))) == []


def test_the_node_limit_comes_with_an_exchange_above_30_percent_and_reaches_the_router():
    made = design(DesignBudget(active=37e9, total=671e9, tokens=14e12, gpus=2048, gpu="h200"))
    assert made.plan.max_nodes == 4 and made.plan.exchange.nodes == 8
    assert made.moe.router_options["n_groups"] == 8 and made.moe.router_options["topk_groups"] == 4
    assert (made.hf_config()["n_group"], made.hf_config()["topk_group"]) == (8, 4)
    assert made.plan.exchange_share > 0.3 and "Note: the exchange takes" in made.markdown()
    unlimited = replace(made.plan, max_nodes=None)
    assert unlimited.exchange_share > made.plan.exchange_share


def test_no_plan_that_fits_has_a_shorter_modelled_step(base):
    tried = 0
    for ep in ep_sizes(64, 8, 128):
        for recompute in ("nothing", "activation", "layer"):
            for micro in (1, 2, 4, 8, 16):
                memory = gpu_memory(
                    base.spec,
                    gpus=64,
                    ep=ep,
                    sharded="optimizer",
                    recompute=recompute,
                    tokens=micro * 4096,
                )
                if memory.total <= BASE.usable_memory:
                    plan = replace(
                        base.plan, ep=ep, recompute=recompute, micro_batch=micro, memory=memory
                    )
                    assert plan.step_seconds >= base.plan.step_seconds
                    tried += 1
    assert tried > 20


def test_experts_go_no_further_than_memory_and_the_roofline_ask():
    assert (
        design(replace(BASE, active=300e6, tokens=20e9)).plan.ep == 1
    )  # all of it fits on every GPU
    roomy, tight = design(replace(BASE, gpu="b200")), design(replace(BASE, memory_limit=45e9))
    assert roomy.plan.ep == 1 and tight.plan.ep > design(BASE).plan.ep
    assert "nothing is exchanged" in roomy.markdown()


@pytest.mark.parametrize("nodes, limit", [(2, 1), (4, 2), (6, 3), (8, 4), (32, 4)])
def test_a_node_limit_is_half_the_nodes_and_at_most_four(nodes, limit):
    assert node_limit(nodes) == limit


def test_the_batch_is_a_power_of_two_of_sequences_a_gpu():
    by_tokens = {
        batch: replace(BASE, batch_tokens=batch).tokens_per_step for batch in (2**22, 1e6, 6e6, 1.0)
    }
    assert by_tokens == {
        2**22: 2**22,
        1e6: 2**19,
        6e6: 2**22,
        1.0: 64 * 4096,
    }  # never less than a sequence a GPU
    assert (
        replace(BASE, tokens=10e9, gpus=8).tokens_per_step == 2**18
    )  # 0.5M tokens leave 20 000 steps: the power of two below
    assert "for the 1M asked for" in design(replace(BASE, batch_tokens=1e6)).markdown()


@pytest.mark.parametrize(
    "gpus, m, experts, sizes",
    [
        (64, 8, 128, [1, 2, 4, 8, 16, 32, 64]),
        (24, 8, 128, [1, 2, 4, 8]),
        (24, 8, 96, [1, 2, 4, 8, 24]),
        (6, 6, 128, [1, 2]),
        (1, 1, 8, [1]),
        (2048, 8, 200, [1, 2, 4, 8]),
    ],
)
def test_expert_parallel_groups_divide_gpus_and_experts_and_are_parts_or_multiples_of_a_node(
    gpus, m, experts, sizes
):
    assert ep_sizes(gpus, m, experts) == sizes


# -- scaling laws ---------------------------------------------------------------------------------------------------------------------


def test_the_fine_grained_law_at_numbers_one_can_check():
    N, D = 10.0**9, 10.0**11
    by_hand = 0.47 + (2.1 / 8**0.58 + 18.1) / 10 ** (9 * 0.115) + 30.8 / 10 ** (11 * 0.147)
    inside = fine_grained(N, D, 8, 64)
    assert inside.loss == pytest.approx(by_hand, rel=1e-12) and inside.outside == ()
    assert fine_grained_dense(N, D).loss == pytest.approx(
        0.47 + 16.3 / 10 ** (9 * 0.126) + 26.7 / 10 ** (11 * 0.127), rel=1e-12
    )
    assert fine_grained(N, D, 16, 64).loss < inside.loss < fine_grained(N, D, 1, 64).loss


def test_outside_its_range_a_law_says_so():
    assert [
        len(fine_grained(*args).outside)
        for args in (
            (128e6, 1e11, 8, 64),
            (1e9, 131e9, 8, 64),
            (1e9, 1e11, 17, 64),
            (1e9, 1e11, 8, 16),
            (4e9, 1e10, 8, 16),
        )
    ] == [1, 1, 1, 1, 3]
    assert (
        "several narrow experts" in routed(1e9, 16, 130e9).outside[-1]
        and len(routed(1e9, 16, 130e9).outside) == 1
    )
    assert len(routed(1e9, 500, 300e9).outside) == 3


def test_the_routed_law_starts_at_e_start_and_levels_off_at_e_max():
    for experts, saturating in ((1, 1.85), (1e9, 314)):
        by_hand = 10 ** (
            -0.082 * 9 - 0.108 * log10(saturating) + 0.009 * 9 * log10(saturating) + 1.104
        )
        assert routed(1e9, experts, 130e9).loss == pytest.approx(by_hand, rel=1e-6)


def test_the_dense_model_of_equal_loss_has_that_loss():
    loss = fine_grained(1e9, 1e11, 8, 64).loss
    assert fine_grained_dense(dense_params_of_equal_loss(loss, 1e11), 1e11).loss == pytest.approx(
        loss, rel=1e-12
    )
    assert dense_params_of_equal_loss(0.5, 1e11) == float("inf")


def test_the_report_warns_of_every_law_used_outside_its_range(base):
    report = base.markdown()
    for prediction in base.losses.values():
        assert f"{prediction.loss:.3f}" in report and "; ".join(prediction.outside) in report
    assert "is an extrapolation" in report
    assert (
        base.losses["fine-grained"].loss == fine_grained(14_866_817_024, 200e9, 9, 129 / 9).loss
    )  # total but embedding and head


# -- rules ----------------------------------------------------------------------------------------------------------------------------


def test_what_is_called_measured_is_counted_on_the_published_models():
    specs = [spec for spec in MODELS.values() if not spec.n_encoder_layers]
    moes = [spec.moe_layers[0] for spec in specs]
    aspect = [spec.d_model / spec.n_layers for spec in specs]
    width = [
        (
            moe.top_k
            * moe.d_ff
            * (1 if moe.glu else 2 / 3)
            * moe.expert_width(spec.d_model)
            / spec.d_model
            + moe.shared_width
        )
        / spec.d_model
        for spec, moe in zip(specs, moes)
    ]
    sparsity = [moe.n_experts / moe.top_k for moe in moes]
    assert (round(median(aspect)), round(median(width), 1), median(sparsity)) == (
        ASPECT,
        WIDTH,
        SPARSITY,
    )
    text = RULES["shape"].text
    assert (
        "94 in the median published model (quartiles 74 and 125)" in text
        and "3.3 d_model wide (2.6 to 4.2)" in text
    )
    assert [round(q) for q in quantiles(aspect)] == [74, 94, 125] and [
        round(q, 1) for q in quantiles(width)
    ] == [2.6, 3.3, 4.2]
    assert "(quartiles 11 and 32)" in RULES["sparsity"].text and [
        round(q) for q in quantiles(sparsity)
    ] == [11, 16, 32]


def test_a_rule_is_of_a_known_kind_and_every_rule_is_used_somewhere():
    with pytest.raises(
        ValueError, match="kind='law' must be one of 'paper', 'measured', 'rule of thumb'"
    ):
        Rule("a", "b", "c", "law")
    reports = "".join(
        design(replace(BASE, **change)).markdown()
        for change in (
            {},
            {"router": "topk", "top_k": 1},
            {"router": "topk"},
            {"streaming": True},
            {"active": 300e6, "tokens": 1e10},
            {"active": 37e9, "total": 671e9, "gpus": 2048, "gpu": "h200", "tokens": 14e12},
        )
    )
    assert [name for name in RULES if f"- **{name}** ({RULES[name].kind}): " not in reports] == []


def test_every_choice_of_the_report_names_a_rule_that_the_report_explains(base):
    report = base.markdown()
    cited = set(
        re.findall(r"\| ([^|]+) \((?:paper|measured|rule of thumb)\) \|$", report, re.MULTILINE)
    )
    assert len(cited) > 10 and all(f"- **{name}** (" in report for name in cited)


# -- routers --------------------------------------------------------------------------------------------------------------------------


def test_the_router_follows_what_was_asked():
    free, topk, threshold = (
        design(replace(BASE, **change)).moe
        for change in ({}, {"router": "topk"}, {"streaming": True})
    )
    assert (free.router, free.aux_loss_weight, free.z_loss_weight, free.jitter_noise) == (
        "loss_free",
        0.0,
        0.0,
        0.0,
    )
    assert free.capacity_factor is None and topk.capacity_factor is None
    assert free.router_options == {"bias_update_rate": 0.001, "sequence_loss_weight": 0.0001}
    assert (topk.router, topk.aux_loss_weight, topk.z_loss_weight) == ("topk", 0.01, 0.001)
    assert topk.norm_topk_prob is True and topk.n_shared_experts == 0
    assert threshold.router == "expert_threshold" and threshold.n_shared_experts == 1
    assert threshold.router_options == {
        "ema_decay": 0.999,
        "warmup_steps": 4000,
        "capacity_band": 0.5,
    }


def test_with_one_expert_a_token_weights_are_not_renormalised():
    for router in ("loss_free", "topk"):
        made = design(replace(BASE, router=router, top_k=1))
        assert made.moe.norm_topk_prob is False and made.hf_config()["norm_topk_prob"] is False


def test_a_short_run_gives_thresholds_a_short_memory():
    made = design(
        DesignBudget(active=50e6, tokens=100e6, gpus=1, streaming=True, batch_tokens=32768)
    )
    assert made.budget.steps == 3052 and made.moe.router_options["ema_decay"] == round(
        1 - 1 / 152, 6
    )
    assert made.moe.router_options["warmup_steps"] == 608 < made.budget.steps


# -- budgets --------------------------------------------------------------------------------------------------------------------------


def given_back(text: str) -> list[tuple[str, float]]:
    """The changes that an error offers: names and values."""
    found = re.findall(r"\b(gpus|tokens|total|active|flops|seq_len|memory_limit)=([\d.e+]+)", text)
    return [
        (name, int(value) if name in ("gpus", "seq_len") else float(value)) for name, value in found
    ]


def changed(budget: DesignBudget, name: str, value: float, text: str) -> DesignBudget:
    """The budget after one of those changes."""
    total = None if "and no total" in text and name in ("active", "flops") else budget.total
    return replace(budget, **{"total": total, name: value})


@given(
    active=st.floats(7, 10.3),
    tokens=st.floats(9, 12.5),
    gpus=st.sampled_from([1, 2, 3, 6, *range(8, 520, 8)]),
    gpu=st.sampled_from(sorted(ACCELERATORS)),
    vocab=st.sampled_from([256, 32000, 50304, 151936]),
    seq_len=st.sampled_from([512, 2048, 4096, 16384]),
    router=st.sampled_from(["loss_free", "topk", "expert_threshold"]),
    sparsity=st.one_of(st.none(), st.floats(3, 30)),
    top_k=st.sampled_from([None, None, 1, 2, 6]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_whatever_the_budget_a_design_keeps_to_it_or_says_what_would_do(
    active, tokens, gpus, gpu, vocab, seq_len, router, sparsity, top_k
):
    active, tokens = float(f"{10**active:.3g}"), float(f"{10**tokens:.3g}")
    budget = DesignBudget(
        active=active,
        tokens=tokens,
        gpus=gpus,
        gpu=gpu,
        vocab_size=vocab,
        seq_len=seq_len,
        router=router,
        top_k=top_k,
        total=None if sparsity is None else sparsity * active,
    )
    try:
        made = design(budget)
    except Impossible as error:
        assert error.reason and "\n" not in str(error)
        offered = given_back("; ".join(error.nearest))
        assert offered and isinstance(design(changed(budget, *offered[-1], str(error))), Design)
        return
    spec, shape, plan = made.spec, made.shape, made.plan
    assert abs(spec.active_params / active - 1) <= 0.05
    assert (
        shape.n_experts % plan.ep == 0
        and made.budget.gpus % plan.ep == 0
        and plan.placement.n_experts == shape.n_experts
    )
    assert shape.d_model == shape.n_heads * shape.head_dim and shape.n_heads % shape.n_kv_heads == 0
    assert shape.n_experts >= 2 * shape.top_k and shape.d_ff % 16 == 0
    assert plan.memory.total <= made.budget.usable_memory < made.budget.accelerator.memory
    assert plan.memory.total == pytest.approx(sum(vars(plan.memory).values()), rel=1e-12)
    assert (
        plan.micro_batches * plan.micro_batch * seq_len * made.budget.gpus
        == made.budget.tokens_per_step
    )
    assert 0 <= plan.exchange_share < 1 and (plan.exchange_share == 0) == (plan.ep == 1)
    if sparsity is not None:
        off = spec.total_params / (sparsity * active) - 1
        # in 850 random budgets none from 5e8 up was off by more than 11 %, below by up to 1.45 times what was asked
        assert abs(off) <= (0.2 if active >= 5e8 else 2) and spec.total_params > active
        assert abs(off) <= 0.02 or f"total is {off:+.1%} from what was asked" in made.markdown()
    if top_k is None and tokens_to_reach(
        made.budget.accelerator.ridge, shape.d_model, shape.d_ff
    ) == float("inf"):
        assert shape.top_k == 2
    assert design(made.budget) == made and made.markdown() == design(made.budget).markdown()


@pytest.mark.parametrize("active, sparsity, top_k", [(15e6, 20, 4), (12e6, 16, 2), (35e6, 26, 4)])
def test_experts_that_move_the_width_of_a_small_model_are_counted_again(active, sparsity, top_k):
    total = sparsity * active
    vocab_size = 32000 if active == 15e6 else 50304
    made = design(
        DesignBudget(
            active=active, total=total, tokens=1e10, gpus=8, vocab_size=vocab_size, top_k=top_k
        )
    )
    assert abs(made.spec.total_params / total - 1) <= 0.1  # 40 % to 63 % off when counted once


@pytest.mark.parametrize("flops", [1e20, 3e21, 1e23])
def test_a_budget_of_flops_is_spent_to_within_5_percent(flops):
    made = design(DesignBudget(flops=flops, tokens=200e9, gpus=256))
    assert abs(made.training_flops / flops - 1) <= 0.05


def test_memory_that_is_short_first_costs_experts_then_says_so():
    made = design(DesignBudget(active=500e6, tokens=10e9, gpus=8, memory_limit=10e9))
    assert made.shape.n_experts == 64 and "memory holds 64 experts, not the 128" in made.markdown()


IMPOSSIBLE = [
    {"active": 37e9, "total": 671e9, "gpus": 64},
    {"active": None, "flops": 1e23},
    {"active": 5e9, "gpus": 1},
    {"active": 5e9, "gpus": 1, "total": 40e9},
    {"gpus": 8, "seq_len": 2_000_000},
    {"active": 1e6},
    {"total": 1.6e9},
    {"gpus": 8, "memory_limit": 5e9},
    {"active": 1e4, "vocab_size": 256},
    {"active": None, "flops": 1e23, "total": 1e12},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_whatever_an_impossible_budget_is_offered_would_do(change):
    with pytest.raises(Impossible) as caught:
        design(replace(BASE, **change))
    offered = given_back("; ".join(caught.value.nearest))
    assert offered
    for name, value in offered:
        assert isinstance(
            design(changed(replace(BASE, **change), name, value, str(caught.value))), Design
        )


@pytest.mark.parametrize(
    "change",
    [
        {"gpus": 60},
        {"gpus": 12},
        {"tokens": 1e5},
        {"tokens": 9e4},
        {"tokens": 2e4, "gpus": 8},
        {"total": 1e9},
    ],
    ids=str,
)
def test_what_no_shape_can_mend_is_refused_at_once_with_what_would_do(change):
    with pytest.raises(Impossible) as caught:
        replace(BASE, **change)
    for name, value in given_back("; ".join(caught.value.nearest)):
        if "dense" not in str(caught.value) and "on 1 GPU" not in str(caught.value):
            assert isinstance(design(replace(BASE, **{**change, name: value})), Design)


def test_one_gpu_fewer_than_told_is_not_enough():
    budget = DesignBudget(active=37e9, total=671e9, tokens=200e9, gpus=64)
    with pytest.raises(Impossible, match=r"gpus=160\b"):
        design(budget)
    with pytest.raises(Impossible):
        design(replace(budget, gpus=152))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flops": 1e21}, "give exactly one of active=1500000000.0 and flops=1e\\+21"),
        ({"active": None}, "give exactly one"),
        ({"gpu": "h9"}, "gpu='h9' must be one of"),
        ({"utilisation": 0.0}, "utilisation=0.0 must be above 0 and at most 1"),
        (
            {"router": "topk", "streaming": True},
            "router='topk' must be 'expert_threshold' where streaming=True",
        ),
        ({"tokens": float("nan")}, "tokens=nan must be at least 1 and finite"),
        ({"gpus": 0}, "gpus=0 must be a whole number, at least 1"),
        ({"total": 1e9}, "total=1e\\+09 is less than active=1.5e\\+09"),
        ({"memory_limit": 81e9}, "memory_limit=8.1e\\+10 must be at most"),
        ({"router": "hash"}, "router='hash' must be one of"),
        ({"top_k": 0}, "top_k=0 must be a whole number"),
    ],
)
def test_a_value_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1.5B", 1.5e9),
        ("200b", 200e9),
        ("3e21", 3e21),
        ("640", 640.0),
        ("2T", 2e12),
        ("70G", 70e9),
        (" 4K ", 4e3),
        (".5M", 5e5),
    ],
)
def test_numbers_may_be_written_short(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "B", "1.5X", "-3B", "1,5B", "1.5BB", "nan", "1e", "0x10"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match="must be a number such as 1.5B"):
        number(text)


# -- command line ---------------------------------------------------------------------------------------------------------------------


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moe_tools.design", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=moe_core.__path__[0] + "/..")


def test_the_command_prints_and_writes_the_same_design_as_the_function(tmp_path, base):
    done = _run(
        *"--active 1.5B --tokens 200B --gpus 64 --gpu h100".split(),
        "--out",
        str(tmp_path / "design.md"),
        "--hf-config",
        str(tmp_path / "config.json"),
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == base.markdown() == str(base) == (tmp_path / "design.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text()) == base.hf_config()
    parts = ["## 1. Model", "## 2. Router", "## 3. Compute", "## 4. Distribution", "## Rules"]
    assert [line for line in done.stdout.splitlines() if line.startswith("## ")] == parts


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (
            "--active 1.5x --tokens 200B --gpus 64",
            2,
            "error: argument --active: '1.5x' must be a number",
        ),
        ("--active 1.5B --gpus 64", 2, "error: the following arguments are required: --tokens"),
        (
            "--active 1.5B --tokens 200B --gpus 60",
            1,
            "error: gpus=60 do not fill whole nodes of ranks_per_node=8. Nearest: gpus=56 or ",
        ),
        (
            "--active 1.5B --tokens 200B --gpus 1e400",
            2,
            "error: argument --gpus: '1e400' must be a whole number",
        ),
        (
            "--active 1.5B --tokens 200B --gpus 64 --streaming --hf-config x.json",
            1,
            "error: router='expert_threshold' has no Hugging Face",
        ),
        ("--active 1.5B --tokens 200B --gpus 64 --out /no/such/folder/x.md", 1, "error: [Errno 2]"),
    ],
)
def test_errors_are_one_line(arguments, status, message, capsys):
    from moe_tools.design.__main__ import main

    try:
        code = main(arguments.split())
    except SystemExit as end:
        code = end.code
    written = capsys.readouterr()
    assert (
        code == status
        and written.out == ""
        and written.err.startswith(message)
        and written.err.count("\n") == 1
    )


def test_help_says_what_each_option_is(capsys):
    from moe_tools.design.__main__ import _parser, main

    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(action.help and action.option_strings[-1] in text for action in _parser()._actions)
    assert set(DesignBudget.__dataclass_fields__) <= {action.dest for action in _parser()._actions}


def test_attention_is_shared_among_query_heads(base):
    assert base.spec.layers[0].mixers == (AttentionSpec(16, 4, 128, qk_norm="head"),)
