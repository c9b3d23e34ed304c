"""Who gets how many tokens: collapse, starvation, imbalance, drops.

A load is told as the share of the tokens that ask for an expert, before capacity. With K experts per token the shares sum to K, and the
fair share is K/E (where a router means real and cheap experts to differ, it says so: ``LayerRecord.aim``). Shares of the *slots* would
not do: with K = 2 an expert that every token visits has half of them.
"""

from dataclasses import dataclass

from ._window import late, late_by_layer, steps
from .finding import Finding, Severity
from .log_records import LayerRecord
from .routing_log import RoutingLog

COLLAPSE = 0.5  # of the way from the fair share of the tokens to all tokens; for K much below E: an expert has over 50 % of them
STARVED = 0.01  # of the tokens, or
STARVED_OF_FAIR = 0.1  # of the fair share, where that is less: with 256 experts and K = 1 the fair share itself is 0.4 %
IMBALANCE = 3.0  # busiest expert over its fair share
DROP_STORM = 0.25  # of the slots
BALANCE_LOSSES = (
    "load_balance",
    "sequence_balance",
)  # those that are worth their coefficient at perfect balance

_THUMB = "Rule of thumb"


@dataclass(frozen=True)
class Load:
    """The pooled load of some records: share_E of the tokens that asked for each expert, fair_E the share it should have."""

    share_E: list[float]
    fair_E: list[float]


def pooled(records: list[LayerRecord]) -> Load | None:
    """The load of these records together; None when no token asked for any expert, or thresholds decide the load."""
    tokens, asked_E = (
        sum(r.tokens for r in records),
        [sum(counts) for counts in zip(*(r.asked for r in records))],
    )
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
            "collapse",
            index,
            {
                "experts": experts,
                "share_of_tokens": [load.share_E[e] for e in experts],
                "fair_share": load.fair_E[experts[0]],
                "steps": steps(late(log.training)),
            },
            Severity.CRITICAL,
            f"{_more_balance(records)}. A collapsed router may not recover by itself: go back to a checkpoint from before, or draw it "
            "anew.",
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
        starved = [
            e
            for e, (share, fair) in enumerate(zip(load.share_E, load.fair_E))
            if starves(share, fair)
        ]
        if starved:
            many = 2 * len(starved) >= len(load.share_E)
            found.append(
                Finding(
                    "starvation",
                    index,
                    {
                        "experts": starved,
                        "share_of_tokens": [load.share_E[e] for e in starved],
                        "fair_share": load.fair_E[starved[0]],
                        "without_any_token": sum(load.share_E[e] == 0 for e in starved),
                        "steps": steps(late(log.training)),
                    },
                    Severity.CRITICAL if many else Severity.WARNING,
                    f"{_more_balance(records)}; or let tokens explore: jitter_noise=0.01, or noisy top-k.",
                    f"{_THUMB} (an expert under 1 % of the tokens); jitter as in Fedus et al. 2021, section 2.2",
                )
            )
    return found


def imbalance(log: RoutingLog) -> list[Finding]:
    """The busiest expert gets over 3 times its fair share, without having collapsed. That is MaxVio > 2."""
    found = []
    for index, records in enumerate(late_by_layer(log)):
        load = pooled(records)
        if load is None or _collapsed(load):
            continue
        ratio, busiest = max(
            (share / fair, e) for e, (share, fair) in enumerate(zip(load.share_E, load.fair_E))
        )
        if ratio > IMBALANCE:
            found.append(
                Finding(
                    "load imbalance",
                    index,
                    {
                        "expert": busiest,
                        "share_of_tokens": load.share_E[busiest],
                        "fair_share": load.fair_E[busiest],
                        "ratio": ratio,
                        "steps": steps(late(log.training)),
                    },
                    Severity.WARNING,
                    f"{_more_balance(records)}; with small batches, balance over the global batch.",
                    f"{_THUMB} (load varies by more than 3 times); Qiu et al. 2025 for the global batch",
                )
            )
    return found


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
            found.append(
                Finding(
                    "drop storm",
                    index,
                    {
                        "dropped": dropped,
                        "capacity": records[-1].capacity,
                        "mean_load": mean_load,
                        "steps": steps(late(log.training)),
                    },
                    Severity.CRITICAL if dropped >= 0.5 else Severity.WARNING,
                    "The capacity is below the mean load: even a perfect balance would drop. Raise the factor to 1.0 to 1.5 (eval: 2 or more)."
                    if small
                    else "There is room for the mean load, not for the busiest experts: mend the balance first, then raise the factor, or hand the "
                    "overflow to a shared expert (CapacityRule(overflow='shared')).",
                    f"{_THUMB} (factor 1.0 to 1.5 in training, 2 and more in eval); Fedus et al. 2021: with a balance loss, typically "
                    "under 1 % dropped. The threshold of a quarter is ours",
                )
            )
    return found if asked else None


def _more_balance(records: list[LayerRecord]) -> str:
    """What to turn, by what the router has."""
    if any(name in records[-1].losses for name in BALANCE_LOSSES):
        return "Raise the balance coefficient 2 to 5 times"
    if records[-1].bias is not None and any(records[-1].bias):
        return "Raise bias_update_rate, which does not keep up, or call router.update once per optimiser step"
    return "Add a balance loss (aux_loss_weight=0.01 to 0.02), or take a router with a selection bias (loss_free)"


def starves(share: float, fair: float) -> bool:
    """Whether this share of the tokens is next to nothing."""
    return share < min(STARVED, STARVED_OF_FAIR * fair)


def crowds(share: float, fair: float) -> bool:
    """Whether this share is most tokens: over half of the way from the fair share to all. Never where half is fair."""
    return fair < 0.5 and (share - fair) / (1 - fair) > COLLAPSE


def _collapsed(load: Load) -> list[int]:
    """The experts that most tokens ask for, the busiest first."""
    crowded = [
        e for e, (share, fair) in enumerate(zip(load.share_E, load.fair_E)) if crowds(share, fair)
    ]
    return sorted(crowded, key=lambda e: -load.share_E[e])
