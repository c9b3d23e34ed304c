"""Diagnosis: from a ``RoutingLog`` to what is wrong with a run, how one can tell, and what to do about it.

    finding   Finding · Findings · Severity          what a diagnosis says
    load      who gets how many tokens               collapse · starvation · load imbalance · drop storm
    state     what it learns outside the gradient    oscillating bias · threshold cold start
    router    what the router computes               logit drift · bf16 router · over-strong balance loss
    run       what stands around it                  padding counted · dead shared gate · train-eval gap · straggler rank ·
                                                     slow all-to-all · memory pressure

Each rule is a function of a log; its threshold is a constant beside it. A rule returns the findings, none where all is well, and None where
the log holds nothing to ask. Rules look at the later half of the log, where a run has settled, unless they say otherwise.
"""

from . import load_illnesses as load
from . import router_illnesses as router
from . import run_illnesses as run
from . import state_illnesses as state
from .finding import Finding, Findings, Severity
from .routing_log import RoutingLog

# Name -> the rule, and what the log must hold for it. The order is that of equally severe findings.
ILLNESSES = {
    "collapse": (load.collapse, "a logged step"),
    "starvation": (load.starvation, "a logged step"),
    "load imbalance": (load.imbalance, "a logged step"),
    "oscillating bias": (state.oscillating_bias, "a router with a bias, and two steps running"),
    "drop storm": (load.drop_storm, "a capacity"),
    "threshold cold start": (state.threshold_cold_start, "a router with thresholds"),
    "logit drift": (router.logit_drift, "four logged steps"),
    "bf16 router": (router.bf16_router, "a router with logits of its own"),
    "over-strong balance loss": (router.over_strong_balance_loss, "a balance loss"),
    "padding counted": (run.padding_counted, "padding_mask"),
    "dead shared gate": (run.dead_shared_gate, "a gated shared expert"),
    "train-eval gap": (run.train_eval_gap, "add_evaluation and losses"),
    "straggler rank": (run.straggler_rank, "rank_seconds or rank_rows"),
    "slow all-to-all": (run.slow_all_to_all, "all_to_all_seconds and step_seconds"),
    "memory pressure": (run.memory_pressure, "memory_share"),
}

__all__ = ["ILLNESSES", "Finding", "Findings", "Severity", "diagnose"]


def diagnose(history: RoutingLog) -> Findings:
    """Ask every rule; the worst finding comes first.

    Args:
        history: a ``RoutingLog``.

    Returns:
        ``Findings``, a list; print it. An empty one says that nothing was found, not that nothing is wrong: its ``unasked`` names
        the illnesses for which the log held no evidence either way.

    Raises:
        ValueError: no training step was logged, or their numbers of layers differ.
    """
    steps = history.training
    if not steps:
        raise ValueError("history holds no training step: call add(step, routings) during training")
    if len({len(step.layers) for step in steps + history.evaluation}) > 1:
        raise ValueError("the logged steps must all have the same number of layers")
    found, unasked = [], {}
    for name, (rule, needs) in ILLNESSES.items():
        answer = rule(history)
        if answer is None:
            unasked[name] = needs
        else:
            found += answer
    found.sort(
        key=lambda finding: -finding.severity
    )  # stable: within a severity the order of ILLNESSES, then of layers
    examined = f"{len(steps)} logged steps ({steps[0].step} to {steps[-1].step}), {len(steps[0].layers)} MoE layers"
    return Findings(found, examined=examined, unasked=unasked)
