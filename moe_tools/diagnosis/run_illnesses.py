"""What stands around the router: divergence, padding, shared experts, evaluation, waiting ranks."""

import math
from statistics import fmean

from .finding import Severity
from .illness import WELL, LayerHistory, Symptoms, first_and_last, illness, later_half
from .log_records import StepRecord
from .routing_log import RoutingLog

CLOSED_GATE = 0.05  # mean of a sigmoid; its slope there is a fifth of that at 1/2
# Nats per token; the gain of expert threshold over token choice, say, is 0.067 (arXiv 2603.11535,
# table 2).
GAP = 0.05
STRAGGLER = 1.5  # times the mean of the ranks: the others wait a third of the time
ALL_TO_ALL = 0.30  # of the step
MEMORY = 0.90  # of the device


@illness(
    "diverged",
    needs="a logged step",
    whole_run=True,
    severity=Severity.CRITICAL,
    remedy=(
        "Stop: what was learned is lost from there on. Go back to a checkpoint from before, with a "
        "lower learning rate or smaller max_grad_norm; if it comes at the same step again, look at "
        "that batch."
    ),
    source="No threshold: a NaN stays one",
)
def diverged(log: RoutingLog) -> Symptoms | None:
    """A loss, a logit, a bias or a threshold is NaN or infinite."""
    broken = [step for step in log.training if not _is_finite(step)]
    if not broken:
        return WELL
    sound = [step.step for step in while_finite(log).training]
    evidence = {"first_seen_at_step": broken[0].step, "steps": first_and_last(broken)}
    return Symptoms(evidence | ({"last_finite_step": sound[-1]} if sound else {}))


def while_finite(log: RoutingLog) -> RoutingLog:
    """The log up to the last step before the first that holds a NaN or an infinity."""
    steps = [step.step for step in log.training + log.evaluation if not _is_finite(step)]
    if not steps:
        return log
    short = RoutingLog(every=log.every)
    short.training = [step for step in log.training if step.step < min(steps)]
    short.evaluation = [step for step in log.evaluation if step.step < min(steps)]
    return short


def _is_finite(step: StepRecord) -> bool:
    numbers = [step.loss if step.loss is not None else 0.0]
    for layer in step.layers:
        numbers += [layer.entropy, layer.logsumexp, layer.largest_logit, *layer.losses.values()]
        numbers += (layer.bias or []) + (layer.thresholds or [])
    return all(map(math.isfinite, numbers))


@illness(
    "padding counted",
    needs="padding_mask",
    remedy=(
        "Hand padding_mask (True for real tokens) to the model, so that padding takes no slot and "
        "counts in no loss."
    ),
    source="transformers #28505; Megatron-LM #1984; torchtitan #4594",
)
def padding_counted(layer: LayerHistory) -> Symptoms | None:
    """Padding was routed as if it were text: it takes room and moves loads and losses."""
    masked = [step for step in layer.log.training if step.padding_share is not None]
    if not masked:
        return None
    slots = sum(record.padding_slots for record in layer.of(masked))
    if slots == 0:
        return WELL
    return Symptoms(
        {
            "share_of_slots": slots / sum(sum(record.asked) for record in layer.of(masked)),
            "padding_share": fmean(step.padding_share for step in masked),
            "steps": first_and_last(masked),
        }
    )


@illness(
    "dead shared gate",
    needs="a gated shared expert",
    remedy=(
        "Start the gate at 1/2 (weights near zero, no bias), or leave it out (shared_gate=False): "
        "the shared expert is paid for, and adds nothing."
    ),
    source="Rule of thumb, ours; the gate is Qwen2-MoE's",
)
def dead_shared_gate(layer: LayerHistory) -> Symptoms | None:
    """The gate of the shared expert is shut: its mean is below 0.05, and so is its gradient."""
    gates = [r.shared_gate for r in layer.late if r.shared_gate is not None]
    if not gates:
        return None
    return Symptoms({"mean_gate": fmean(gates)}) if fmean(gates) < CLOSED_GATE else WELL


@illness(
    "train-eval gap",
    needs="add_evaluation and losses",
    whole_run=True,
    source=(
        "Sun et al. 2026 (arXiv 2603.11535), figure 7 (expert choice of small batches diverges in "
        "eval); the threshold is ours"
    ),
)
def train_eval_gap(log: RoutingLog) -> Symptoms | None:
    """Eval mode is worse by 0.05 nats on the batches of training: it does something else."""
    training = {step.step: step for step in log.training if step.loss is not None}
    pairs = later_half(
        [
            (training[step.step], step)
            for step in log.evaluation
            if step.loss is not None and step.step in training
        ]
    )
    if not pairs:
        return None
    before, after = [train for train, _ in pairs], [evaluated for _, evaluated in pairs]
    loss, eval_loss = fmean(step.loss for step in before), fmean(step.loss for step in after)
    if eval_loss - loss < GAP:
        return WELL
    dropped = _dropped(before), _dropped(after)
    experts = _experts_per_token(before), _experts_per_token(after)
    crowding = _crowding(before), _crowding(after)
    if dropped[1] - dropped[0] > 0.05:
        remedy = (
            "Eval drops more than training: give it room, CapacityRule(eval_factor=2.0) or None."
        )
    elif abs(experts[1] / max(experts[0], 1e-12) - 1) > 0.1:
        remedy = (
            "Tokens get another number of experts in eval: calibrate the thresholds, call "
            "router.update once per step, evaluate with batches like those of training."
        )
    elif crowding[1] > 1.2 * crowding[0]:
        remedy = (
            "The load tips in eval: this router balances in training only (BASE, Sinkhorn, noise). "
            "Train the last steps with its eval routing, or take a router that routes alike in "
            "both."
        )
    else:
        remedy = (
            "Look for noise or dropout left on in eval, and ask moe_tools.probe.probe what a "
            "token's output depends on."
        )
    return Symptoms(
        {
            "gap": eval_loss - loss,
            "training_loss": loss,
            "eval_loss": eval_loss,
            "dropped": list(dropped),
            "experts_per_token": list(experts),
            "busiest_over_mean": list(crowding),
            "steps": first_and_last(after),
        },
        remedy,
    )


