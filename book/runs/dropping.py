"""Who is dropped? Trained models on real text, at capacity factor 1, under each policy: where in the queue the dropped stand, and what it costs.

What it costs is asked with controls: dice, and a queue that runs backwards. A second model of each seed has a shared expert, which takes
over the dropped slots, or does not.

Run it with `python book/runs/dropping.py` (about three minutes on one quiet CPU core); chapter 6 shows dropping.json.
"""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch
from tqdm import tqdm

from moe_book import corpus, runs
from moe_book.training import evaluate, train
from moe_core import LanguageModel, LMConfig, MoEConfig, capacity
from moe_core.capacity import CapacityRule
from moe_core.capacity.policies import DROP_POLICIES

SEEDS = [0, 1, 2]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "steps": 200, "lr": 3e-3}
CONFIG = {
    **SIZES,
    **TRAINING,
    "d_ff": 128,
    "n_experts": 8,
    "top_k": 2,
    "balance": 0.01,
    "factor": 1.0,
    "layer": 0,
    "bins": 16,
    "batches": 32,
}
POLICIES = ["position", "slot_position", "score", "random"]


# A policy is an order, and nothing but. Position's queue, run from the last slot of the batch to the first:
DROP_POLICIES["last_come"] = lambda routing: DROP_POLICIES["position"](routing).flip(0)
COSTS = ["score", "random", "slot_position", "position", "last_come"]
DRAWS = 3  # of the policy "random"


class RuleOfTraining(CapacityRule):
    """In eval the package turns "random" into "position"; this rule is in eval what it is in training."""

    def apply(self, routing, *, training):
        return super().apply(routing, training=True)


def build(seed: int, n_shared_experts: int = 0) -> LanguageModel:
    """A small language model whose router never drops in training."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        CONFIG["top_k"],
        n_shared_experts=n_shared_experts,
        aux_loss_weight=CONFIG["balance"],
        backend="loop",
    )
    return LanguageModel(LMConfig(**SIZES, max_seq_len=128, moe=moe))


@torch.no_grad()
def drops(model: LanguageModel, text: corpus.Corpus) -> dict:
    """policy -> scope -> the drop rate in each of the equal parts into which a batch's positions are cut."""
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(11)  # the policy "random"
    found = {
        policy: {scope: torch.zeros(CONFIG["bins"]) for scope in ("batch", "sequence")}
        for policy in POLICIES
    }
    for _ in range(CONFIG["batches"]):
        routing = model(
            text.batch(CONFIG["batch_size"], CONFIG["seq_len"], generator=generator, split="valid")[
                0
            ]
        )[1][CONFIG["layer"]]
        for policy, scopes in found.items():
            for scope, total in scopes.items():
                kept = capacity.apply(
                    routing, capacity_factor=CONFIG["factor"], drop_policy=policy, scope=scope
                ).capacity_mask
                # part i of a batch is one sequence out of 16; part i of a sequence is 4 tokens out of 64
                parts = (
                    kept.flatten(0, 1) if scope == "batch" else kept.transpose(0, 1).flatten(0, 1)
                )
                total += 1 - parts.view(CONFIG["bins"], -1).double().mean(-1)
    return {
        policy: {scope: (total / CONFIG["batches"]).tolist() for scope, total in scopes.items()}
        for policy, scopes in found.items()
    }


@torch.no_grad()
def cost(model: LanguageModel, text: corpus.Corpus, rule: CapacityRule) -> dict:
    """Under this rule: held-out loss; the drop rate, the share of tokens with nothing left, and of the weight that is lost, over all layers."""
    for block in model.blocks:  # a router that was built dropless asks its capacity_factor first
        router = block.feed_forward.router
        router.capacity_factor = router.capacity_rule = rule
    loss = evaluate(model, text, batch_size=CONFIG["batch_size"], seq_len=CONFIG["seq_len"])
    generator, routings = torch.Generator().manual_seed(12345), []
    for _ in range(8):
        tokens, _ = text.batch(
            CONFIG["batch_size"], CONFIG["seq_len"], generator=generator, split="valid"
        )
        routings += model(tokens)[1]
    out = torch.stack([~r.capacity_mask for r in routings])
    weights = torch.stack([r.expert_weights for r in routings])
    return {
        "loss": loss,
        "slots": float(out.double().mean()),
        "tokens": float(out.all(-1).double().mean()),
        "weight": float((weights * out).sum(-1).double().mean()),
    }


def costs(model: LanguageModel, text: corpus.Corpus) -> dict:
    """Without capacity, and with factor 1 under each policy, one queue per batch and one per sequence."""
    torch.manual_seed(11)  # the policy "random"
    found = {"dropless": cost(model, text, CapacityRule())}
    for scope in ("batch", "sequence"):
        for policy in COSTS:
            rule = RuleOfTraining(factor=CONFIG["factor"], drop_policy=policy, scope=scope)
            draws = [cost(model, text, rule) for _ in range(DRAWS if policy == "random" else 1)]
            found[f"{policy}, {scope}"] = {
                key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]
            }
    return found


def with_shared(model: LanguageModel, text: corpus.Corpus) -> dict:
    """A model with a shared expert: what dropping costs when it stands by, and when it takes the dropped slots' weight."""
    rules = {"dropless": CapacityRule()} | {
        f"{policy}, {overflow}": RuleOfTraining(
            factor=CONFIG["factor"], drop_policy=policy, overflow=overflow
        )
        for policy in ("score", "position")
        for overflow in ("drop", "shared")
    }
    return {name: cost(model, text, rule)["loss"] for name, rule in rules.items()}


def main() -> None:
    torch.set_num_threads(1)  # matrices this small do not gain from a second thread
    text, results = corpus.load(), {"drops": [], "cost": [], "shared": []}
    for seed in tqdm(SEEDS, unit="seed"):
        model = build(seed)
        train(model, text, **TRAINING, seed=seed, progress=False)
        model.eval()
        results["drops"].append(drops(model, text))
        results["cost"].append(costs(model, text))
        shared = build(seed, n_shared_experts=1)
        train(shared, text, **TRAINING, seed=seed, progress=False)
        results["shared"].append(with_shared(shared.eval(), text))
    print(
        runs.save(
            "dropping",
            text=text,
            config={**CONFIG, "policies": POLICIES, "costs": COSTS, "draws": DRAWS},
            seeds=SEEDS,
            results=results,
        )
    )


if __name__ == "__main__":
    main()
