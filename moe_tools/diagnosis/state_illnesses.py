"""What a router learns outside the gradient: a bias that overshoots, thresholds that start cold."""

from math import sqrt

from .finding import Severity
from .illness import WELL, LayerHistory, Symptoms, early_half, first_and_last, illness, later_half
from .load_illnesses import crowds, starves
from .log_records import LayerRecord

OSCILLATION = -0.25  # correlation of an expert's excess load with that of the next step
# Of the mean load; a small batch scatters by less, a drift is of the other sign.
OSCILLATION_AMPLITUDE = 0.4
COLD = 0.5  # of the records in which an expert's threshold lets in next to nothing, or most tokens


@illness(
    "oscillating bias",
    needs="a router with a bias, and two steps running",
    remedy=(
        "Lower bias_update_rate: 0.001, or a tenth of what it is; or step in proportion to the "
        "error (bias_update='proportional')."
    ),
    source=(
        "Wang et al. 2024 (arXiv 2408.15664): of the rates they tried 0.001 is best, 0.01 "
        "oscillates; the two thresholds are ours"
    ),
)
def oscillating_bias(layer: LayerHistory) -> Symptoms | None:
    r"""The bias overshoots: an expert with too many tokens has too few at the next step.

    .. math:: r = \frac{\sum v_{s,e} v_{s+1,e}}{\sqrt{\sum v_{s,e}^2 \sum v_{s+1,e}^2}} \le -0.25,
        \quad v_{s,e} = \frac{\text{load}_{s,e}}{\text{mean load}_s} - 1

    over the logged steps s, with a root mean square of v of at least 0.4, and of at least half of
    what it was in the log's earlier half. A swing that takes more than two steps each way is not
    seen so.
    """
    pairs = _pairs(layer.late)
    if layer.late[-1].bias is None or not pairs:
        return None
    now, following = sum(v * v for v, _ in pairs), sum(w * w for _, w in pairs)
    amplitude, before = sqrt((now + following) / (2 * len(pairs))), _pairs(layer.early)
    correlation = sum(v * w for v, w in pairs) / max(sqrt(now * following), 1e-12)
    amplitude_before = (
        sqrt(sum(v * v + w * w for v, w in before) / (2 * len(before))) if before else 0.0
    )
    if correlation > OSCILLATION or amplitude < max(OSCILLATION_AMPLITUDE, amplitude_before / 2):
        return WELL
    return Symptoms(
        {
            "correlation_with_next_step": correlation,
            "amplitude": amplitude,
            "amplitude_before": amplitude_before,
        }
    )


@illness(
    "threshold cold start",
    needs="a router with thresholds",
    severity=Severity.CRITICAL,
    remedy=(
        "Warm up as expert choice (warmup_steps: 4 / (1 - ema_decay)), or calibrate(batches) on "
        "data first; call router.update once per optimiser step. In a short run use a lower "
        "ema_decay."
    ),
    source="Sun et al. 2026 (arXiv 2603.11535), appendix E.1; the measures are ours",
)
def threshold_cold_start(layer: LayerHistory) -> Symptoms | None:
    """In half of the records a threshold lets in next to nothing, or most tokens.

    Next to nothing is starvation's measure and most is collapse's, against the share the router
    promises. Each record counts for itself, since a cold threshold may overshoot both ways; less
    than two say nothing. Asked of either half of training, and of the later half of evaluation,
    which may be cold when training is not (training warms up as expert choice); the worst is told.
    """
    windows = {
        "training, first half": early_half(layer.log.training),
        "training, second half": later_half(layer.log.training),
        "evaluation": later_half(layer.log.evaluation),
    }
    found = []
    for name, steps in windows.items():
        records = [r for r in layer.of(steps) if r.thresholds is not None and r.tokens]
        if len(records) < 2:
            continue
        for expert, promised in enumerate(records[-1].aim):
            shares = [r.asked[expert] / r.tokens for r in records]
            nothing = sum(starves(share, promised) for share in shares) / len(shares)
            most = sum(crowds(share, promised) for share in shares) / len(shares)
            evidence = {
                "worst_expert": expert,
                "lets_in_next_to_nothing": nothing,
                "lets_in_most": most,
                "promised_share": promised,
                "in": name,
                "steps": first_and_last(steps),
            }
            found.append((nothing + most, evidence))
    if not found:
        return None
    cold = [(share, evidence) for share, evidence in found if share >= COLD]
    if not cold:
        return WELL
    experts = sorted({evidence["worst_expert"] for _, evidence in cold})
    return Symptoms({"cold_experts": experts} | max(cold, key=lambda entry: entry[0])[1])


def _pairs(records: list[LayerRecord]) -> list[tuple[float, float]]:
    """(v_s, v_{s+1}) of every expert and every record whose next step is known."""
    return [
        pair
        for r in records
        if r.asked_next is not None and sum(r.asked) and sum(r.asked_next)
        for pair in zip(_excess(r.asked), _excess(r.asked_next))
    ]


def _excess(counts_E: list[int]) -> list[float]:
    mean = sum(counts_E) / len(counts_E)
    return [count / mean - 1 for count in counts_E]
