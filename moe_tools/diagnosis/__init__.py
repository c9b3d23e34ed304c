"""Diagnosis: what is wrong with a run, how one can tell, and what to do about it.

    routing_log         what a run writes down
    log_records         one step of it, in plain numbers
    illness             how a rule becomes an illness
    *_illnesses         the rules: of the load, of what a router learns outside the gradient
                        (state), of what it computes (router), of what stands around it (run)
    finding             what a diagnosis says

To add an illness is to write a function with ``@illness`` in one of the four. Rules look at the
later half of the log, where a run has settled, unless they say otherwise.
"""

from . import load_illnesses, router_illnesses, run_illnesses, state_illnesses
from .finding import Finding, Findings, Severity
from .illness import ILLNESSES
from .log_records import StepCosts
from .routing_log import RoutingLog

__all__ = ["ILLNESSES", "Finding", "Findings", "RoutingLog", "Severity", "StepCosts", "diagnose"]


def diagnose(history: RoutingLog) -> Findings:
    """Ask every rule; the worst finding comes first.

    Args:
        history: a ``RoutingLog``.

    Returns:
        ``Findings``, a list; print it. An empty one says that nothing was found, not that nothing
        is wrong: its ``unasked`` names the illnesses for which the log held no evidence either way.

    Raises:
        ValueError: no training step was logged, or their numbers of layers differ.
    """
    steps = history.training
    if not steps:
        raise ValueError("history holds no training step: call add(step, routings) during training")
    if len({len(step.layers) for step in steps + history.evaluation}) > 1:
        raise ValueError("the logged steps must all have the same number of layers")
    found, unasked = ILLNESSES["diverged"].ask(history) or [], {}
    # What comes after a NaN says nothing of what led there.
    sound = run_illnesses.while_finite(history)
    for illness in ILLNESSES.values():
        answer = illness.ask(sound) if sound.training else None
        if answer is None:
            unasked[illness.name] = illness.needs
        else:
            found += answer
    found.sort(key=lambda finding: -finding.severity)  # stable: then by illness, then by layer
    examined = (
        f"{len(steps)} logged steps ({steps[0].step} to {steps[-1].step}), "
        f"{len(steps[0].layers)} MoE layers"
    )
    return Findings(found, examined=examined, unasked=unasked)
