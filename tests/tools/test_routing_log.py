"""What a RoutingLog writes down is what happened; it changes nothing, and JSON gives it back."""

import json
from math import log as ln

import pytest
import torch
import torch.nn.functional as F

from moe_core import LanguageModel, LMConfig, MoEConfig, TopKRouter, losses, metrics
from moe_core.routers import ROUTERS
from moe_tools import diagnosis
from moe_tools.diagnosis.log_records import StepCosts, layer_record
from moe_tools.diagnosis.routing_log import RoutingLog

from ..core.helpers import randn

OPTIONS = {"hash": dict(vocab_size=256)}
TOP_K = {"switch": 1, "base": 1}


def model_with(router: str = "topk", **fields) -> LanguageModel:
    torch.manual_seed(0)
    fields = dict(top_k=TOP_K.get(router, 2), router_options=OPTIONS.get(router, {})) | fields
    moe = MoEConfig(d_model=16, d_ff=16, n_experts=4, router=router, **fields)
    return LanguageModel(LMConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=16, moe=moe))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_record_says_what_the_metrics_say(name):
    model = model_with(name).train()
    mask = torch.arange(16).expand(3, -1) < torch.tensor([[16], [9], [1]])
    _, routings = model(tokens(), mask)
    log = RoutingLog(model, every=1)
    assert log.add(1, routings, loss=torch.tensor(2.5), padding_mask=mask)
    (step,) = log.training
    assert step.loss == 2.5 and step.padding_share == pytest.approx(1 - 26 / 48)
    for record, routing in zip(step.layers, routings):
        assert (
            record.asked == metrics.load(routing).tolist()
            and record.kept == routing.tokens_per_expert.tolist()
        )
        assert record.tokens == 26 and record.padding_slots == 0
        assert record.entropy == pytest.approx(float(metrics.router_entropy(routing)))
        real = routing.logits.detach()[mask].double()
        assert record.logsumexp == pytest.approx(
            float(real.logsumexp(-1).square().mean().sqrt()), rel=1e-6
        )
        assert record.largest_logit == pytest.approx(float(real.abs().amax(-1).mean()), rel=1e-6)
        assert record.largest_score == pytest.approx(
            float(routing.scores.detach()[mask].double().amax(-1).mean()), rel=1e-6
        )
        assert record.losses == {
            key: pytest.approx(value.item()) for key, value in routing.losses.items()
        }
        assert record.capacity == routing.capacity
        assert len(record.aim) == routing.n_experts


def test_logsumexp_is_the_root_of_the_z_loss():
    routing = TopKRouter(8, 4, 2)(randn(2, 5, 8))
    assert layer_record(routing).logsumexp ** 2 == pytest.approx(
        losses.z_loss(routing).item(), rel=1e-6
    )


def test_it_looks_at_every_nth_step_and_at_the_load_of_the_next():
    model = model_with()
    log, loads = RoutingLog(model, every=4), {}
    for step in range(1, 12):
        routings = model(tokens(step))[1]
        loads[step] = routings[1].slots_per_expert().tolist()
        assert log.add(step, routings) == (step in (4, 8))
    assert [step.step for step in log.training] == [4, 8]
    assert [step.layers[1].asked for step in log.training] == [loads[4], loads[8]]
    assert [step.layers[1].asked_next for step in log.training] == [loads[5], loads[9]]


def test_a_step_that_was_left_out_gives_no_next_load():
    model = model_with()
    log = RoutingLog(model, every=4)
    for step in (4, 6, 8):
        log.add(step, model(tokens(step))[1])
    assert [step.layers[0].asked_next for step in log.training] == [None, None]


def test_logging_changes_neither_the_training_nor_the_random_numbers():
    def trained(logged: bool):
        model = model_with("noisy_topk").train()
        log = RoutingLog(model, every=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(1, 4):
            logits, routings = model(tokens(step))
            (logits.square().mean() + sum(routing.aux_loss for routing in routings)).backward()
            optimizer.step()
            if logged:
                log.add(step, routings, loss=logits.square().mean())
                log.add_evaluation(step, routings)
        return torch.cat([p.flatten() for p in model.parameters()]), torch.rand(3)

    for plain, logged in zip(trained(False), trained(True)):
        assert torch.equal(plain, logged)


def test_json_gives_the_log_back():
    model = model_with("expert_threshold", n_shared_experts=1, shared_gate=True)
    log = RoutingLog(model, every=1)
    for step in range(1, 4):
        routings = model(tokens(step))[1]
        log.add(
            step,
            routings,
            loss=1.0,
            route_flips=[0.1, 0.2],
            costs=StepCosts(step_seconds=0.5, rank_rows=[1, 2]),
        )
        log.add_evaluation(step, routings, loss=2.0)
    back = RoutingLog.from_dict(json.loads(json.dumps(log.to_dict(), allow_nan=False)))
    assert back.training == log.training and back.evaluation == log.evaluation and back.every == 1
    assert back.to_dict() == log.to_dict()
    assert diagnosis.diagnose(back) == diagnosis.diagnose(log)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: values.update(more=1),
        lambda values: values["training"][0].pop("loss"),
        lambda values: values["training"][0]["layers"][0].update(lode=3),
        lambda values: values["training"][0]["costs"].update(money=3),
    ],
)
def test_a_key_that_does_not_belong_or_is_missing_is_refused(spoil):
    log = RoutingLog(every=1)
    log.add(1, [TopKRouter(8, 4, 2)(randn(2, 5, 8))])
    values = log.to_dict()
    spoil(values)
    with pytest.raises(ValueError, match="must have"):
        RoutingLog.from_dict(values)


