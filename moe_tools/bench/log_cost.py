"""What logging costs: ``python -m moe_tools.bench.log_cost``.

Trains the small language model with and without a ``RoutingLog``, by turns: one round without, one
with it, each as many steps as the log skips, so that a round with it holds one step recorded in
full and one of which the load is taken. Told in two ways: the median round with over the median
round without, and the time spent in ``add`` over that of its round, which is steadier. Time is
processor time, so that other work on the machine counts less.
"""

import argparse
import statistics
import time

import torch

from moe_core.config import MoEConfig
from moe_core.lm import LanguageModel, LMConfig, train_step
from moe_core.validate import whole

from ..diagnosis.routing_log import RoutingLog
from ._router_rows import text

# name -> LMConfig's d_model, n_layers and n_heads, MoEConfig's d_ff, batch_size, seq_len
MODEL_SIZES = {"router bench": (64, 2, 4, 64, 16, 64), "chapter": (128, 4, 4, 128, 16, 128)}


def measure(size: str, *, every: int = 20, rounds: int = 15) -> dict[str, float]:
    """Step time in ms, the medians' ratio minus 1, and the median share spent in ``add``.

    Args:
        size: one of ``MODEL_SIZES``. every: steps between records, and in a round. rounds: of each
            kind.

    Raises:
        ValueError: a number is not a whole one, at least 1 (every: 2), or the size is unknown.
    """
    whole(2, every=every)
    whole(1, rounds=rounds)
    if size not in MODEL_SIZES:
        raise ValueError(f"size={size!r} must be one of {', '.join(MODEL_SIZES)}")
    d_model, n_layers, n_heads, d_ff, batch_size, seq_len = MODEL_SIZES[size]
    torch.manual_seed(0)
    moe = MoEConfig(d_model=d_model, d_ff=d_ff, n_experts=8, top_k=2, aux_loss_weight=0.01)
    model = LanguageModel(
        LMConfig(d_model=d_model, n_layers=n_layers, n_heads=n_heads, max_seq_len=seq_len, moe=moe)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, log, step = torch.Generator().manual_seed(0), RoutingLog(model, every=every), 0
    seconds, inside = {False: [], True: []}, []
    for turn in range(2 * rounds + 2):  # the first of each kind warms up
        logged, in_add = bool(turn % 2), 0.0
        start = time.process_time()
        for _ in range(every):
            step += 1
            tokens = text().batch(batch_size, seq_len, generator=generator)[0]
            loss, routings = train_step(model, optimizer, tokens)
            if logged:
                before = time.process_time()
                log.add(
                    step + 1, routings, loss=loss
                )  # shifted by one, so that both steps it looks at are in this round
                in_add += time.process_time() - before
        if turn >= 2:
            seconds[logged].append(time.process_time() - start)
            if logged:
                inside.append(in_add / seconds[logged][-1])
    medians = {logged: statistics.median(times) for logged, times in seconds.items()}
    return {
        "step_ms": 1000 * medians[False] / every,
        "ratio": medians[True] / medians[False] - 1,
        "share_in_add": statistics.median(inside),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure each size on one thread, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_tools.bench.log_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--every", type=int, default=20, help="steps between records")
    parser.add_argument("--rounds", type=int, default=15, help="with the log, and as many without")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for size in MODEL_SIZES:
        found = measure(size, every=asked.every, rounds=asked.rounds)
        print(
            f"{size}: a step takes {found['step_ms']:.1f} ms; logging every {asked.every} steps "
            f"adds {found['ratio']:+.2%} (medians of rounds), {found['share_in_add']:.2%} of the "
            "time is spent in add"
        )


if __name__ == "__main__":
    main()
