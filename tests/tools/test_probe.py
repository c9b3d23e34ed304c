"""The probe finds the channels there are, and none where there is none."""

import pytest
import torch

from moe_core import CapacityRule, MixtureOfExperts, TopKRouter
from moe_core.losses import load_balance
from moe_core.routers.expert_choice import ExpertChoiceRouter
from moe_core.routers.expert_threshold import ExpertThresholdRouter
from moe_tools.probe import Dependence, Effect, probe

from ..core.helpers import config, randn, seeded

X = randn(3, 12, 8)
ONE = X[:1]
QUESTIONS = ("later_tokens", "earlier_tokens", "other_sequences", "n_later_tokens", "n_sequences")

X_OF_NAN = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(9))


def answers(module, x) -> dict[str, bool | None]:
    """Question -> does the output depend on it; the output and not only the wording must be exactly the same where it does not."""
    found = probe(module, x)
    effects = {name: getattr(found, name) for name in QUESTIONS}
    return {name: effect and effect.depends for name, effect in effects.items()}


def topk(**rule):
    return seeded(TopKRouter, 8, 4, 2, capacity_factor=CapacityRule(**rule)).eval()


def test_a_dropless_token_depends_on_nothing_else_not_even_in_the_last_bit():
    nothing = Effect(max_change=0.0, rerouted=0.0, depends=False)
    found = probe(
        topk(), X, tolerance=0
    )  # of the same shapes, row by row: exact on every processor
    assert found.later_tokens == found.earlier_tokens == found.other_sequences == nothing
    found = probe(topk(), X)  # of other shapes too: but for rounding
    assert found.causal and found.batch_invariant and found.streams


@pytest.mark.parametrize(
    ("policy", "later"), [("position", False), ("slot_position", True), ("score", True)]
)
def test_with_one_sequence_only_dropping_by_position_hides_the_later_tokens(policy, later):
    found = probe(topk(factor=1.0, drop_policy=policy), ONE)
    assert found.later_tokens.depends == later and found.causal == (not later)
    assert found.earlier_tokens.depends and found.other_sequences is None
    if not later:
        assert found.later_tokens.max_change == 0 == found.later_tokens.rerouted


@pytest.mark.parametrize("policy", ["position", "slot_position", "score"])
def test_dropping_in_a_batch_depends_on_the_other_sequences(policy):
    found = probe(topk(factor=1.0, drop_policy=policy), X)
    assert found.other_sequences.depends and found.n_sequences.depends and not found.batch_invariant
    assert found.other_sequences.max_change > 0.1 and 0 < found.other_sequences.rerouted < 1


def test_places_counted_per_sequence_make_position_dropping_batch_invariant():
    assert answers(topk(factor=1.0, scope="sequence"), X) == {
        "later_tokens": False,
        "earlier_tokens": True,
        "other_sequences": False,
        "n_later_tokens": True,  # a shorter sequence has fewer places
        "n_sequences": False,
    }


def test_a_fixed_number_of_places_by_position_streams():
    found = probe(topk(expert_capacity=3, scope="sequence"), X)
    assert found.streams and found.causal and found.batch_invariant and found.earlier_tokens.depends


def test_a_generous_capacity_hides_the_channel_from_the_probe():
    assert answers(topk(factor=4.0), X) == dict.fromkeys(
        QUESTIONS, False
    )  # "no" means: not with these tokens


def test_expert_choice_sees_the_future_and_its_threshold_does_not():
    choice = seeded(ExpertChoiceRouter, 8, 4, 1.0).eval()
    assert answers(choice, X) == dict.fromkeys(QUESTIONS, True)
    alone = probe(seeded(ExpertChoiceRouter, 8, 4, 1.0, scope="sequence").eval(), X)
    assert alone.batch_invariant and not alone.causal
    threshold = seeded(ExpertThresholdRouter, 8, 4, 1.0)
    threshold.calibrate([randn(3, 12, 8, seed=1)])  # not of X: no token of X lies on a threshold
    found = probe(threshold.eval(), X)
    assert found.causal and found.batch_invariant and found.streams


def test_a_layer_answers_as_its_router_does():
    dropless = probe(seeded(MixtureOfExperts, config()).eval(), X)
    assert dropless.causal and dropless.batch_invariant and dropless.streams
    assert (
        max(getattr(dropless, name).max_change for name in QUESTIONS) < 1e-5
    )  # matmuls of other shapes round differently
    dropping = seeded(
        MixtureOfExperts, config(capacity_factor=CapacityRule(factor=0.5, drop_policy="score"))
    ).eval()
    found = probe(dropping, X)
    assert not found.causal and not found.batch_invariant and found.later_tokens.max_change > 1e-3


