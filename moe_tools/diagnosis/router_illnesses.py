"""What the router computes: how large its logits are, in which precision, and what it learns from."""

from math import log as ln
from statistics import fmean

from ._window import late, late_by_layer, steps
from .finding import Finding, Severity
from .load_illnesses import BALANCE_LOSSES
from .routing_log import RoutingLog

LARGE_LOGIT = (
    8.0  # from here on neighbours in bfloat16 are 1/16 apart: rounding changes e^h by up to 3 %
)
DRIFT = 2.0  # times what it was at first
BF16_SHARE = 0.99  # of the values that bfloat16 holds exactly; float32 results do so once in 2^16
FLIPS = 0.01  # of the tokens
STRONG_BALANCE = 0.2  # weighted balance loss of a layer; at balance that is its coefficient: ten times the usual 0.02
UNDECIDED = 0.95  # of ln E


def logit_drift(log: RoutingLog) -> list[Finding] | None:
    r"""Logits grow without bound: the largest is above 8 in the mean over tokens, and twice what it was at the log's start.

    Told by max |h|, since logsumexp of E equal logits is already ln E; both are in the evidence.
    """
    if len(log.training) < 4:
        return None
    found = []
    for index, records in enumerate(late_by_layer(log)):
        first, largest = log.training[0].layers[index], fmean(r.largest_logit for r in records)
        if largest > LARGE_LOGIT and largest > DRIFT * first.largest_logit:
            has_z_loss = "z_loss" in records[-1].losses
            found.append(
                Finding(
                    "logit drift",
                    index,
                    {
                        "largest_logit": largest,
                        "at_first": first.largest_logit,
                        "logsumexp": fmean(r.logsumexp for r in records),
                        "logsumexp_at_first": first.logsumexp,
                        "steps": [log.training[0].step, log.training[-1].step],
                    },
                    Severity.WARNING,
                    "Raise z_loss_weight, and look at the router's learning rate."
                    if has_z_loss
                    else "Add a z-loss (z_loss_weight=0.001), and look at the router's learning rate.",
                    "Zoph et al. 2022 (arXiv 2202.08906), eq. 5, coefficient 0.001; the threshold is bfloat16's resolution, and ours",
                )
            )
    return found


def bf16_router(log: RoutingLog) -> list[Finding] | None:
    """Logits or weights were computed in bfloat16, whatever dtype they have now; or the caller measured routes that flip."""
    asked, found = False, []
    for index, records in enumerate(late_by_layer(log)):
        measured = {
            "logits_held_by_bf16": [r.bf16_logits for r in records],
            "weights_held_by_bf16": [r.bf16_weights for r in records],
            "route_flips": [r.route_flips for r in records],
        }
        evidence = {
            name: fmean(v for v in values if v is not None)
            for name, values in measured.items()
            if set(values) != {None}
        }
        asked = asked or bool(evidence)
        held = max(evidence.get("logits_held_by_bf16", 0), evidence.get("weights_held_by_bf16", 0))
        if held >= BF16_SHARE or evidence.get("route_flips", 0) >= FLIPS:
            found.append(
                Finding(
                    "bf16 router",
                    index,
                    evidence | {"steps": steps(late(log.training))},
                    Severity.WARNING,
                    "Compute logits, scores and weights in float32 at least, with autocast off around them: it is little work.",
                    "Fedus et al. 2021 (selective precision); sglang #33764: 5.27 % of the tokens took other experts. "
                    "The thresholds are ours",
                )
            )
    return found if asked else None


def over_strong_balance_loss(log: RoutingLog) -> list[Finding] | None:
    """The balance loss is all the router listens to: it is worth over 0.2 a layer, and the scores stay near uniform."""
    asked, found = False, []
    lm_losses = [step.loss for step in late(log.training) if step.loss is not None]
    for index, records in enumerate(late_by_layer(log)):
        names = [name for name in BALANCE_LOSSES if name in records[-1].losses]
        if not names:
            continue
        asked = True
        balance = fmean(sum(r.losses.get(name, 0.0) for name in names) for r in records)
        entropy = fmean(r.entropy for r in records) / ln(max(len(records[-1].asked), 2))
        if balance > STRONG_BALANCE and entropy > UNDECIDED:
            evidence = {"balance_loss": balance, "entropy_over_ln_E": entropy}
            if lm_losses:
                evidence["balance_loss_over_loss"] = balance / fmean(lm_losses)
            found.append(
                Finding(
                    "over-strong balance loss",
                    index,
                    evidence | {"steps": steps(late(log.training))},
                    Severity.WARNING,
                    "Lower the coefficient to 0.01 to 0.02. If the load then tips, balance over the global batch, or use a selection bias: "
                    "neither forbids experts to differ.",
                    "Rule of thumb (coefficient 0.01 to 0.02; the threshold is ten times that); Qiu et al. 2025 (arXiv 2501.11873) on balance "
                    "that forbids specialisation",
                )
            )
    return found if asked else None
