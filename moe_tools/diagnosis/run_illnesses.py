"""What stands around the router: padding, the shared expert, evaluation, and the ranks that wait for each other."""

from statistics import fmean

from ._window import late, late_by_layer, steps
from .finding import Finding, Severity
from .log_records import StepRecord
from .routing_log import RoutingLog

CLOSED_GATE = 0.05  # mean of a sigmoid; its slope there is a fifth of that at 1/2
GAP = 0.05  # nats per token; the gain of expert threshold over token choice, say, is 0.067 (arXiv 2603.11535, table 2)
STRAGGLER = 1.5  # times the mean of the ranks: the others wait a third of the time
ALL_TO_ALL = 0.30  # of the step
MEMORY = 0.90  # of the device


def padding_counted(log: RoutingLog) -> list[Finding] | None:
    """Padding asks for experts: it was routed as if it were text, so it takes room and moves loads, losses and biases."""
    masked = [step for step in log.training if step.padding_share is not None]
    if not masked:
        return None
    found = []
    for index in range(len(masked[0].layers)):
        slots = sum(step.layers[index].padding_slots for step in masked)
        asked = sum(sum(step.layers[index].asked) for step in masked)
        if slots > 0:
            found.append(
                Finding(
                    "padding counted",
                    index,
                    {
                        "share_of_slots": slots / asked,
                        "padding_share": fmean(step.padding_share for step in masked),
                        "steps": steps(masked),
                    },
                    Severity.WARNING,
                    "Hand padding_mask (True for real tokens) to the model, so that padding takes no slot and counts in no loss.",
                    "transformers #28505; Megatron-LM #1984; torchtitan #4594",
                )
            )
    return found


def dead_shared_gate(log: RoutingLog) -> list[Finding] | None:
    """The gate of the shared expert is shut: its mean is below 0.05, and so is its gradient."""
    asked, found = False, []
    for index, records in enumerate(late_by_layer(log)):
        gates = [r.shared_gate for r in records if r.shared_gate is not None]
        asked = asked or bool(gates)
        if gates and fmean(gates) < CLOSED_GATE:
            found.append(
                Finding(
                    "dead shared gate",
                    index,
                    {"mean_gate": fmean(gates), "steps": steps(late(log.training))},
                    Severity.WARNING,
                    "Start the gate at 1/2 (weights near zero, no bias), or leave it out (shared_gate=False): the shared expert is paid for, "
                    "and adds nothing.",
                    "Rule of thumb, ours; the gate is Qwen2-MoE's",
                )
            )
    return found if asked else None


