"""Rules on small exact logs: silent just below their threshold, speaking just above it, with evidence that is true."""

import json
import math
from dataclasses import replace
from math import log as ln

import pytest

from moe_tools.diagnosis import ILLNESSES, Finding, Findings, Severity, diagnose, illness
from moe_tools.diagnosis.log_records import LayerRecord, StepCosts, StepRecord
from moe_tools.diagnosis.routing_log import RoutingLog

WELL = LayerRecord(
    asked=[250] * 8,
    kept=[250] * 8,
    tokens=1000,
    padding_slots=0,
    entropy=1.5,
    logsumexp=2.5,
    largest_logit=2.0,
    largest_score=0.4,
    bf16_logits=0.0,
    bf16_weights=0.0,
    capacity=320,
    losses={"load_balance": 0.01},
    aim=[0.25] * 8,
    asked_next=[250] * 8,
    bias=[0.0] * 8,
    shared_gate=0.5,
    route_flips=0.0,
)
COSTS = StepCosts(
    step_seconds=1.0,
    all_to_all_seconds=0.1,
    rank_rows=[500.0] * 4,
    rank_seconds=[0.5] * 4,
    memory_share=0.5,
)


def history(
    *layers: LayerRecord,
    costs=COSTS,
    loss: float = 2.0,
    eval_loss: float = 2.0,
    evaluated: LayerRecord = WELL,
) -> RoutingLog:
    """One layer; a record for each of these, or four alike when there is one. Evaluation has two records."""
    layers = layers * 4 if len(layers) == 1 else layers
    log = RoutingLog(every=10)
    log.training = [
        StepRecord(10 * (i + 1), [layer], loss, 0.0, costs) for i, layer in enumerate(layers)
    ]
    log.evaluation = [
        StepRecord(step.step, [evaluated], eval_loss, 0.0) for step in log.training[-2:]
    ]
    return log


def well(**changes) -> LayerRecord:
    return replace(WELL, **changes)


def one_gets(count: int, tokens: int = 1000, K: int = 2, E: int = 8) -> LayerRecord:
    """Expert 0 gets so many of the tokens, the others share the rest."""
    rest, left = divmod(K * tokens - count, E - 1)
    asked = [count] + [rest + (e < left) for e in range(E - 1)]
    return well(
        asked=asked, kept=asked, tokens=tokens, aim=[K / E] * E, asked_next=asked, bias=None
    )


def swings(amplitude: float, opposite: int, same: int, before: float = 0.0) -> RoutingLog:
    """Two experts above and below the mean by the amplitude; a step later on the other side in so many records, on the same in others."""

    def record(a, sign):
        up, down = round(1000 * (1 + a)), round(1000 * (1 - a))
        return well(
            asked=[up, down],
            asked_next=[up, down][::sign],
            kept=[up, down],
            tokens=2000,
            aim=[0.5] * 2,
            bias=[0.0] * 2,
        )

    late = [record(amplitude, -1)] * opposite + [record(amplitude, 1)] * same
    return history(*[record(before, -1)] * len(late), *late)


def dropped(kept: int, capacity: int) -> RoutingLog:
    return history(
        well(
            asked=[1000] + [0] * 7,
            kept=[kept] + [0] * 7,
            aim=[0.125] * 8,
            capacity=capacity,
            thresholds=[0.0] * 8,
        )
    )


def lets_in(*shares: float) -> RoutingLog:
    """A threshold router whose expert 0 lets in these shares of 10000 tokens, one a record; the other half of the log is well."""
    loads = [[round(10000 * share)] + [2500] * 7 for share in shares]
    records = [well(asked=asked, kept=asked, tokens=10000, thresholds=[0.0] * 8) for asked in loads]
    return history(
        *[well(thresholds=[0.0] * 8)] * len(records), *records, evaluated=well(thresholds=[0.0] * 8)
    )


def growing(first: float, then: float, **changes) -> RoutingLog:
    return history(well(largest_logit=first), *[well(largest_logit=then, **changes)] * 3)


def ranks(slow: float, slow_rows: float = 500.0, slow_in: int = 4) -> RoutingLog:
    """Rank 3 takes so many times what the other three take, in the last so many of four late records."""
    log = history(*[WELL] * 8)
    for i, step in enumerate(log.training):
        is_slow = i >= 8 - slow_in
        step.costs = StepCosts(
            rank_seconds=[1.0] * 3 + [slow if is_slow else 0.9], rank_rows=[500.0] * 3 + [slow_rows]
        )
    return log


