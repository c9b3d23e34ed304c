"""What a router learns outside the gradient: a bias that overshoots, thresholds that start cold."""

from math import sqrt

from ._window import by_layer, late, late_by_layer, steps
from .finding import Finding, Severity
from .load_illnesses import crowds, starves
from .log_records import LayerRecord
from .routing_log import RoutingLog

OSCILLATION = -0.25  # correlation of an expert's excess load with that of the next step
OSCILLATION_AMPLITUDE = (
    0.4  # of the mean load; a small batch scatters by less, a drift is of the other sign
)
COLD = 0.5  # of the records in which an expert's threshold lets in next to nothing, or most tokens


def oscillating_bias(log: RoutingLog) -> list[Finding] | None:
    r"""The bias overshoots: who has too many tokens now has too few at the next step, and the swing does not die down.

    .. math:: r = \frac{\sum v_{s,e} v_{s+1,e}}{\sqrt{\sum v_{s,e}^2 \sum v_{s+1,e}^2}} \le -0.25, \quad
              v_{s,e} = \frac{\text{load}_{s,e}}{\text{mean load}_s} - 1

    over the logged steps s, with a root mean square of v of at least 0.4, and of at least half of what it was in the log's earlier half.
    A swing that takes more than two steps each way is not seen so.
    """
    asked, found = False, []
    early = by_layer(log.training[: len(log.training) // 2])
    for index, records in enumerate(late_by_layer(log)):
        pairs = _pairs(records)
        if records[-1].bias is None or not pairs:
            continue
        asked = True
        now, following = sum(v * v for v, _ in pairs), sum(w * w for _, w in pairs)
        amplitude = sqrt((now + following) / (2 * len(pairs)))
        correlation = sum(v * w for v, w in pairs) / max(sqrt(now * following), 1e-12)
        before = _pairs(early[index]) if early else []
        amplitude_before = (
            sqrt(sum(v * v + w * w for v, w in before) / (2 * len(before))) if before else 0.0
        )
        if correlation <= OSCILLATION and amplitude >= max(
            OSCILLATION_AMPLITUDE, amplitude_before / 2
        ):
            found.append(
                Finding(
                    "oscillating bias",
                    index,
                    {
                        "correlation_with_next_step": correlation,
                        "amplitude": amplitude,
                        "amplitude_before": amplitude_before,
                        "steps": steps(late(log.training)),
                    },
                    Severity.WARNING,
                    "Lower bias_update_rate: 0.001, or a tenth of what it is; or step in proportion to the error (bias_update='proportional').",
                    "Wang et al. 2024 (arXiv 2408.15664): of the rates they tried 0.001 is best, 0.01 oscillates; the two thresholds are ours",
                )
            )
    return found if asked else None


def threshold_cold_start(log: RoutingLog) -> list[Finding] | None:
    """Thresholds that do not fit the logits they meet: in half of the records an expert lets in next to nothing, or most tokens.

    Next to nothing is starvation's measure and most is collapse's, against the share the router promises (its expansion over E). Each
    record counts for itself, since a cold threshold may overshoot both ways; less than two records say nothing. Asked of the earlier half
    of training, of the later half, and of the later half of evaluation, which may be cold when training is not (training warms up as
    expert choice); the worst is told.
    """
    asked, found = False, []
    windows = {
        "training, first half": log.training[: len(log.training) // 2],
        "training, second half": late(log.training),
        "evaluation": late(log.evaluation),
    }
    for index in range(len(log.training[0].layers)):
        worst = []
        for name, window in windows.items():
            records = [
                step.layers[index]
                for step in window
                if step.layers[index].thresholds is not None and step.layers[index].tokens
            ]
            if len(records) < 2:
                continue
            asked = True
            for expert, promised in enumerate(records[-1].aim):
                shares = [r.asked[expert] / r.tokens for r in records]
                nothing = sum(starves(share, promised) for share in shares) / len(shares)
                most = sum(crowds(share, promised) for share in shares) / len(shares)
                worst.append((nothing + most, nothing, most, expert, promised, name, steps(window)))
        cold = [entry for entry in worst if entry[0] >= COLD]
        if cold:
            _, nothing, most, expert, promised, name, when = max(cold, key=lambda entry: entry[0])
            found.append(
                Finding(
                    "threshold cold start",
                    index,
                    {
                        "cold_experts": sorted({entry[3] for entry in cold}),
                        "worst_expert": expert,
                        "lets_in_next_to_nothing": nothing,
                        "lets_in_most": most,
                        "promised_share": promised,
                        "in": name,
                        "steps": when,
                    },
                    Severity.CRITICAL,
                    "Warm up as expert choice (warmup_steps: 4 / (1 - ema_decay)), or calibrate(batches) on data first; call router.update "
                    "once per optimiser step. In a short run use a lower ema_decay.",
                    "Sun et al. 2026 (arXiv 2603.11535), appendix E.1; the measures are ours",
                )
            )
    return found if asked else None


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