def train_eval_gap(log: RoutingLog) -> list[Finding] | None:
    """On the batches of training steps the model in eval mode is worse by 0.05 nats than in training mode, so it does something else."""
    training = {step.step: step for step in log.training if step.loss is not None}
    pairs = [
        (training[step.step], step)
        for step in log.evaluation
        if step.loss is not None and step.step in training
    ]
    if not pairs:
        return None
    pairs = pairs[len(pairs) // 2 :]
    before, after = [train for train, _ in pairs], [evaluated for _, evaluated in pairs]
    gap = fmean(step.loss for step in after) - fmean(step.loss for step in before)
    if gap < GAP:
        return []
    dropped, experts = (
        (_dropped(before), _dropped(after)),
        (_experts_per_token(before), _experts_per_token(after)),
    )
    crowding = _crowding(before), _crowding(after)
    if dropped[1] - dropped[0] > 0.05:
        remedy = (
            "Eval drops more than training: give it room, CapacityRule(eval_factor=2.0) or None."
        )
    elif abs(experts[1] / max(experts[0], 1e-12) - 1) > 0.1:
        remedy = (
            "Tokens get another number of experts in eval: calibrate the thresholds, call router.update once per step, evaluate with "
            "batches like those of training."
        )
    elif crowding[1] > 1.2 * crowding[0]:
        remedy = (
            "The load tips in eval: this router balances in training only (BASE, Sinkhorn, noise). Train the last steps with its "
            "eval routing, or take a router that routes alike in both."
        )
    else:
        remedy = "Look for noise or dropout left on in eval, and ask moe_core.probe.probe what a token's output depends on."
    return [
        Finding(
            "train-eval gap",
            None,
            {
                "gap": gap,
                "training_loss": fmean(step.loss for step in before),
                "eval_loss": fmean(step.loss for step in after),
                "dropped": list(dropped),
                "experts_per_token": list(experts),
                "busiest_over_mean": list(crowding),
                "steps": steps(after),
            },
            Severity.WARNING,
            remedy,
            "Sun et al. 2026 (arXiv 2603.11535), figure 7 (expert choice of small batches diverges in eval); the threshold is ours",
        )
    ]


def straggler_rank(log: RoutingLog) -> list[Finding] | None:
    """One rank takes 1.5 times the mean of all, in most of the steps: the others wait. Told by time, or by rows where no time is known."""
    seconds = [step.costs.rank_seconds for step in late(log.training) if step.costs.rank_seconds]
    rows = [step.costs.rank_rows for step in late(log.training) if step.costs.rank_rows]
    if not seconds and not rows:
        return None
    told_by = seconds or rows
    total_R = [sum(rank) for rank in zip(*told_by)]
    slowest = max(range(len(total_R)), key=total_R.__getitem__)
    ratio = total_R[slowest] / max(fmean(total_R), 1e-12)
    often = fmean(max(range(len(step)), key=step.__getitem__) == slowest for step in told_by)
    if ratio <= STRAGGLER or often <= 0.5:
        return []
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
    return [
        Finding(
            "straggler rank",
            None,
            evidence | {"steps": steps(late(log.training))},
            Severity.WARNING,
            "Its experts are popular: balance the load, place experts by measured load, or replicate the hot ones."
            if crowded
            else "It has no more rows than others, so the cause is the machine: clocks, link, or something else running there.",
            "Rule of thumb, ours: at 1.5 the other ranks wait a third of the time",
        )
    ]


def slow_all_to_all(log: RoutingLog) -> list[Finding] | None:
    """All-to-all takes over 30 % of the step."""
    timed = [
        step.costs
        for step in late(log.training)
        if step.costs.all_to_all_seconds is not None and step.costs.step_seconds
    ]
    if not timed:
        return None
    share = sum(cost.all_to_all_seconds for cost in timed) / sum(
        cost.step_seconds for cost in timed
    )
    if share <= ALL_TO_ALL:
        return []
    return [
        Finding(
            "slow all-to-all",
            None,
            {"share_of_step": share, "steps": steps(late(log.training))},
            Severity.WARNING,
            "Send less: fewer experts per token, node limits (n_groups, topk_groups), FP8 dispatch; or overlap it with the shared expert. A "
            "straggler makes it look slow: balance first.",
            "Rule of thumb (over 30 % of the step); node limits as in DeepSeek-V3 (arXiv 2412.19437), section 2.1.2",
        )
    ]


def memory_pressure(log: RoutingLog) -> list[Finding] | None:
    """A step's peak takes over 90 % of the device's memory: the next uneven load may not fit."""
    shares = [
        step.costs.memory_share for step in log.training if step.costs.memory_share is not None
    ]
    if not shares:
        return None
    if max(shares) <= MEMORY:
        return []
    dropless = all(layer.capacity is None for layer in log.training[-1].layers)
    return [
        Finding(
            "memory pressure",
            None,
            {"peak_share": max(shares), "steps": steps(log.training)},
            Severity.WARNING,
            "Set a capacity factor of 1.0 to 1.5: without one, memory follows the busiest expert."
            if dropless
            else "Lower the capacity factor: the overflow is then dropped, or handed to a shared expert.",
            "Rule of thumb (lower the capacity factor on memory pressure); the threshold is ours",
        )
    ]


def _dropped(records: list[StepRecord]) -> float:
    asked = sum(sum(layer.asked) for step in records for layer in step.layers)
    return 1 - sum(sum(layer.kept) for step in records for layer in step.layers) / max(asked, 1)


def _experts_per_token(records: list[StepRecord]) -> float:
    return sum(sum(layer.kept) for step in records for layer in step.layers) / max(
        sum(layer.tokens for step in records for layer in step.layers), 1
    )


def _crowding(records: list[StepRecord]) -> float:
    """The busiest expert's load over the mean load, averaged over layers."""
    loads = [
        [sum(counts) for counts in zip(*(step.layers[index].asked for step in records))]
        for index in range(len(records[0].layers))
    ]
    return fmean(max(load) * len(load) / max(sum(load), 1) for load in loads)