# illness -> (a log just below the threshold, a log just above it, evidence computed by hand)
def spoiled(step: int, **changes) -> RoutingLog:
    """Well, but for one number of one step."""
    log = history(WELL)
    log.training[step].layers[0] = well(**changes)
    return log


CASES = {
    "diverged": (
        spoiled(2, largest_logit=3e38),
        spoiled(2, bias=[math.nan] + [0.0] * 7),
        {"first_seen_at_step": 30, "steps": [30, 30], "last_finite_step": 20},
    ),
    "collapse": (
        history(one_gets(625)),
        history(one_gets(626)),  # half way from 250 to 1000
        {"experts": [0], "share_of_tokens": [0.626], "fair_share": 0.25, "steps": [30, 40]},
    ),
    "starvation": (
        history(one_gets(100, tokens=10000)),
        history(one_gets(99, tokens=10000)),
        {"experts": [0], "share_of_tokens": [0.0099], "fair_share": 0.25, "without_any_token": 0},
    ),
    "load imbalance": (
        history(one_gets(299, 1600, 1, 16)),
        history(one_gets(301, 1600, 1, 16)),
        {"expert": 0, "share_of_tokens": 301 / 1600, "fair_share": 1 / 16, "ratio": 3.01},
    ),
    "oscillating bias": (
        swings(0.5, 62, 38),
        swings(0.5, 63, 37),
        {"correlation_with_next_step": -0.26, "amplitude": 0.5},
    ),
    "drop storm": (
        dropped(751, 751),
        dropped(750, 750),
        {"dropped": 0.25, "capacity": 750, "mean_load": 125.0},
    ),
    "threshold cold start": (
        lets_in(0.0099, 0.25, 0.25),
        lets_in(0.0099, 0.25, 0.626, 0.25),
        {
            "cold_experts": [0],
            "lets_in_next_to_nothing": 0.25,
            "lets_in_most": 0.25,
            "promised_share": 0.25,
            "in": "training, second half",
            "steps": [50, 80],
        },
    ),
    "logit drift": (
        growing(2.0, 8.0),
        growing(2.0, 8.1),
        {"largest_logit": 8.1, "at_first": 2.0, "steps": [10, 40]},
    ),
    "bf16 router": (
        history(well(bf16_logits=0.989)),
        history(well(bf16_logits=0.99)),
        {"logits_held_by_bf16": 0.99, "weights_held_by_bf16": 0.0, "route_flips": 0.0},
    ),
    "over-strong balance loss": (
        history(well(losses={"load_balance": 0.2}, entropy=ln(8))),
        history(well(losses={"load_balance": 0.15, "sequence_balance": 0.06}, entropy=ln(8))),
        {"balance_loss": 0.21, "entropy_over_ln_E": 1.0, "balance_loss_over_loss": 0.105},
    ),
    "padding counted": (
        history(well(padding_slots=0)),
        history(WELL, WELL, WELL, well(padding_slots=1)),
        {"share_of_slots": 1 / 8000, "padding_share": 0.0, "steps": [10, 40]},
    ),
    "dead shared gate": (
        history(well(shared_gate=0.05)),
        history(well(shared_gate=0.049)),
        {"mean_gate": 0.049},
    ),
    "train-eval gap": (
        history(WELL, eval_loss=2.049),
        history(WELL, eval_loss=2.051, evaluated=well(kept=[125] * 8)),
        {
            "gap": 0.051,
            "training_loss": 2.0,
            "eval_loss": 2.051,
            "dropped": [0.0, 0.5],
            "experts_per_token": [2.0, 1.0],
            "busiest_over_mean": [1.0, 1.0],
        },
    ),
    "straggler rank": (
        ranks(1.8),
        ranks(1.81),  # 1.8 of a mean of 1.2
        {
            "rank": 3,
            "seconds_over_mean": 1.81 / 1.2025,
            "waiting_share": 1 - 1.2025 / 1.81,
            "rows_over_mean": 1.0,
            "slowest_in": 1.0,
        },
    ),
    "slow all-to-all": (
        history(WELL, costs=replace(COSTS, all_to_all_seconds=0.3)),
        history(WELL, costs=replace(COSTS, all_to_all_seconds=0.301)),
        {"share_of_step": 0.301},
    ),
    "memory pressure": (
        history(WELL, costs=replace(COSTS, memory_share=0.9)),
        history(WELL, costs=replace(COSTS, memory_share=0.901)),
        {"peak_share": 0.901},
    ),
}


