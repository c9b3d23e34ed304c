"""Chapter 1: the same small MoE language model with and without the load-balancing loss, five seeds.

Run: python book/runs/first_run.py   (writes first_run.json beside this file)
"""

import torch

from moe_book import corpus, runs
from moe_book.training import History, train
from moe_core import LanguageModel, LMConfig, MoEConfig

SEEDS = [0, 1, 2, 3, 4]
WEIGHTS = {"without": 0.0, "with": 0.01}
LOGGED = [1, 2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 250, 300, 350, 400]
TRAINING = {"steps": 400, "batch_size": 16, "seq_len": 64, "lr": 3e-3, "eval_every": 50}


def config(aux_loss_weight: float) -> LMConfig:
    """Two layers, eight experts of width 64, two per token."""
    moe = MoEConfig(d_model=64, d_ff=64, n_experts=8, top_k=2, aux_loss_weight=aux_loss_weight)
    return LMConfig(d_model=64, n_layers=2, n_heads=4, max_seq_len=64, moe=moe)


def run(name: str, seed: int, text: corpus.Corpus) -> History:
    """Train once; with one seed, both start from the same weights."""
    torch.manual_seed(seed)
    return train(LanguageModel(config(WEIGHTS[name])), text, seed=seed, progress=False, **TRAINING)


def main() -> None:
    text = corpus.load()
    results = {
        name: {
            "eval_step": histories[0].eval_step,
            "valid_loss": [history.valid_loss for history in histories],
            "load": [[history.load[step - 1] for step in LOGGED] for history in histories],
        }
        for name, histories in runs.sweep(run, WEIGHTS, SEEDS, text).items()
    }
    results["logged_step"] = LOGGED
    runs.save(
        "first_run",
        text=text,
        config={"model": config(0.01).to_dict(), "training": TRAINING},
        seeds=SEEDS,
        results=results,
    )


if __name__ == "__main__":
    main()
