"""What is left of the table's lead: two controls for the row of top-k on the router bench.

`without loss` is the bench's top-k without its balance loss. `frozen` is that router at its random start: neither its weights nor its input
get a gradient through it, so that it learns nothing, as a table does, but sees vectors instead of bytes. Budget, start and batches are the
bench's, so that each can be compared with a row of router_bench.json seed by seed. Run it with `python book/runs/table_or_topk.py` (about
two minutes on one quiet CPU core); chapter 11 shows table_or_topk.json.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

from moe_book import corpus, runs
from moe_core.routers import TopKRouter
from moe_tools.bench import routers

SEEDS = [0, 1, 2]
KEYS = ("held_out", "training_loss")


class FrozenRouter(TopKRouter):
    """Top-k whose logits carry no gradient, neither to the router's weights nor to its input."""

    def logits(self, x):
        return super().logits(x).detach()


def without_loss(name, seed, budget):
    """The bench's top-k; nobody adds its balance loss."""
    model = routers.build(name, seed, budget)
    for block in model.blocks:
        block.feed_forward.router.aux_loss_weight = 0.0
    return model


def frozen(name, seed, budget):
    """The bench's top-k with FrozenRouters; their weights are not parameters to be trained (or decayed)."""
    model = without_loss(name, seed, budget)
    for block in model.blocks:
        router = block.feed_forward.router
        router.__class__ = FrozenRouter
        router.requires_grad_(False)
    return model


ARMS = {"without loss": without_loss, "frozen": frozen}


def run(arm: str, seed: int, budget: routers.Budget) -> dict:
    """One run of the bench's row of top-k, as the arm changes it."""
    found = routers.run("topk", seed, budget, ARMS[arm])
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
