"""What the router computes: the size of its logits, their precision, and its losses."""

from math import log as ln
from statistics import fmean

from .illness import WELL, LayerHistory, Symptoms, first_and_last, illness, later_half
from .load_illnesses import BALANCE_LOSSES

# From 8 on neighbours in bfloat16 are 1/16 apart: rounding changes e^h by up to 3 %.
LARGE_LOGIT = 8.0
DRIFT = 2.0  # times what it was at first
BF16_SHARE = 0.99  # of the values that bfloat16 holds exactly; of float32 results one in 2^16 is
FLIPS = 0.01  # of the tokens
STRONG_BALANCE = 0.2  # weighted balance loss of a layer: at balance ten times the usual 0.02
UNDECIDED = 0.95  # of ln E


@illness(
    "logit drift",
    needs="four logged steps",
    source=(
        "Zoph et al. 2022 (arXiv 2202.08906), eq. 5, coefficient 0.001; the threshold is "
        "bfloat16's resolution, and ours"
    ),
)
def logit_drift(layer: LayerHistory) -> Symptoms | None:
    r"""Logits drift: the largest is above 8 in the mean over tokens, and twice the first.

    Told by max |h|, since logsumexp of E equal logits is already ln E; both are in the evidence.
    """
    steps = layer.log.training
    if len(steps) < 4:
        return None
    first, largest = layer.of(steps)[0], fmean(r.largest_logit for r in layer.late)
    if largest <= LARGE_LOGIT or largest <= DRIFT * first.largest_logit:
        return WELL
    mend = (
        "Raise z_loss_weight"
        if "z_loss" in layer.late[-1].losses
        else "Add a z-loss (z_loss_weight=0.001)"
    )
    return Symptoms(
        {
            "largest_logit": largest,
            "at_first": first.largest_logit,
            "logsumexp": fmean(r.logsumexp for r in layer.late),
            "logsumexp_at_first": first.logsumexp,
            "steps": first_and_last(steps),
        },
        f"{mend}, and look at the router's learning rate.",
    )


@illness(
    "bf16 router",
    needs="a router with logits of its own",
    remedy=(
        "Compute logits, scores and weights in float32 at least, with autocast off around them: it "
        "is little work."
    ),
    source=(
        "Fedus et al. 2021 (selective precision); sglang #33764: 5.27 % of the tokens took other "
        "experts. The thresholds are ours"
    ),
)
def bf16_router(layer: LayerHistory) -> Symptoms | None:
    """Logits or weights were computed in bfloat16, or routes were seen to flip."""
    measured = {
        "logits_held_by_bf16": [r.bf16_logits for r in layer.late],
        "weights_held_by_bf16": [r.bf16_weights for r in layer.late],
        "route_flips": [r.route_flips for r in layer.late],
    }
    evidence = {
        name: fmean(v for v in values if v is not None)
        for name, values in measured.items()
        if set(values) != {None}
    }
    if not evidence:
        return None
    held = max(evidence.get("logits_held_by_bf16", 0), evidence.get("weights_held_by_bf16", 0))
    ill = held >= BF16_SHARE or evidence.get("route_flips", 0) >= FLIPS
    return Symptoms(evidence) if ill else WELL


@illness(
    "over-strong balance loss",
    needs="a balance loss",
    remedy=(
        "Lower the coefficient to 0.01 to 0.02. If the load then tips, balance over the global "
        "batch, or use a selection bias: neither forbids experts to differ."
    ),
    source=(
        "Rule of thumb (coefficient 0.01 to 0.02; the threshold is ten times that); Qiu et al. "
        "2025 (arXiv 2501.11873) on balance that forbids specialisation"
    ),
)
def over_strong_balance_loss(layer: LayerHistory) -> Symptoms | None:
    """The balance loss is over 0.2 a layer, and the scores are near uniform."""
    records = layer.late
    names = [name for name in BALANCE_LOSSES if name in records[-1].losses]
    if not names:
        return None
    balance = fmean(sum(r.losses.get(name, 0.0) for name in names) for r in records)
    entropy = fmean(r.entropy for r in records) / ln(max(len(records[-1].asked), 2))
    if balance <= STRONG_BALANCE or entropy <= UNDECIDED:
        return WELL
    evidence = {"balance_loss": balance, "entropy_over_ln_E": entropy}
    lm_losses = [s.loss for s in later_half(layer.log.training) if s.loss is not None]
    if lm_losses:
        evidence["balance_loss_over_loss"] = balance / fmean(lm_losses)
    return Symptoms(evidence)
