"""One rule for capacity, in routers and configs: training and eval, fixed places, overflow to the shared expert."""

import json

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_core import CapacityRule, MixtureOfExperts, MoEConfig, TopKRouter, capacity, metrics
from moe_core.capacity import DROP_POLICIES

from .helpers import Case, cases, close, config, fast, randn, routing_of, seeded


def test_the_number_alone_is_the_rule_with_that_factor():
    assert CapacityRule.of(1.25) == CapacityRule(factor=1.25)
    assert (
        CapacityRule.of(None) == CapacityRule()
        and CapacityRule().dropless(True)
        and CapacityRule().dropless(False)
    )
    rule = CapacityRule(factor=1.0, drop_policy="score")
    assert CapacityRule.of(rule) is rule


@pytest.mark.parametrize(
    ("rule", "training", "evaluation"),
    [
        (CapacityRule(factor=1.0), 8, 8),
        (CapacityRule(factor=1.0, eval_factor=2.0), 8, 16),
        (CapacityRule(factor=1.0, eval_factor=None), 8, None),
        (CapacityRule(factor=None, eval_factor=0.5), None, 4),
        (CapacityRule(expert_capacity=3), 3, 3),
        (CapacityRule(expert_capacity=3, eval_factor=None), 3, None),
        (CapacityRule(factor=1.0, scope="sequence"), 4, 4),
        (CapacityRule(factor=1.0, formula="flaxformer"), 4, 4),
        (CapacityRule(factor=1.0, min_capacity=9), 9, 9),
        (CapacityRule(), None, None),
    ],
)
def test_the_router_uses_the_rule_of_its_mode(rule, training, evaluation):
    router, x = seeded(TopKRouter, 4, 4, 2, capacity_factor=rule), randn(2, 8, 4)
    assert router.train()(x).check().capacity == training
    routing = router.eval()(x).check()
    assert routing.capacity == evaluation and routing.dropless == (evaluation is None)


