"""What an expert should be made of: gated or not, all routed or one shared, at equal work and equal parameters.

Run it with `python book/runs/experts_inside.py` (about four minutes on one quiet CPU core); chapter 3 shows experts_inside.json.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # moe_book and moe_core, installed or not

import torch
from moe_book import corpus, runs
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig
from tqdm import tqdm

SEEDS = [0, 1, 2, 3]
CONFIG = {"d_model": 64, "n_layers": 2, "n_heads": 4, "seq_len": 64, "batch_size": 16, "steps": 250, "lr": 3e-3, "aux_loss_weight": 0.01}
ARMS = {  # fields of MoEConfig: three experts' work a token, eight experts' parameters a layer, in each of them
    "gated": {"n_experts": 8, "top_k": 3, "d_ff": 64},
    "not gated": {"n_experts": 8, "top_k": 3, "d_ff": 96, "glu": False},
    "shared": {"n_experts": 7, "top_k": 2, "d_ff": 64, "n_shared_experts": 1},
    "shared, with a gate": {"n_experts": 7, "top_k": 2, "d_ff": 64, "n_shared_experts": 1, "shared_gate": True},
    "gated, times 2": {"n_experts": 8, "top_k": 3, "d_ff": 64, "router_options": {"routed_scaling_factor": 2.0}},
}


def config(arm: str) -> LMConfig:
    """The language model of one arm."""
    moe = MoEConfig(d_model=CONFIG["d_model"], aux_loss_weight=CONFIG["aux_loss_weight"], **ARMS[arm])
    return LMConfig(d_model=CONFIG["d_model"], n_layers=CONFIG["n_layers"], n_heads=CONFIG["n_heads"], max_seq_len=CONFIG["seq_len"], moe=moe)


def run(arm: str, seed: int, text: corpus.Corpus) -> dict:
    """Train once; the held-out loss on the way, and parameters in the layer's experts and those that one token visits."""
    torch.manual_seed(seed)
    model = LanguageModel(config(arm))
    history = train(model, text, steps=CONFIG["steps"], batch_size=CONFIG["batch_size"], seq_len=CONFIG["seq_len"], lr=CONFIG["lr"], seed=seed,
                    eval_every=25, progress=False)
    return {"eval_step": history.eval_step, "valid_loss": history.valid_loss}


def main() -> None:
    torch.set_num_threads(1)  # matrices this small do not gain from a second thread
    text = corpus.load()
    results = {arm: [] for arm in ARMS}
    for seed in tqdm(SEEDS, unit="seed"):
        for arm in ARMS:
            results[arm].append(run(arm, seed, text))
    print(runs.save("experts_inside", config={**CONFIG, "arms": ARMS, "domains": list(text.domains)}, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