def test_a_plain_function_and_token_ids_can_be_probed():
    ids = torch.arange(24).view(2, 12) % 7
    causal = probe(lambda x: x.cumsum(1).unsqueeze(-1), ids)
    assert (
        causal.streams
        and causal.batch_invariant
        and causal.earlier_tokens.depends
        and causal.later_tokens.rerouted == 0
    )
    mean_over_batch = probe(lambda x: (x - x.double().mean(0)).unsqueeze(-1), ids)
    assert not mean_over_batch.batch_invariant and mean_over_batch.causal


def test_noise_in_training_is_not_taken_for_dependence_and_the_generator_is_left_alone():
    router = seeded(TopKRouter, 8, 4, 2, jitter_noise=0.5).train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = probe(router, X)
    assert not found.later_tokens.depends and not found.other_sequences.depends
    assert torch.equal(torch.get_rng_state(), state) and router.training


def test_another_expert_is_a_dependence_however_little_the_output_moves():
    found = probe(topk(factor=1.0, drop_policy="score"), ONE, tolerance=100)
    assert found.later_tokens.depends and found.later_tokens.max_change < 100


def test_the_answer_does_not_depend_on_the_state_of_the_generator():
    router = topk(factor=1.0, drop_policy="random").train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = probe(router, X)
        torch.manual_seed(2)
        assert probe(router, X) == first
    assert probe(router, X, seed=1) != first


def test_the_module_and_the_input_are_left_as_they_were():
    router, x = topk(factor=0.5), X.clone()
    before = {name: value.clone() for name, value in router.state_dict().items()}
    probe(router, x)
    assert torch.equal(x, X) and all(
        torch.equal(before[name], value) for name, value in router.state_dict().items()
    )
    assert router.weight.grad is None and load_balance(router(x)).requires_grad


def test_what_the_input_is_too_small_for_is_not_answered():
    assert answers(topk(), X[:1, :1]) == dict.fromkeys(QUESTIONS)
    assert answers(topk(), X[:, :1]) == dict.fromkeys(QUESTIONS) | {
        "other_sequences": False,
        "n_sequences": False,
    }


@pytest.mark.parametrize(
    ("question", "lost"),
    [
        ("later_tokens", {"causal", "streams"}),
        ("earlier_tokens", set()),
        ("other_sequences", {"batch_invariant"}),
        ("n_later_tokens", {"streams"}),
        ("n_sequences", {"batch_invariant"}),
    ],
)
def test_each_dependence_costs_its_property(question, lost):
    yes, no = Effect(0.5, 0.25, True), Effect(0.0, 0.0, False)
    found = Dependence(**{name: yes if name == question else no for name in QUESTIONS})
    assert {
        name for name in ("causal", "batch_invariant", "streams") if not getattr(found, name)
    } == lost


def test_the_answer_reads_well():
    yes, no = Effect(0.5, 0.25, True), Effect(0.0, 0.0, False)
    lines = repr(Dependence(no, yes, None, no, yes)).splitlines()
    assert lines[1].split() == ["later", "tokens", "no", "0", "0.0%"]
    assert lines[2].split() == ["earlier", "tokens", "yes", "0.5", "25.0%"]
    assert lines[3].split()[:4] == ["other", "sequences", "not", "asked:"]
    assert lines[4].startswith("  number of later tokens") and lines[5].startswith(
        "  number of sequences"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": 0}, "trials=0 must be a whole number, at least 1"),
        ({"tolerance": -1}, "tolerance=-1 must be at least 0"),
        ({"x": X[0, 0]}, r"x has shape \(8,\), must be \(B, N\) or \(B, N, D\) and not empty"),
        ({"x": X[:0]}, r"x has shape \(0, 12, 8\)"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        probe(**{"module": topk(), "x": X, **arguments})


def test_a_nan_that_later_tokens_cause_is_a_dependence():
    def poisoned(x):
        return x.masked_fill(x[:, -1:, :1].sum() != X_OF_NAN[:, -1:, :1].sum(), torch.nan)

    found = probe(poisoned, X_OF_NAN)
    assert not found.causal and found.later_tokens.max_change == torch.inf