def named(log: RoutingLog, illness: str) -> list[Finding]:
    return [finding for finding in diagnose(log) if finding.name == illness]


@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_rule_is_silent_just_below_its_threshold(illness):
    log = CASES[illness][0]
    assert named(log, illness) == [] and illness not in diagnose(log).unasked


@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_rule_speaks_just_above_its_threshold_and_its_evidence_is_true(illness):
    _, log, evidence = CASES[illness]
    (finding,) = named(log, illness)
    for key, value in evidence.items():
        assert finding.evidence[key] == (
            value if isinstance(value, str) else pytest.approx(value, rel=1e-12, abs=1e-12)
        ), key


@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_finding_says_what_to_do_and_where_the_rule_comes_from(illness):
    (finding,) = named(CASES[illness][1], illness)
    assert (
        len(finding.remedy) > 20
        and len(finding.source) > 10
        and isinstance(finding.severity, Severity)
    )
    assert finding.layer == (None if ILLNESSES[illness].whole_run else 0)
    assert set(finding.evidence) and json.loads(json.dumps(finding.evidence)) == finding.evidence


def test_a_well_log_has_no_finding_and_asks_all_but_thresholds():
    findings = diagnose(history(WELL))
    assert findings == [] and list(findings.unasked) == ["threshold cold start"]


def test_collapse_is_told_by_tokens_so_that_two_experts_per_token_may_collapse_too():
    asked = [1000, 1000] + [
        0
    ] * 6  # every token takes experts 0 and 1: each has only half of the slots
    (finding,) = named(history(well(asked=asked, kept=asked)), "collapse")
    assert finding.evidence["experts"] == [0, 1] and finding.evidence["share_of_tokens"] == [
        1.0,
        1.0,
    ]


def test_half_of_the_tokens_are_no_collapse_where_half_is_fair():
    asked = [520, 480]
    assert diagnose(history(well(asked=asked, kept=asked, aim=[0.5] * 2, asked_next=None))) == []
    asked = [990, 700, 660, 650]  # three of four experts per token
    assert (
        named(history(well(asked=asked, kept=asked, aim=[0.75] * 4, asked_next=None)), "collapse")
        == []
    )


def test_a_fair_share_is_what_the_router_means_it_to_be():
    asked = [400] * 4 + [90] * 4  # real experts and cheap ones, 1.6 + 0.36 of 1.96 slots per token
    uneven = well(asked=asked, kept=asked, aim=[0.4] * 4 + [0.09] * 4, asked_next=None)
    assert diagnose(history(uneven)) == []
    few = [400] * 4 + [120] * 3 + [0]
    (finding,) = diagnose(history(replace(uneven, asked=few, kept=few)))
    assert (finding.name, finding.evidence["experts"]) == ("starvation", [7])
    assert finding.evidence["fair_share"] == pytest.approx(1.96 * 0.09 / 1.96)


def test_with_many_experts_starving_is_a_tenth_of_the_fair_share():
    assert (
        diagnose(history(one_gets(101, 64_000, 1, 64))) == []
    )  # 0.16 % of the tokens, but the fair share is 1.6 %
    assert diagnose(history(one_gets(99, 64_000, 1, 64))).names == ["starvation"]


