"""Chapter 1: the same small MoE language model with and without the load-balancing loss, five seeds.

Run: python book/runs/first_run.py   (writes first_run.json beside this file)
"""

import torch
from moe_book import corpus, runs
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig
from tqdm import tqdm

SEEDS = [0, 1, 2, 3, 4]
WEIGHTS = {"without": 0.0, "with": 0.01}
LOGGED = [1, 2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 250, 300, 350, 400]
TRAINING = {"steps": 400, "batch_size": 16, "seq_len": 64, "lr": 3e-3, "eval_every": 50}


def config(aux_loss_weight: float) -> LMConfig:
    """Two layers, eight experts of width 64, two per token."""
    moe = MoEConfig(d_model=64, d_ff=64, n_experts=8, top_k=2, aux_loss_weight=aux_loss_weight)
    return LMConfig(d_model=64, n_layers=2, n_heads=4, max_seq_len=64, moe=moe)


def main() -> None:
    torch.set_num_threads(1)  # faster than two for a model this small, and the same numbers whatever else the machine does
    text = corpus.load()
    results = {name: {"valid_loss": [], "load": []} for name in WEIGHTS}
    bar = tqdm(total=len(SEEDS) * len(WEIGHTS), unit="run")
    for name, weight in WEIGHTS.items():
        for seed in SEEDS:
            torch.manual_seed(seed)
            history = train(LanguageModel(config(weight)), text, seed=seed, progress=False, **TRAINING)
            results[name]["eval_step"] = history.eval_step
            results[name]["valid_loss"].append(history.valid_loss)
            results[name]["load"].append([history.load[step - 1] for step in LOGGED])
            bar.update()
    results["logged_step"] = LOGGED
    runs.save("first_run", config={"model": config(0.01).to_dict(), "training": TRAINING}, seeds=SEEDS, results=results)


if __name__ == "__main__":
    main()
