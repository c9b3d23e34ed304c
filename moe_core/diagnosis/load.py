"""Who gets how many tokens: collapse, starvation, imbalance, oscillation, drops, and thresholds that start cold.

A load is told as the share of the tokens that ask for an expert, before capacity. With K experts per token the shares sum to K, and the
fair share is K/E (where a router means real and cheap experts to differ, it says so: ``LayerRecord.aim``). Shares of the *slots* would
not do: with K = 2 an expert that every token visits has half of them.
"""

from dataclasses import dataclass
from math import sqrt

from ..routing_log import LayerRecord, RoutingLog
from ._window import by_layer, late, late_by_layer, steps
from .finding import Finding, Severity

COLLAPSE = 0.5  # of the way from the fair share of the tokens to all tokens; for K much below E: an expert has over 50 % of them
STARVED = 0.01  # of the tokens, or
STARVED_OF_FAIR = 0.1  # of the fair share, where that is less: with 256 experts and K = 1 the fair share itself is 0.4 %
IMBALANCE = 3.0  # busiest expert over its fair share
OSCILLATION = -0.25  # correlation of an expert's excess load with that of the next step
OSCILLATION_AMPLITUDE = 0.4  # of the mean load; a small batch scatters by less, a drift is of the other sign
DROP_STORM = 0.25  # of the slots
COLD = 0.5  # of the records in which an expert's threshold lets in next to nothing, or most tokens

_THUMB = "Rule of thumb"


@dataclass(frozen=True)
class Load:
    """The pooled load of some records: share_E of the tokens that asked for each expert, fair_E the share it should have."""

    share_E: list[float]
    fair_E: list[float]


def pooled(records: list[LayerRecord]) -> Load | None:
    """The load of these records together; None when no token asked for any expert, or thresholds decide the load."""
    tokens, asked_E = sum(r.tokens for r in records), [sum(counts) for counts in zip(*(r.asked for r in records))]
    if sum(asked_E) == 0 or records[-1].thresholds is not None:
        return None
    share_E, aim_E = [asked / tokens for asked in asked_E], records[-1].aim
    return Load(share_E, [sum(share_E) * aim / sum(aim_E) for aim in aim_E])


def collapse(log: RoutingLog) -> list[Finding]:
    r"""An expert gets most of the tokens.

    .. math:: \frac{t_e - K/E}{1 - K/E} > \frac{1}{2}, \quad t_e = \text{share of the tokens that ask for } e

    0 at the fair share, 1 when every token asks for it. Nothing is asked of layers in which a token takes half of the experts anyway,
    nor of routers with thresholds, which ``threshold_cold_start`` speaks of: there the cause is another.
    """
    return [
        Finding(
            "collapse", index,
            {"experts": experts, "share_of_tokens": [load.share_E[e] for e in experts], "fair_share": load.fair_E[experts[0]],
             "steps": steps(late(log.training))},
            Severity.CRITICAL,
            "Give the router a balance loss (0.01 to 0.02), or raise its coefficient 2 to 5 times; or use a selection bias (loss_free). "
            "A collapsed router seldom recovers by itself: go back to a checkpoint from before, or draw the router anew.",
            f"{_THUMB} (over 50 % of the tokens on one expert), measured from the fair share on; Shazeer et al. 2017, section 4",
        )
        for index, records in enumerate(late_by_layer(log))
        if (load := pooled(records)) and (experts := _collapsed(load))
    ]


def starvation(log: RoutingLog) -> list[Finding]:
    """Experts that get less than 1 % of the tokens, or less than a tenth of their fair share where that is smaller still."""
    found = []
    for index, records in enumerate(late_by_layer(log)):
        load = pooled(records)
        if load is None:
            continue
        starved = [e for e, (share, fair) in enumerate(zip(load.share_E, load.fair_E)) if _starves(share, fair)]
        if starved:
            many = 2 * len(starved) >= len(load.share_E)
            found.append(Finding(
                "starvation", index,
                {"experts": starved, "share_of_tokens": [load.share_E[e] for e in starved], "fair_share": load.fair_E[starved[0]],
                 "without_any_token": sum(load.share_E[e] == 0 for e in starved), "steps": steps(late(log.training))},
                Severity.CRITICAL if many else Severity.WARNING,
                "Raise the balance coefficient 2 to 5 times, or let tokens explore: jitter of 0.01, noisy top-k, or a selection bias.",
                f"{_THUMB} (an expert under 1 % of the tokens); jitter as in Fedus et al. 2021, section 2.2",
            ))
    return found


