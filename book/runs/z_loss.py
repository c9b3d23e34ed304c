"""Does the z-loss keep the router's logits bounded, and what does it cost? The same small language model with three coefficients.

The learning rate is ten times that of the book's other runs: with theirs the logits hardly grow in so few steps.

Run it with `python book/runs/z_loss.py` (about four minutes on one quiet CPU core); chapter 5 shows z_loss.json.
"""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch

from moe_book import corpus, runs
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig, losses

SEEDS = [0, 1, 2, 3, 4]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "steps": 300, "lr": 3e-2}
CONFIG = {**SIZES, **TRAINING, "d_ff": 128, "n_experts": 8, "top_k": 2, "aux_loss_weight": 0.01}
COEFFICIENTS = [0.0, 0.001, 0.01]
CLAIMS = {
    "z-loss-bounds-logits": {
        "claim": "A router z-loss with the coefficient 0.001 keeps the router's logits small, at no cost in quality.",
        "source": "stmoe",
    }
}


def verdicts(results: dict) -> dict:
    """With 0.001, in every seed: is the mean squared logsumexp below half of what it is without at the end, and are the largest logit and
    the largest absolute logit, at their peak over the run, lower? No cost: mean held-out loss at most 0.01 nats above. All: reproduced; the
    logsumexp and one of the peaks: partly."""

    def last(arm, key):
        return [max(one[key][-1]) for one in results[arm]]

    def peak(arm, key):
        return [max(max(layers) for layers in one[key]) for one in results[arm]]

    pairs = {"z": list(zip(last("0", "z"), last("0.001", "z")))}
    pairs |= {
        key: list(zip(peak("0", key), peak("0.001", key)))
        for key in ("largest", "largest_absolute")
    }
    smaller = all(b < a / 2 for a, b in pairs["z"])
    lower = [all(b < a for a, b in pairs[key]) for key in ("largest", "largest_absolute")]
    final = [[one["valid_loss"][-1] for one in results[arm]] for arm in ("0", "0.001")]
    cost = sum(final[1]) / len(final[1]) - sum(final[0]) / len(final[0])
    verdict = (
        "not at this scale"
        if not (smaller and any(lower))
        else "reproduced"
        if all(lower) and cost <= 0.01
        else "partly"
    )
    mean = {key: [sum(side) / len(side) for side in zip(*values)] for key, values in pairs.items()}
    return {
        "z-loss-bounds-logits": {
            "verdict": verdict,
            "because": (
                f"squared logsumexp {mean['z'][0]:.1f} without and {mean['z'][1]:.1f} with z-loss; peak of the largest logit {mean['largest'][0]:.1f} and "
                f"{mean['largest'][1]:.1f}, of the largest absolute logit {mean['largest_absolute'][0]:.1f} and {mean['largest_absolute'][1]:.1f}; "
                f"held-out loss {cost:+.3f} nats, mean of {len(final[0])} seeds"
            ),
        }
    }


def run(coefficient: float, seed: int, text: corpus.Corpus) -> dict:
    """Train once; on the way, for each layer: mean squared logsumexp, the largest logit, and the largest in absolute value."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        CONFIG["top_k"],
        aux_loss_weight=CONFIG["aux_loss_weight"],
        z_loss_weight=coefficient,
        backend="loop",
    )
    model = LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))
    log = {"step": [], "z": [], "largest": [], "largest_absolute": []}

    def look(step, model, routings):
        if step == 1 or step % 10 == 0:
            log["step"].append(step)
            log["z"].append([losses.z_loss(r).item() for r in routings])
            log["largest"].append([r.logits.max().item() for r in routings])
            log["largest_absolute"].append([r.logits.abs().max().item() for r in routings])

    history = train(
        model, text, **TRAINING, seed=seed, eval_every=100, progress=False, on_step=look
    )
    return {**log, "eval_step": history.eval_step, "valid_loss": history.valid_loss}


def main() -> None:
    text = corpus.load()
    results = {f"{c:g}": found for c, found in runs.sweep(run, COEFFICIENTS, SEEDS, text).items()}
    results["verdicts"] = verdicts(results)
    config = {
        **CONFIG,
        "coefficients": COEFFICIENTS,
        "domains": list(text.domains),
        "claims": CLAIMS,
    }
    print(runs.save("z_loss", text=text, config=config, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
