"""Fine-grained experts at equal FLOPs: the same parameters and the same work per token, cut into fewer or more experts.

Run it with `python book/runs/fine_experts.py` (about seven minutes on one quiet CPU core); chapter 11 shows fine_experts.json.
"""

import statistics
import sys
import time
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
RUN = {"seq_len": 64, "batch_size": 16, "steps": 300, "lr": 3e-3}
ARMS = {  # name -> E routed, K, F, shared, factor on the routed weights
    "4 experts, 1 active": (4, 1, 256, 0, 1.0),
    "8 experts, 2 active": (8, 2, 128, 0, 1.0),
    "16 experts, 4 active": (16, 4, 64, 0, 1.0),
    "32 experts, 8 active": (32, 8, 32, 0, 1.0),
    "31 experts, 7 active, 1 shared": (31, 7, 32, 1, 1.0),
    "32 experts, 8 active, times 2": (
        32,
        8,
        32,
        0,
        2.0,
    ),  # a mean of 8 is half as large as one of 2, where they are independent
}
COARSE, FINE, SHARED = (
    "8 experts, 2 active",
    "32 experts, 8 active",
    "31 experts, 7 active, 1 shared",
)
CLAIMS = {
    "finer-is-better": {
        "claim": "Cut each expert into m and activate m times as many: at the same parameters and FLOPs the model gets better "
        "(DeepSeekMoE's fine-grained segmentation; OLMoE finds the same and settles on 64 experts with 8 active).",
        "source": "deepseekmoe",
    },
    "no-shared-expert": {
        "claim": "Against DeepSeekMoE's advice, setting one of the fine-grained experts apart as a shared one does not help.",
        "source": "olmoe",
    },
}
ENOUGH = 0.01  # nats per byte: a smaller mean difference is none


def build(seed: int, E: int, K: int, F: int, shared: int, factor: float) -> LanguageModel:
    """The model of one run. A token's K weights are renormalised, except where K = 1."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        SIZES["d_model"],
        F,
        E,
        K,
        norm_topk_prob=K > 1,
        aux_loss_weight=0.01,
        n_shared_experts=shared,
        router_options={"routed_scaling_factor": factor},
    )
    return LanguageModel(LMConfig(**SIZES, max_seq_len=RUN["seq_len"], moe=moe))


def run(name: str, seed: int, text: corpus.Corpus) -> dict:
    """Train once: held-out loss, processor time a step, and how even the load is."""
    model, marks = build(seed, *ARMS[name]), [time.process_time()]
    history = train(
        model,
        text,
        **RUN,
        seed=seed,
        progress=False,
        on_step=lambda *_: marks.append(time.process_time()),
    )
    late = history.load[-len(history.load) // 5 :]
    violation = statistics.fmean(max(share) * len(share) - 1 for layers in late for share in layers)
    return {
        "held_out": history.valid_loss[-1],
        "step_ms": 1000 * statistics.median(b - a for a, b in zip(marks, marks[1:])),
        "max_violation": violation,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def differences(results: dict, one: str, other: str) -> list[float]:
    """Held-out loss of one arm minus that of the other, seed by seed."""
    return [a - b for a, b in zip(results[one]["held_out"], results[other]["held_out"])]


def verdicts(results: dict) -> dict:
    """An effect counts when every seed has its sign and its mean is at least ENOUGH; "partly" when only the mean is."""
    fine, shared = differences(results, FINE, COARSE), differences(results, SHARED, FINE)
    mean, said = statistics.fmean(fine), {}
    clear = mean <= -ENOUGH and max(fine) < 0
    said["finer-is-better"] = {
        "verdict": "reproduced" if clear else "partly" if mean <= -ENOUGH else "not at this scale",
        "because": f"32 experts with 8 active minus 8 with 2: {mean:+.3f} nats per byte in the mean of {len(fine)} seeds "
        f"({min(fine):+.3f} to {max(fine):+.3f})",
    }
    mean = statistics.fmean(shared)
    helps = mean <= -ENOUGH and max(shared) < 0
    said["no-shared-expert"] = {
        "verdict": "not at this scale" if helps else "partly" if mean <= -ENOUGH else "reproduced",
        "because": f"with a shared expert minus without: {mean:+.3f} nats per byte in the mean of {len(shared)} seeds "
        f"({min(shared):+.3f} to {max(shared):+.3f})",
    }
    return said


def main() -> None:
    found = runs.sweep(run, ARMS, SEEDS, (text := corpus.load()))
    results = {
        name: {key: [each[key] for each in runs_] for key in runs_[0]}
        for name, runs_ in found.items()
    }
    config = {
        **SIZES,
        **RUN,
        "arms": {name: list(arm) for name, arm in ARMS.items()},
        "claims": CLAIMS,
    }
    print(
        runs.save(
            "fine_experts",
            text=text,
            config=config,
            seeds=SEEDS,
            results={**results, "verdicts": verdicts(results)},
        )
    )


if __name__ == "__main__":
    main()