def test_starving_half_of_the_experts_is_critical():
    for idle, severity in ((3, Severity.WARNING), (4, Severity.CRITICAL)):
        asked = [0] * idle + [2000 // (8 - idle)] * (8 - idle)
        (finding,) = named(history(well(asked=asked, kept=asked)), "starvation")
        assert finding.severity is severity and finding.evidence["without_any_token"] == idle


def test_a_collapse_is_not_called_an_imbalance_as_well():
    assert "load imbalance" not in diagnose(history(one_gets(1600, 1600, 1, 16))).names


def test_a_small_swing_or_one_that_dies_down_is_no_oscillation():
    assert named(swings(0.39, 4, 0), "oscillating bias") == []
    assert named(swings(0.41, 4, 0), "oscillating bias") != []
    assert named(swings(0.41, 4, 0, before=0.81), "oscillating bias") != []
    assert named(swings(0.41, 4, 0, before=0.83), "oscillating bias") == []


def test_only_a_bias_oscillates():
    log = swings(0.5, 4, 0)
    for step in log.training:
        step.layers[0].bias = None
    assert diagnose(log) == [] and "oscillating bias" in diagnose(log).unasked


def test_the_remedy_for_drops_depends_on_whether_there_was_room_for_the_mean_load():
    assert "below the mean load" in named(dropped(100, 100), "drop storm")[0].remedy
    assert "balance first" in named(dropped(500, 125), "drop storm")[0].remedy
    assert [named(dropped(kept, 125), "drop storm")[0].severity for kept in (500, 501)] == [
        Severity.CRITICAL,
        Severity.WARNING,
    ]


def test_thresholds_may_be_cold_in_evaluation_alone():
    log = lets_in(0.25, 0.25)
    log.evaluation = [
        StepRecord(step, [well(asked=[0] * 8, kept=[0] * 8, thresholds=[9.0] * 8)])
        for step in (10, 20, 30, 40)
    ]
    (finding,) = diagnose(log)
    assert finding.evidence["in"] == "evaluation" and finding.evidence["cold_experts"] == list(
        range(8)
    )
    log.evaluation[2:] = log.training[2:]
    assert diagnose(log) == []  # it is warm by the end


def test_a_router_with_thresholds_is_not_told_to_take_a_balance_loss():
    log = lets_in(0.9, 0.9, 0.9, 0.9)
    assert diagnose(log).names == ["threshold cold start"]


def test_large_logits_that_were_always_large_do_not_drift_and_a_z_loss_is_not_advised_twice():
    assert named(growing(4.1, 8.1), "logit drift") == []
    assert "Add a z-loss" in named(growing(1.0, 9.0), "logit drift")[0].remedy
    assert (
        "Raise z_loss_weight"
        in named(growing(1.0, 9.0, losses={"z_loss": 0.1}), "logit drift")[0].remedy
    )


@pytest.mark.parametrize("changes", [dict(bf16_weights=0.99), dict(route_flips=0.01)])
def test_weights_in_bf16_or_routes_that_flip_tell_a_bf16_router_too(changes):
    assert diagnose(history(well(**changes))).names == ["bf16 router"]
    (name,) = changes
    assert diagnose(history(well(**{name: changes[name] - 0.0001}))) == []


def test_a_strong_balance_loss_that_leaves_the_router_decided_is_left_alone():
    strong = well(losses={"load_balance": 1.0})
    assert diagnose(history(replace(strong, entropy=0.949 * ln(8)))) == []
    assert diagnose(history(replace(strong, entropy=0.951 * ln(8)))).names == [
        "over-strong balance loss"
    ]


def test_a_gap_is_explained_by_what_differs():
    remedy = lambda **changes: (
        named(history(WELL, eval_loss=3.0, evaluated=well(**changes)), "train-eval gap")[0].remedy
    )
    assert "Eval drops more" in remedy(kept=[200] * 8)
    assert "another number of experts" in remedy(asked=[300] * 8, kept=[300] * 8)
    assert "balances in training only" in remedy(
        asked=[500] * 4 + [0] * 4, kept=[500] * 4 + [0] * 4
    )
    assert "noise" in remedy()


@pytest.mark.parametrize(
    "changes, remedy",
    [
        (dict(), "Raise the balance coefficient"),
        (dict(losses={}), "Add a balance loss"),
        (dict(losses={}, bias=[0.1, -0.1] * 4), "Raise bias_update_rate"),
    ],
)
def test_the_remedy_for_uneven_loads_depends_on_what_the_router_has(changes, remedy):
    asked = [1000, 1000] + [0] * 6
    findings = diagnose(history(well(asked=asked, kept=asked, **changes)))
    assert findings.names == ["collapse", "starvation"] and all(
        remedy in finding.remedy for finding in findings
    )


def test_a_rank_is_a_straggler_only_if_it_is_slow_most_of_the_time():
    assert named(ranks(9.0, slow_in=2), "straggler rank") == []
    assert named(ranks(9.0, slow_in=3), "straggler rank") != []


def test_a_straggler_with_many_rows_is_told_from_a_slow_machine():
    assert "the cause is the machine" in named(ranks(2.0), "straggler rank")[0].remedy
    assert "popular" in named(ranks(2.0, slow_rows=1000.0), "straggler rank")[0].remedy


def test_rows_alone_tell_a_straggler():
    log = history(WELL, costs=StepCosts(rank_rows=[100.0, 100.0, 400.0, 100.0]))
    (finding,) = diagnose(log)
    assert finding.evidence["rank"] == 2 and finding.evidence["rows_over_mean"] == pytest.approx(
        400 / 175
    )


def test_the_remedy_for_memory_depends_on_whether_there_is_a_capacity():
    costs = StepCosts(memory_share=0.95)
    assert (
        "Lower the capacity factor"
        in named(history(WELL, costs=costs), "memory pressure")[0].remedy
    )
    assert (
        "Set a capacity factor"
        in named(history(well(capacity=None), costs=costs), "memory pressure")[0].remedy
    )


def test_rules_look_at_the_later_half():
    ill = one_gets(1000)
    assert diagnose(history(ill, ill, WELL, WELL)) == []
    assert diagnose(history(WELL, WELL, ill, ill)).names == ["collapse"]


def test_what_the_log_cannot_show_is_not_asked_and_said_so():
    bare = well(
        padding_slots=None,
        bf16_logits=None,
        bf16_weights=None,
        capacity=None,
        losses={},
        asked_next=None,
        bias=None,
        shared_gate=None,
        route_flips=None,
    )
    log = history(bare, bare, costs=StepCosts())
    log.evaluation = []
    for step in log.training:
        step.padding_share = None
    findings = diagnose(log)
    assert findings == [] and set(findings.unasked) == set(ILLNESSES) - {
        "diverged",
        "collapse",
        "starvation",
        "load imbalance",
    }
    assert "Nothing found in 2 logged steps" in str(
        findings
    ) and "The log cannot tell: drop storm, logit drift" in str(findings)
    assert findings.unasked["padding counted"] == "padding_mask"


def test_an_illness_is_added_by_a_function(monkeypatch):
    monkeypatch.setattr("moe_tools.diagnosis.illness.ILLNESSES", ILLNESSES.copy())
    monkeypatch.setattr("moe_tools.diagnosis.ILLNESSES", illness.ILLNESSES)

    @illness.illness("silence", needs="tokens", remedy="Speak.", source="none")
    def silence(layer: illness.LayerHistory):
        tokens = [record.tokens for record in layer.late]
        return illness.Symptoms({"tokens": tokens}) if max(tokens) < 10 else illness.WELL

    assert diagnose(history(WELL)) == []
    (finding,) = named(history(WELL, WELL, well(tokens=3), well(tokens=4)), "silence")
    assert finding.evidence == {"tokens": [3, 4], "steps": [30, 40]}
    assert (finding.layer, finding.remedy, finding.severity) == (0, "Speak.", Severity.WARNING)


def test_the_worst_comes_first():
    asked = [0] + [2000] + [0] * 6
    findings = diagnose(
        history(
            well(
                asked=asked,
                kept=asked,
                tokens=1000,
                shared_gate=0.0,
                losses={"load_balance": 9.0},
                entropy=ln(8),
            )
        )
    )
    assert [finding.severity for finding in findings] == sorted(
        (finding.severity for finding in findings), reverse=True
    )
    assert findings.names[0] == "collapse" and "dead shared gate" in findings.names


def test_a_report_is_short_and_tells_an_illness_of_several_layers_once():
    log = history(one_gets(626))
    for step in log.training + log.evaluation:
        step.layers = step.layers * 2
    findings = diagnose(log)
    text = str(findings)
    assert len(findings) == 2 and text.count("CRITICAL  collapse") == text.count("Do: ") == 1
    assert (
        "layer 0: experts 0; share of tokens 0.626; fair share 0.25; steps 30 to 40" in text
        and "layer 1: experts 0" in text
    )
    assert max(map(len, text.splitlines())) <= 110 and repr(findings) == text
    assert str(findings[0]) in str(Findings(findings[:1]))


def test_a_log_without_steps_or_with_layers_that_come_and_go_is_refused():
    with pytest.raises(ValueError, match="no training step"):
        diagnose(RoutingLog())
    log = history(WELL)
    log.training[1].layers = []
    with pytest.raises(ValueError, match="same number of layers"):
        diagnose(log)