@illness(
    "straggler rank",
    needs="rank_seconds or rank_rows",
    whole_run=True,
    source="Rule of thumb, ours: at 1.5 the other ranks wait a third of the time",
)
def straggler_rank(log: RoutingLog) -> Symptoms | None:
    """One rank takes 1.5 times the mean in most steps; by rows where no time is known."""
    costs = [step.costs for step in later_half(log.training)]
    seconds = [cost.rank_seconds for cost in costs if cost.rank_seconds]
    rows = [cost.rank_rows for cost in costs if cost.rank_rows]
    if not seconds and not rows:
        return None
    told_by = seconds or rows
    slowest, ratio = _busiest(told_by)
    often = fmean(max(range(len(step)), key=step.__getitem__) == slowest for step in told_by)
    if ratio <= STRAGGLER or often <= 0.5:
        return WELL
    evidence = {
        "rank": slowest,
        "seconds_over_mean" if seconds else "rows_over_mean": ratio,
        "waiting_share": 1 - 1 / ratio,
        "slowest_in": often,
    }
    if rows and seconds:
        rows_R = [sum(rank) for rank in zip(*rows)]
        evidence["rows_over_mean"] = rows_R[slowest] / max(fmean(rows_R), 1e-12)
    crowded = evidence.get("rows_over_mean", 0) > 1 + (STRAGGLER - 1) / 2
    return Symptoms(
        evidence,
        (
            "Its experts are popular: balance the load, place experts by measured load, or "
            "replicate the hot ones."
            if crowded
            else (
                "It has no more rows than others, so the cause is the machine: clocks, link, or "
                "something else running there."
            )
        ),
    )


@illness(
    "slow all-to-all",
    needs="all_to_all_seconds and step_seconds",
    whole_run=True,
    remedy=(
        "Send less: fewer experts per token, node limits (n_groups, topk_groups), FP8 dispatch; or "
        "overlap it with the shared expert. A straggler makes it look slow: balance first."
    ),
    source=(
        "Rule of thumb (over 30 % of the step); node limits as in DeepSeek-V3 (arXiv 2412.19437), "
        "section 2.1.2"
    ),
)
def slow_all_to_all(log: RoutingLog) -> Symptoms | None:
    """All-to-all takes over 30 % of the step."""
    costs = [step.costs for step in later_half(log.training)]
    timed = [c for c in costs if c.all_to_all_seconds is not None and c.step_seconds]
    if not timed:
        return None
    share = sum(c.all_to_all_seconds for c in timed) / sum(c.step_seconds for c in timed)
    return Symptoms({"share_of_step": share}) if share > ALL_TO_ALL else WELL


@illness(
    "memory pressure",
    needs="memory_share",
    whole_run=True,
    source="Rule of thumb (lower the capacity factor on memory pressure); the threshold is ours",
)
def memory_pressure(log: RoutingLog) -> Symptoms | None:
    """A step's peak takes over 90 % of the device's memory: the next uneven load may not fit."""
    shares = [step.costs.memory_share for step in log.training]
    shares = [share for share in shares if share is not None]
    if not shares:
        return None
    if max(shares) <= MEMORY:
        return WELL
    dropless = all(layer.capacity is None for layer in log.training[-1].layers)
    return Symptoms(
        {"peak_share": max(shares), "steps": first_and_last(log.training)},
        (
            "Set a capacity factor of 1.0 to 1.5: without one, memory follows the busiest expert."
            if dropless
            else (
                "Lower the capacity factor: the overflow is then dropped, or handed to a shared "
                "expert."
            )
        ),
    )


def _busiest(of_steps: list[list[float]]) -> tuple[int, float]:
    """The rank with the largest sum over the steps, and that over the mean of the ranks."""
    total_R = [sum(rank) for rank in zip(*of_steps)]
    busiest = max(range(len(total_R)), key=total_R.__getitem__)
    return busiest, total_R[busiest] / max(fmean(total_R), 1e-12)


def _dropped(records: list[StepRecord]) -> float:
    asked = sum(sum(layer.asked) for step in records for layer in step.layers)
    return 1 - sum(sum(layer.kept) for step in records for layer in step.layers) / max(asked, 1)


def _experts_per_token(records: list[StepRecord]) -> float:
    kept = sum(sum(layer.kept) for step in records for layer in step.layers)
    return kept / max(sum(layer.tokens for step in records for layer in step.layers), 1)


def _crowding(records: list[StepRecord]) -> float:
    """The busiest expert's load over the mean load, averaged over layers."""
    loads = [
        [sum(counts) for counts in zip(*(step.layers[index].asked for step in records))]
        for index in range(len(records[0].layers))
    ]
    return fmean(max(load) * len(load) / max(sum(load), 1) for load in loads)
