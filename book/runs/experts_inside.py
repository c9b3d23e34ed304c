"""What an expert should be made of: gated or not, all routed or one shared, at equal work and equal parameters.

Run it with `python book/runs/experts_inside.py` (about seven minutes on one quiet CPU core); chapter 3 shows experts_inside.json.
"""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch

from moe_book import corpus, runs
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig

SEEDS = [0, 1, 2, 3]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "steps": 250, "lr": 3e-3}
CONFIG = {**SIZES, **TRAINING, "aux_loss_weight": 0.01}
ARMS = {  # fields of MoEConfig: three experts' work a token, eight experts' parameters a layer, in each of them
    "gated": {"n_experts": 8, "top_k": 3, "d_ff": 64},
    "not gated": {"n_experts": 8, "top_k": 3, "d_ff": 96, "glu": False},
    "not gated, over 7.5": {  # starts as small as "gated"
        "n_experts": 8,
        "top_k": 3,
        "d_ff": 96,
        "glu": False,
        "router_options": {"routed_scaling_factor": 1 / 7.5},
    },
    "shared": {"n_experts": 7, "top_k": 2, "d_ff": 64, "n_shared_experts": 1},
    "shared, with a gate": {
        "n_experts": 7,
        "top_k": 2,
        "d_ff": 64,
        "n_shared_experts": 1,
        "shared_gate": True,
    },
    "gated, times 2": {  # starts as large as "shared"
        "n_experts": 8,
        "top_k": 3,
        "d_ff": 64,
        "router_options": {"routed_scaling_factor": 2.0},
    },
    "gated, times 7.5": {  # starts as large as "not gated"
        "n_experts": 8,
        "top_k": 3,
        "d_ff": 64,
        "router_options": {"routed_scaling_factor": 7.5},
    },
}


def config(arm: str) -> LMConfig:
    """The language model of one arm."""
    moe = MoEConfig(
        d_model=CONFIG["d_model"], aux_loss_weight=CONFIG["aux_loss_weight"], **ARMS[arm]
    )
    return LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe)


@torch.no_grad()
def sizes(model: LanguageModel, text: corpus.Corpus) -> list[float]:
    """Root mean square of what each MoE layer adds to the residual stream."""
    found, hooks = [], []
    for block in model.blocks:
        hook = block.feed_forward.register_forward_hook(
            lambda layer, args, out: found.append(out[0].pow(2).mean().sqrt().item())
        )
        hooks.append(hook)
    model(text.batch(16, 64, generator=torch.Generator().manual_seed(7), split="valid")[0])
    for hook in hooks:
        hook.remove()
    return found


def run(arm: str, seed: int, text: corpus.Corpus) -> dict:
    """Train once; the held-out loss on the way, and how large the layers' outputs are before and after."""
    torch.manual_seed(seed)
    model = LanguageModel(config(arm))
    start = sizes(model, text)
    history = train(model, text, **TRAINING, seed=seed, eval_every=25, progress=False)
    return {
        "eval_step": history.eval_step,
        "valid_loss": history.valid_loss,
        "size": {"start": start, "end": sizes(model, text)},
    }


def main() -> None:
    text = corpus.load()
    results = runs.sweep(run, ARMS, SEEDS, text)
    print(
        runs.save(
            "experts_inside",
            text=text,
            config={**CONFIG, "arms": ARMS, "domains": list(text.domains)},
            seeds=SEEDS,
            results=results,
        )
    )


if __name__ == "__main__":
    main()