def imbalance(log: RoutingLog) -> list[Finding]:
    """The busiest expert gets over 3 times its fair share, without having collapsed. That is MaxVio > 2."""
    found = []
    for index, records in enumerate(late_by_layer(log)):
        load = pooled(records)
        if load is None or _collapsed(load):
            continue
        ratio, busiest = max((share / fair, e) for e, (share, fair) in enumerate(zip(load.share_E, load.fair_E)))
        if ratio > IMBALANCE:
            found.append(Finding(
                "load imbalance", index,
                {"expert": busiest, "share_of_tokens": load.share_E[busiest], "fair_share": load.fair_E[busiest], "ratio": ratio,
                 "steps": steps(late(log.training))},
                Severity.WARNING,
                "Raise the balance coefficient 2 to 5 times; with small batches, balance over the global batch.",
                f"{_THUMB} (load varies by more than 3 times); Qiu et al. 2025 for the global batch",
            ))
    return found


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
        amplitude_before = sqrt(sum(v * v + w * w for v, w in before) / (2 * len(before))) if before else 0.0
        if correlation <= OSCILLATION and amplitude >= max(OSCILLATION_AMPLITUDE, amplitude_before / 2):
            found.append(Finding(
                "oscillating bias", index,
                {"correlation_with_next_step": correlation, "amplitude": amplitude, "amplitude_before": amplitude_before,
                 "steps": steps(late(log.training))},
                Severity.WARNING,
                "Lower bias_update_rate: 0.001, or a tenth of what it is; or step in proportion to the error (bias_update='proportional').",
                "Wang et al. 2024 (arXiv 2408.15664): of the rates they tried 0.001 is best, 0.01 oscillates; the two thresholds are ours",
            ))
    return found if asked else None


def drop_storm(log: RoutingLog) -> list[Finding] | None:
    """A quarter of the slots or more find no room."""
    asked, found = False, []
    for index, records in enumerate(late_by_layer(log)):
        wanted = sum(sum(r.asked) for r in records)
        if records[-1].capacity is None or wanted == 0:
            continue
        asked = True
        dropped = 1 - sum(sum(r.kept) for r in records) / wanted
        if dropped >= DROP_STORM:
            mean_load = wanted / len(records) / len(records[-1].asked)
            small = records[-1].capacity < mean_load
            found.append(Finding(
                "drop storm", index,
                {"dropped": dropped, "capacity": records[-1].capacity, "mean_load": mean_load, "steps": steps(late(log.training))},
                Severity.CRITICAL if dropped >= 0.5 else Severity.WARNING,
                "The capacity is below the mean load: even a perfect balance would drop. Raise the factor to 1.0 to 1.5 (2 and more in eval)."
                if small else
                "There is room for the mean load, not for the busiest experts: mend the balance first, then raise the factor, or hand the "
                "overflow to a shared expert (CapacityRule(overflow='shared')).",
                f"{_THUMB} (factor 1.0 to 1.5 in training, 2 and more in eval); Fedus et al. 2021: with a balance loss, typically "
                "under 1 % dropped. The threshold of a quarter is ours",
            ))
    return found if asked else None


def threshold_cold_start(log: RoutingLog) -> list[Finding] | None:
    """Thresholds that do not fit the logits they meet: in half of the records an expert lets in next to nothing, or most tokens.

    Next to nothing is starvation's measure and most is collapse's, against the share the router promises (its expansion over E). Each
    record counts for itself, since a cold threshold may overshoot both ways. Asked of the earlier half of training, of the later half, and
    of evaluation, which may be cold when training is not (training warms up as expert choice); the worst is told.
    """
    asked, found = False, []
    windows = {"training, first half": log.training[: len(log.training) // 2], "training, second half": late(log.training),
               "evaluation": log.evaluation}
    for index in range(len(log.training[0].layers)):
        worst = []
        for name, window in windows.items():
            records = [step.layers[index] for step in window if step.layers[index].thresholds is not None and step.layers[index].tokens]
            if len(records) < 2:
                continue
            asked = True
            for expert, promised in enumerate(records[-1].aim):
                shares = [r.asked[expert] / r.tokens for r in records]
                nothing = sum(_starves(share, promised) for share in shares) / len(shares)
                most = sum(_crowds(share, promised) for share in shares) / len(shares)
                worst.append((nothing + most, nothing, most, expert, promised, name, steps(window)))
        cold = [entry for entry in worst if entry[0] >= COLD]
        if cold:
            _, nothing, most, expert, promised, name, when = max(cold, key=lambda entry: entry[0])
            found.append(Finding(
                "threshold cold start", index,
                {"cold_experts": sorted({entry[3] for entry in cold}), "worst_expert": expert, "lets_in_next_to_nothing": nothing,
                 "lets_in_most": most, "promised_share": promised, "in": name, "steps": when},
                Severity.CRITICAL,
                "Warm up as expert choice (warmup_steps: 4 / (1 - ema_decay)), or calibrate(batches) on data first; call router.update once "
                "per optimiser step. In a short run use a lower ema_decay.",
                "Sun et al. 2026 (arXiv 2603.11535), appendix E.1; the measures are ours",
            ))
    return found if asked else None


def _starves(share: float, fair: float) -> bool:
    return share < min(STARVED, STARVED_OF_FAIR * fair)


def _crowds(share: float, fair: float) -> bool:
    return fair < 0.5 and (share - fair) / (1 - fair) > COLLAPSE


def _collapsed(load: Load) -> list[int]:
    """The experts that most tokens ask for, the busiest first."""
    crowded = [e for e, (share, fair) in enumerate(zip(load.share_E, load.fair_E)) if _crowds(share, fair)]
    return sorted(crowded, key=lambda e: -load.share_E[e])


def _pairs(records: list[LayerRecord]) -> list[tuple[float, float]]:
    """(v_s, v_{s+1}) of every expert and every record whose next step is known."""
    return [pair for r in records if r.asked_next is not None and sum(r.asked) and sum(r.asked_next)
            for pair in zip(_excess(r.asked), _excess(r.asked_next))]


def _excess(counts_E: list[int]) -> list[float]:
    mean = sum(counts_E) / len(counts_E)
    return [count / mean - 1 for count in counts_E]
