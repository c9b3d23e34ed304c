"""Who gets how many tokens: collapse, starvation, imbalance, drops.

A load is told as the share of the tokens that ask for an expert, before capacity. With K experts
per token the shares sum to K, and the fair share is K/E (``LayerRecord.aim`` where real and cheap
experts differ). Shares of the *slots* would not do: with K = 2 an expert that every token visits
has half of them.
"""

from dataclasses import dataclass

from .finding import Severity
from .illness import WELL, LayerHistory, Symptoms, illness
from .log_records import LayerRecord

# Of the way from the fair share of the tokens to all tokens; for K much below E: over 50 % of them.
COLLAPSE = 0.5
STARVED = 0.01  # of the tokens, or
STARVED_OF_FAIR = (
    0.1  # of the fair share, where that is less: with E = 256, K = 1 it is itself 0.4 %
)
IMBALANCE = 3.0  # busiest expert over its fair share
DROP_STORM = 0.25  # of the slots
# Those that are worth their coefficient at perfect balance.
BALANCE_LOSSES = ("load_balance", "sequence_balance")


@dataclass(frozen=True)
class Load:
    """A pooled load as shares of the tokens: what experts get, and what is fair."""

    share_E: list[float]
    fair_E: list[float]


def pooled(records: list[LayerRecord]) -> Load | None:
    """The load of these records; None without tokens, or where thresholds decide it."""
    tokens = sum(r.tokens for r in records)
    asked_E = [sum(counts) for counts in zip(*(r.asked for r in records))]
    if sum(asked_E) == 0 or records[-1].thresholds is not None:
        return None
    share_E, aim_E = [asked / tokens for asked in asked_E], records[-1].aim
    return Load(share_E, [sum(share_E) * aim / sum(aim_E) for aim in aim_E])


@illness(
    "collapse",
    needs="loads that no threshold decides",
    severity=Severity.CRITICAL,
    source=(
        "Rule of thumb (over 50 % of the tokens on one expert), measured from the fair share on; "
        "Shazeer et al. 2017, section 4"
    ),
)
def collapse(layer: LayerHistory) -> Symptoms | None:
    r"""An expert gets most of the tokens.

    .. math:: \frac{t_e - K/E}{1 - K/E} > \frac{1}{2}, \quad t_e = \text{share of the tokens that
        ask for } e

    0 at the fair share, 1 when every token asks for it. Nothing is asked of layers in which a token
    takes half of the experts anyway, nor of routers with thresholds: see ``threshold_cold_start``.
    """
    load = pooled(layer.late)
    if load is None:
        return None
    experts = _collapsed(load)
    if not experts:
        return WELL
    return Symptoms(
        {
            "experts": experts,
            "share_of_tokens": [load.share_E[e] for e in experts],
            "fair_share": load.fair_E[experts[0]],
        },
        f"{_more_balance(layer.late)}. A collapsed router may not recover by itself: go back to a "
        "checkpoint from before, or draw it anew.",
    )


@illness(
    "starvation",
    needs="loads that no threshold decides",
    source=(
        "Rule of thumb (an expert under 1 % of the tokens); jitter as in Fedus et al. 2021, "
        "section 2.2"
    ),
)
def starvation(layer: LayerHistory) -> Symptoms | None:
    """Experts with less than 1 % of the tokens, or a tenth of their fair share if less."""
    load = pooled(layer.late)
    if load is None:
        return None
    shares = zip(load.share_E, load.fair_E)
    starved = [e for e, (share, fair) in enumerate(shares) if starves(share, fair)]
    if not starved:
        return WELL
    many = 2 * len(starved) >= len(load.share_E)
    return Symptoms(
        {
            "experts": starved,
            "share_of_tokens": [load.share_E[e] for e in starved],
            "fair_share": load.fair_E[starved[0]],
            "without_any_token": sum(load.share_E[e] == 0 for e in starved),
        },
        f"{_more_balance(layer.late)}; or let tokens explore: jitter_noise=0.01, or noisy top-k.",
        Severity.CRITICAL if many else Severity.WARNING,
    )


@illness(
    "load imbalance",
    needs="loads that no threshold decides",
    source=(
        "Rule of thumb (load varies by more than 3 times); Qiu et al. 2025 for the global batch"
    ),
)
def imbalance(layer: LayerHistory) -> Symptoms | None:
    """The busiest expert gets over 3 times its fair share without having collapsed.

    That is MaxVio > 2.
    """
    load = pooled(layer.late)
    if load is None:
        return None
    shares = zip(load.share_E, load.fair_E)
    ratio, busiest = max((share / fair, e) for e, (share, fair) in enumerate(shares))
    if ratio <= IMBALANCE or _collapsed(load):
        return WELL
    return Symptoms(
        {
            "expert": busiest,
            "share_of_tokens": load.share_E[busiest],
            "fair_share": load.fair_E[busiest],
            "ratio": ratio,
        },
        f"{_more_balance(layer.late)}; with small batches, balance over the global batch.",
    )


@illness(
    "drop storm",
    needs="a capacity",
    source=(
        "Rule of thumb (factor 1.0 to 1.5 in training, 2 and more in eval); Fedus et al. 2021: "
        "with a balance loss, typically under 1 % dropped. The threshold of a quarter is ours"
    ),
)
def drop_storm(layer: LayerHistory) -> Symptoms | None:
    """A quarter of the slots or more find no room."""
    records = layer.late
    wanted, capacity = sum(sum(r.asked) for r in records), records[-1].capacity
    if capacity is None or wanted == 0:
        return None
    dropped = 1 - sum(sum(r.kept) for r in records) / wanted
    if dropped < DROP_STORM:
        return WELL
    mean_load = wanted / len(records) / len(records[-1].asked)
    return Symptoms(
        {"dropped": dropped, "capacity": capacity, "mean_load": mean_load},
        (
            "The capacity is below the mean load: even a perfect balance would drop. Raise the "
            "factor to 1.0 to 1.5 (eval: 2 or more)."
            if capacity < mean_load
            else (
                "There is room for the mean load, not for the busiest experts: mend the balance "
                "first, then raise the factor, or hand the overflow to a shared expert "
                "(CapacityRule(overflow='shared'))."
            )
        ),
        Severity.CRITICAL if dropped >= 0.5 else Severity.WARNING,
    )


def _more_balance(records: list[LayerRecord]) -> str:
    if any(name in records[-1].losses for name in BALANCE_LOSSES):
        return "Raise the balance coefficient 2 to 5 times"
    if records[-1].bias is not None and any(records[-1].bias):
        return (
            "Raise bias_update_rate, which does not keep up, or call router.update once per "
            "optimiser step"
        )
    return (
        "Add a balance loss (aux_loss_weight=0.01 to 0.02), or take a router with a selection bias "
        "(loss_free)"
    )


def starves(share: float, fair: float) -> bool:
    """Whether this share of the tokens is next to nothing."""
    return share < min(STARVED, STARVED_OF_FAIR * fair)


def crowds(share: float, fair: float) -> bool:
    """Whether this share is over half of the way from the fair share to all.

    Never where half is fair.
    """
    return fair < 0.5 and (share - fair) / (1 - fair) > COLLAPSE


def _collapsed(load: Load) -> list[int]:
    """The experts that most tokens ask for, the busiest first."""
    shares = zip(load.share_E, load.fair_E)
    crowded = [e for e, (share, fair) in enumerate(shares) if crowds(share, fair)]
    return sorted(crowded, key=lambda e: -load.share_E[e])