def test_a_random_policy_is_random_in_training_and_by_position_in_eval():
    router, x = (
        seeded(TopKRouter, 4, 4, 2, capacity_factor=CapacityRule(factor=0.5, drop_policy="random")),
        randn(2, 16, 4),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(router(x).capacity_mask, router(x).capacity_mask)
    by_position = seeded(TopKRouter, 4, 4, 2, capacity_factor=0.5)(x).capacity_mask
    assert torch.equal(router.eval()(x).capacity_mask, by_position)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": -1.0}, "factor=-1.0 must be at least 0"),
        ({"eval_factor": "dropless"}, "eval_factor='dropless' must be one of 'as in training'"),
        ({"eval_factor": -2.0}, "eval_factor=-2.0 must be at least 0"),
        ({"expert_capacity": 1.5}, "expert_capacity=1.5 must be a whole number"),
        (
            {"expert_capacity": 4, "factor": 1.0},
            "give either expert_capacity=4 or a factor, not both",
        ),
        (
            {"expert_capacity": 4, "eval_factor": 1.0},
            "give either expert_capacity=4 or a factor, not both",
        ),
        (
            {"expert_capacity": 4, "formula": "tutel"},
            "expert_capacity=4 is not computed: formula and min_capacity have no use",
        ),
        ({"expert_capacity": 4, "min_capacity": 1}, "expert_capacity=4 is not computed"),
        ({"min_capacity": -1}, "min_capacity=-1 must be a whole number"),
        ({"formula": "mine"}, "formula='mine' must be one of"),
        ({"scope": "world"}, "scope='world' must be one of"),
        ({"drop_policy": "luck"}, "drop_policy='luck' must be one of"),
        ({"overflow": "spill"}, "overflow='spill' must be one of"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CapacityRule(**arguments)


def test_a_config_with_a_rule_survives_json():
    rule = CapacityRule(factor=1.25, eval_factor=2.0, drop_policy="score", overflow="shared")
    one = config(capacity_factor=rule, n_shared_experts=1)
    assert MoEConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    with pytest.raises(ValueError, match="unknown keys in CapacityRule: colour"):
        config(capacity_factor={"colour": 1})


def test_overflow_needs_a_shared_expert_to_go_to():
    with pytest.raises(
        ValueError,
        match="n_shared_experts=0 must be at least 1 where the overflow goes to the shared expert",
    ):
        config(capacity_factor=CapacityRule(factor=1.0, overflow="shared"))


def test_the_overflow_weight_is_what_the_dropped_slots_would_have_weighed():
    weights = torch.tensor([[[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]])
    before = routing_of([[[0, 1], [0, 2], [1, 0]]], 3, weights=weights)
    after = capacity.apply(before, expert_capacity=1, overflow="shared").check()
    assert close(after.overflow_weight, torch.tensor([[0.0, 0.6, 1.0]]))
    assert not capacity.apply(before, expert_capacity=1).overflow_weight.any()
    assert not before.overflow_weight.any()


def test_padding_and_experts_not_asked_for_overflow_nothing():
    before = routing_of(
        [[[0], [0], [1]]],
        2,
        reasons=[[[2], [3], [0]]],
        padding_mask=torch.tensor([[False, True, True]]),
    )
    after = capacity.apply(before, expert_capacity=0, overflow="shared").check()
    assert after.overflow_weight.tolist() == [[0.0, 0.0, 1.0]]


def test_with_no_place_anywhere_the_shared_expert_does_all_the_work_and_the_router_still_learns():
    rule = CapacityRule(expert_capacity=0, overflow="shared")
    moe = seeded(
        MixtureOfExperts, config(capacity_factor=rule, n_shared_experts=1, norm_topk_prob=False)
    )
    x = randn(2, 5, 8)
    y, routing = moe(x)
    assert close(y, (1 + routing.expert_weights.sum(-1, keepdim=True)) * moe.shared_experts(x))
    y.square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 1e-4


def test_a_dropped_slot_adds_exactly_zero_unless_the_overflow_is_shared():
    dropping, sharing = (
        seeded(
            MixtureOfExperts,
            config(
                capacity_factor=CapacityRule(expert_capacity=1, overflow=overflow),
                n_shared_experts=1,
            ),
        )
        for overflow in ("drop", "shared")
    )
    x = randn(1, 6, 8)
    (y, routing), (y_shared, shared_routing) = dropping(x), sharing(x)
    assert torch.equal(routing.capacity_mask, shared_routing.capacity_mask)
    nobody = ~routing.capacity_mask.any(-1)
    assert nobody.any() and torch.equal(y[nobody], dropping.shared_experts(x)[nobody])
    assert close(
        y_shared[nobody], 2 * dropping.shared_experts(x)[nobody]
    )  # the weights of a token sum to 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_overflow_keeps_the_dtype_of_the_layer(dtype):
    rule = CapacityRule(factor=0.5, overflow="shared")
    moe = seeded(MixtureOfExperts, config(capacity_factor=rule, n_shared_experts=1)).to(dtype)
    assert moe(randn(2, 5, 8, dtype=dtype))[0].dtype == dtype


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_no_value_is_read_on_the_way(policy, scope):
    """Under FakeTensorMode reading a value raises, as it would stall a GPU."""
    with FakeTensorMode():
        router = TopKRouter(
            8,
            4,
            2,
            capacity_factor=CapacityRule(
                factor=0.5, drop_policy=policy, scope=scope, overflow="shared"
            ),
        )
        routing = router(torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
        routing.overflow_weight.sum().backward()
        for measure in (
            metrics.max_violation,
            metrics.coefficient_of_variation,
            metrics.router_entropy,
            metrics.load_entropy,
            metrics.drop_rate,
            metrics.dead_experts,
            lambda routing: metrics.route_flips(routing, routing, kept=True),
        ):
            measure(routing)
        with pytest.raises(
            Exception, match="aten._local_scalar_dense|data-dependent|DataDependent"
        ):
            routing.drop_rate.item()  # the instrument works


@fast
@given(cases())
def test_the_rule_in_the_router_is_the_rule_applied_afterwards(case: Case):
    rule = CapacityRule(factor=0.6, drop_policy="score", scope="sequence", formula="megatron")
    inside = case.router(capacity_factor=rule)(case.x(), case.padding_mask()).check()
    outside = rule.apply(
        case.router(capacity_factor=None)(case.x(), case.padding_mask()), training=True
    )
    assert (
        torch.equal(inside.capacity_mask, outside.capacity_mask)
        and inside.capacity == outside.capacity
    )


def test_a_rule_given_to_a_dropless_router_afterwards_limits_it():
    router = seeded(TopKRouter, 8, 4, 1)
    assert router(randn(2, 32, 8, dtype=torch.float32)).dropless
    router.capacity_rule = CapacityRule(factor=0.5)
    assert metrics.drop_rate(router(randn(2, 32, 8, dtype=torch.float32))) > 0
