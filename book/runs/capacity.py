"""Does capacity stop collapse, and which factor is enough? One small language model with and without capacity, with and without a balance loss.

Run it with `python book/runs/capacity.py` (about seven minutes on one quiet CPU core); chapter 6 shows capacity.json.
"""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch

from moe_book import corpus, runs
from moe_book.training import evaluate, train
from moe_core import LanguageModel, LMConfig, MoEConfig, metrics
from moe_core.capacity import CapacityRule

SEEDS = [0, 1, 2, 3]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "steps": 300, "lr": 3e-3}
CONFIG = {**SIZES, **TRAINING, "d_ff": 128, "n_experts": 8, "top_k": 2}
BALANCE = 0.01
EVERY = 10  # steps that are averaged into one point of a curve
ARMS = {  # name -> capacity factor in training (None: dropless), coefficient of the balance loss
    "dropless, no balance loss": (None, 0.0),
    "capacity 1.25, no balance loss": (1.25, 0.0),
    "dropless, balance loss": (None, BALANCE),
    "capacity 1.0, balance loss": (1.0, BALANCE),
    "capacity 1.25, balance loss": (1.25, BALANCE),
    "capacity 1.5, balance loss": (1.5, BALANCE),
    "capacity 2.0, balance loss": (2.0, BALANCE),
}
EVAL_FACTORS = [1.0, 1.25, 1.5, 2.0, 4.0, None]


def build(seed: int, factor: float | None, balance: float) -> LanguageModel:
    """The model of one run; with one seed, all arms start from the same weights."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        CONFIG["top_k"],
        capacity_factor=factor,
        aux_loss_weight=balance,
        backend="loop",
    )
    return LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))


def in_points(curve_SL: list) -> list:
    """(steps, layers) -> (layers, points): means over EVERY steps."""
    return torch.tensor(curve_SL, dtype=torch.float64).unflatten(0, (-1, EVERY)).mean(1).T.tolist()


@torch.no_grad()
def judge(model: LanguageModel, text: corpus.Corpus, factor: float | None) -> dict:
    """Held-out loss and drop rate with this factor in eval."""
    for block in model.blocks:
        block.feed_forward.router.capacity_rule = CapacityRule(eval_factor=factor)
    model.eval()
    generator, routings = torch.Generator().manual_seed(7), []
    for _ in range(4):
        routings += model(
            text.batch(CONFIG["batch_size"], CONFIG["seq_len"], generator=generator, split="valid")[
                0
            ]
        )[1]
    return {
        "loss": evaluate(model, text, batch_size=CONFIG["batch_size"], seq_len=CONFIG["seq_len"]),
        "drop_rate": float(metrics.drop_rate(routings)),
    }


def run(name: str, seed: int, text: corpus.Corpus) -> dict:
    """Train once; the busiest expert's share of the wishes and the drop rate over the steps, then the loss under several factors."""
    model, busiest, dropped = build(seed, *ARMS[name]), [], []

    def look(_step, _model, routings):
        busiest.append([float(r.slot_share().max()) for r in routings])
        dropped.append([float(r.drop_rate) for r in routings])

    train(model, text, **TRAINING, seed=seed, progress=False, on_step=look)
    judged = {str(factor): judge(model, text, factor) for factor in EVAL_FACTORS}
    return {"busiest": in_points(busiest), "drop_rate": in_points(dropped), "eval": judged}


def main() -> None:
    results = runs.sweep(run, ARMS, SEEDS, (text := corpus.load()))
    config = {
        **CONFIG,
        "arms": {name: list(arm) for name, arm in ARMS.items()},
        "every": EVERY,
        "eval_factors": EVAL_FACTORS,
    }
    print(runs.save("capacity", text=text, config=config, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
