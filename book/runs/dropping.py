"""Who is dropped? Trained models on real text, at capacity factor 1, under each policy: where in the queue the dropped stand, and what it costs.

Run it with `python book/runs/dropping.py` (about a minute on one quiet CPU core); chapter 6 shows dropping.json.
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
PASSAGE = b'def last(items):\n    """The last of several items, or None."""\n    if not items:\n        return None\n    return items[-1]\n'


def build(seed: int) -> LanguageModel:
    """A small language model whose router never drops in training."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        CONFIG["top_k"],
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
def losses(model: LanguageModel, text: corpus.Corpus) -> dict:
    """Held-out loss without capacity, and with factor 1 under each policy that eval knows."""
    rules = {"dropless": CapacityRule()} | {
        policy: CapacityRule(factor=CONFIG["factor"], drop_policy=policy) for policy in POLICIES[:3]
    }
    found = {}
    for name, rule in rules.items():
        for block in model.blocks:
            block.feed_forward.router.capacity_rule = rule
        found[name] = evaluate(
            model, text, batch_size=CONFIG["batch_size"], seq_len=CONFIG["seq_len"]
        )
    return found


@torch.no_grad()
def passage(model: LanguageModel) -> dict:
    """The experts and weights of a passage's bytes."""
    routing = model(torch.tensor([list(PASSAGE)]))[1][CONFIG["layer"]]
    return {
        "experts": routing.expert_indices[0].tolist(),
        "weights": [[round(w, 3) for w in row] for row in routing.expert_weights[0].tolist()],
    }


def main() -> None:
    torch.set_num_threads(1)  # matrices this small do not gain from a second thread
    text, results = corpus.load(), {"drops": [], "loss": [], "passage": []}
    for seed in tqdm(SEEDS, unit="seed"):
        model = build(seed)
        train(model, text, **TRAINING, seed=seed, progress=False)
        model.eval()
        results["drops"].append(drops(model, text))
        results["passage"].append(passage(model))
        results["loss"].append(losses(model, text))
    print(
        runs.save(
            "dropping",
            text=text,
            config={**CONFIG, "policies": POLICIES, "passage": PASSAGE.decode()},
            seeds=SEEDS,
            results=results,
        )
    )


if __name__ == "__main__":
    main()
