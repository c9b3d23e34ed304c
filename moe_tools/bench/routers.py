"""The router bench: every router on the same text, model, budget and seeds.

Within a seed all routers start from the same weights (where shapes agree and the router does not
prescribe its own) and read the same batches. A token has the compute of K experts of width F:
exactly, in the mean (where experts or thresholds choose), or as one expert of width K*F (where the
router has K = 1). Soft MoE is left out: it mixes all tokens of a sequence, so a language model made
of it predicts the next token from the next token. Expert choice has the same fault to a lesser
degree; it is in, and marked.

Losses are measured in eval mode, hence with each router's own eval routing: pure thresholds, no
noise, the best expert instead of the assigned one. "alone" feeds some of that text as generating
would, prefix by prefix and one sequence at a time, and says by how much the loss is then above that
of the same windows whole and together: 0 for a router that looks at one token, more for one that
reads other tokens or whose capacity shrinks with their number.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict

from moe_core.capacity import CapacityRule
from moe_core.validate import whole

from .. import markdown
from ._repetitions import SEEDS, band
from ._router_rows import ROWS, Budget, config
from ._router_run import build, run

__all__ = ["ROWS", "SEEDS", "Budget", "bench", "build", "config", "run", "table"]


def bench(
    only: Iterable[str] | None = None,
    *,
    seeds: Iterable[int] = SEEDS,
    budget: Budget = Budget(),
    workers: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Run the bench.

    Args:
        only: names of routers, keys of ``ROWS``; None: all.
        seeds: each router is trained once with each.
        workers: processes; 1 runs everything in this one.
        progress: called with one line of text after each run.

    Returns:
        ``{"config", "seeds", "results"}`` of plain values, results by router: numbers are lists
        with one entry per seed.

    Raises:
        ValueError: an unknown router, no router, no seed, or a budget that does not fit.
    """
    names, seeds = list(ROWS if only is None else dict.fromkeys(only)), list(seeds)
    whole(1, workers=workers, n_routers=len(names), n_seeds=len(seeds))
    for name in names:
        config(name, budget)  # a mistake should cost no training
    jobs, done = [(name, seed, budget) for seed in seeds for name in names], []

    def report(found: dict) -> None:
        done.append(found)
        progress(
            f"[{len(done)}/{len(jobs)}] {found['name']}, seed {found['seed']}: held-out loss "
            f"{found['held_out']:.3f}, {found['run_seconds']:.0f} s"
        )

    if workers == 1:
        for job in jobs:
            report(run(*job))
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(run, *job) for job in jobs]):
                report(future.result())
    done.sort(key=lambda found: seeds.index(found["seed"]))
    return {
        "config": asdict(budget),
        "seeds": seeds,
        "results": {name: _results(name, done) for name in names},
    }


def _results(name: str, done: list[dict]) -> dict:
    """One router's runs, a list over seeds for each number.

    Answers of the probe hold if they do for every seed.
    """
    mine = [found for found in done if found["name"] == name]
    topk = {found["seed"]: found["step_ms"] for found in done if found["name"] == "topk"}
    fields = {
        key: asdict(value) if isinstance(value, CapacityRule) else value
        for key, value in ROWS[name].fields.items()
    }
    gathered = {
        key: _gather([found[key] for found in mine])
        for key in mine[0]
        if key not in ("name", "seed")
    }
    for key, answers in gathered.items():
        if isinstance(answers, list) and isinstance(answers[0], bool):
            gathered[key] = all(answers)
    times = [found["step_ms"] / topk[found["seed"]] for found in mine] if topk else None
    return {
        "note": ROWS[name].note,
        "fields": fields,
        "options": ROWS[name].options,
        **gathered,
        "time_to_topk": times,
    }


def _gather(values: list):
    """Dicts over seeds -> a dict of lists over seeds."""
    return (
        {key: _gather([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], dict)
        else values
    )


def table(record: dict) -> str:
    """One row per router of what ``bench`` returned, the lowest held-out loss first.

    ± is half the spread over the seeds. The difference to top-k is taken within each seed: same
    start, same batches.
    """
    head = [
        "router",
        "held-out loss",
        "minus top-k's",
        "alone",
        "training loss",
        "MaxVio",
        "in eval",
        "dropped",
        "in eval",
        "load entropy",
        "router entropy",
        "dead",
        "experts/token",
        "in eval",
        "time",
        "causal (training)",
        "batch-invariant",
    ]
    topk = record["results"].get("topk", {}).get("held_out")
    rows = [
        _row(name, found, topk)
        for name, found in sorted(
            record["results"].items(), key=lambda item: statistics.fmean(item[1]["held_out"])
        )
    ]
    return markdown.number_table(head, rows, text_columns=1)


def _row(name: str, found: dict, topk: list[float] | None) -> list[str]:
    training, evaluated = found["training"], found["eval"]
    borrowed = [alone - whole for alone, whole in zip(found["alone"], found["not_alone"])]
    time = (
        "" if found["time_to_topk"] is None else f"{statistics.median(found['time_to_topk']):.2f}x"
    )
    return [
        name,
        band(found["held_out"], ".3f", ".3f"),
        (
            band([mine - its for mine, its in zip(found["held_out"], topk)], "+.3f", ".3f")
            if topk
            else ""
        ),
        f"{round(statistics.fmean(borrowed), 3) + 0.0:+.3f}",
        f"{statistics.fmean(found['training_loss']):.3f}",
        f"{statistics.fmean(training['max_violation']):.2f}",
        f"{statistics.fmean(evaluated['max_violation']):.2f}",
        f"{statistics.fmean(training['drop_rate']):.1%}",
        f"{statistics.fmean(evaluated['drop_rate']):.1%}",
        f"{statistics.fmean(evaluated['load_entropy']):.2f}",
        f"{statistics.fmean(evaluated['router_entropy']):.2f}",
        f"{statistics.fmean(evaluated['dead_experts']):.1f}",
        f"{statistics.fmean(training['experts_per_token']):.2f}",
        f"{statistics.fmean(evaluated['experts_per_token']):.2f}",
        time,
        f"{_yes(found['causal'])} ({_yes(found['causal_in_training'])})",
        _yes(found["batch_invariant"]),
    ]


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