def test_precision_is_told_by_the_bits_whatever_the_dtype():
    router, x = TopKRouter(64, 8, 2), randn(4, 128, 64)
    in_float32 = router(x)
    assert (
        layer_record(in_float32).bf16_logits < 0.01 and layer_record(in_float32).bf16_weights < 0.01
    )
    in_double = router.double()(x.double())
    assert layer_record(in_double).bf16_logits == 0
    router.float().logits = lambda x: F.linear(x.bfloat16(), router.weight.bfloat16()).float()
    record = layer_record(router(x))
    assert record.bf16_logits == 1 and record.bf16_weights < 0.01  # the softmax is in float32


def test_a_bfloat16_model_whose_router_computes_in_float32_is_not_taken_for_one():
    router = TopKRouter(64, 8, 2).bfloat16()
    assert layer_record(router(randn(4, 128, 64).bfloat16())).bf16_logits < 0.01


def test_constant_weights_and_zero_logits_say_nothing_about_precision():
    model = model_with("hash")
    record = layer_record(model(tokens())[1][0])
    assert record.bf16_logits is None and record.bf16_weights is None


def test_padding_that_asks_for_experts_is_counted():
    model = model_with()
    mask = torch.arange(16).expand(3, -1) < 12
    log = RoutingLog(model, every=1)
    log.add(1, model(tokens())[1], padding_mask=mask)
    log.add(2, model(tokens(), mask)[1], padding_mask=mask)
    log.add(3, model(tokens(), mask)[1])  # the router's own mask
    log.add(4, model(tokens())[1])
    assert [step.layers[0].padding_slots for step in log.training] == [3 * 4 * 2, 0, 0, None]
    assert [step.padding_share for step in log.training] == [0.25, 0.25, 0.25, None]


@pytest.mark.parametrize(
    "name, options, K, aim",
    [
        ("topk", {}, 2, [0.5] * 4),
        ("expert_choice", {}, 1.5, [0.375] * 4),
        ("zero_computation", dict(ffn_ratio=3.0), 2, [2 * 3 / 15] * 4 + [2 * 1 / 15] * 3),
        (
            "zero_computation",
            dict(bias_update_rate=0.1, mean_ffn_experts=1.0),
            2,
            [0.25] * 4 + [1 / 3] * 3,
        ),
    ],
)
def test_the_aim_is_what_the_router_means_each_expert_to_get(name, options, K, aim):
    model = model_with(name, top_k=K, router_options=options)
    log = RoutingLog(model, every=1)
    log.add(1, model(tokens())[1])
    assert log.training[0].layers[0].aim == pytest.approx(aim) and sum(aim) == pytest.approx(K)


def test_biases_and_thresholds_are_those_after_the_step():
    for name, attribute in (
        ("loss_free", "expert_bias"),
        ("quantile_balancing", "beta"),
        ("expert_threshold", "cutoffs"),
    ):
        model = model_with(name)
        log = RoutingLog(model, every=1)
        routings = model(tokens())[1]
        model.update_routers([routings])
        log.add(1, routings)
        record, state = (
            log.training[0].layers[1],
            getattr(model.blocks[1].feed_forward.router, attribute),
        )
        if name == "expert_threshold":
            assert record.thresholds == state.tolist() and record.bias is None
        else:
            assert (
                record.thresholds is None
                and record.bias == (-state if name == "quantile_balancing" else state).tolist()
            )


def test_the_shared_gate_is_the_mean_of_what_the_layer_used_and_close_takes_the_hooks_off():
    model = model_with(n_shared_experts=1, shared_gate=True)
    seen = {}
    for index, block in enumerate(model.blocks):
        block.feed_forward.shared_experts.gate.register_forward_hook(
            lambda m, a, y, index=index: seen.update({index: y})
        )
    log = RoutingLog(model, every=1)
    log.add(1, model(tokens())[1])
    log.close()
    log.add(2, model(tokens())[1])
    assert [layer.shared_gate for layer in log.training[0].layers] == [
        pytest.approx(seen[i].sigmoid().mean().item()) for i in (0, 1)
    ]
    assert [layer.shared_gate for layer in log.training[1].layers] == [None, None]
    assert all(
        len(block.feed_forward.shared_experts.gate._forward_hooks) == 1 for block in model.blocks
    )


def test_a_capacity_counted_for_each_sequence_is_told_for_the_batch():
    from moe_core import CapacityRule

    model = model_with(capacity_factor=CapacityRule(expert_capacity=3, scope="sequence"))
    log = RoutingLog(model, every=1)
    log.add(1, model(tokens())[1])
    assert log.training[0].layers[0].capacity == 3 * 3


def test_without_a_model_routings_alone_are_enough():
    log = RoutingLog(every=1)
    log.add(1, [TopKRouter(8, 4, 2)(randn(2, 5, 8))])
    (record,) = log.training[0].layers
    assert record.aim == [0.5] * 4 and record.bias is None and record.entropy <= ln(4)


def test_what_does_not_fit_is_refused():
    model = model_with()
    routings = model(tokens())[1]
    with pytest.raises(ValueError, match="every=0 must be a whole number, at least 1"):
        RoutingLog(every=0)
    log = RoutingLog(model, every=1)
    with pytest.raises(ValueError, match="routings has 1 entries, must have one for each of the 2"):
        log.add(1, routings[:1])
    with pytest.raises(ValueError, match="routings has 0 entries"):
        RoutingLog(every=1).add(1, [])
    with pytest.raises(ValueError, match="route_flips has 1 entries"):
        log.add(1, routings, route_flips=[0.0])
    with pytest.raises(ValueError, match=r"padding_mask must be bool of shape \(3, 16\)"):
        log.add(1, routings, padding_mask=torch.ones(3, 15, dtype=torch.bool))
    assert log.training == []
