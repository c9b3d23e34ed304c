"""What is left of the table's lead: two controls for the row of top-k on the router bench.

`without loss` is the bench's top-k without its balance loss. `frozen` is that router at its random start: neither its weights nor its input
get a gradient through it, so that it learns nothing, as a table does, but sees vectors instead of bytes. Budget, start and batches are the
bench's, so that each can be compared with a row of router_bench.json seed by seed. Run it with `python book/runs/table_or_topk.py`.
It waits for the bench's next run, on the same text; until then chapter 11 says that no row tests this.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

from moe_book import corpus, runs
from moe_core.routers import TopKRouter
from moe_tools.bench import _router_run, routers

SEEDS = [0, 1, 2]
ARMS = ["without loss", "frozen"]
KEYS = ("held_out", "training_loss")


class FrozenRouter(TopKRouter):
    """Top-k whose logits carry no gradient, neither to the router's weights nor to its input."""

    def logits(self, x):
        return super().logits(x).detach()


def frozen_model(name, seed, budget):
    """The bench's model with FrozenRouters; their weights are not parameters to be trained (or decayed)."""
    model = trained_model(name, seed, budget)
    for block in model.blocks:
        router = block.feed_forward.router
        router.__class__ = FrozenRouter
        router.requires_grad_(False)
    return model


trained_model = _router_run._model


def run(arm: str, seed: int, budget: routers.Budget) -> dict:
    """One run of the bench's row of top-k, as the arm changes it."""
    row, routers.ROWS["topk"] = (
        routers.ROWS["topk"],
        replace(routers.ROWS["topk"], fields={}, note=arm),
    )
    _router_run._model = frozen_model if arm == "frozen" else trained_model
    try:
        found = routers.run("topk", seed, budget)
    finally:
        routers.ROWS["topk"], _router_run._model = row, trained_model
    return {key: found[key] for key in KEYS} | {"max_violation": found["training"]["max_violation"]}


def main(budget=routers.Budget()) -> None:
    found = runs.sweep(run, ARMS, SEEDS, budget)
    results = {
        arm: {key: [each[key] for each in of_arm] for key in of_arm[0]}
        for arm, of_arm in found.items()
    }
    print(
        runs.save(
            "table_or_topk", text=corpus.load(), config=asdict(budget), seeds=SEEDS, results=results
        )
    )


if __name__ == "__main__":
    main()
