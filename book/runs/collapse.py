"""How collapse looks, and what the balance loss does about it: a small language model with K = 1.

Five coefficients, from 0 to 1. One control: routers that cannot learn. And the coefficient 0.01 that is switched on at some step, or off again.

Run it with `python book/runs/collapse.py` (about fifteen minutes on one quiet CPU core); chapter 5 shows collapse.json.
"""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch
import torch.nn.functional as F

from moe_book import corpus, runs
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig, metrics

SEEDS = [0, 1, 2, 3]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "lr": 3e-3}
CONFIG = {**SIZES, **TRAINING, "steps": 600, "d_ff": 128, "n_experts": 8, "top_k": 1}
COEFFICIENTS = [0.0, 0.001, 0.01, 0.1, 1.0]
SWITCHED = 0.01  # the coefficient of the arms that are switched on or off
FROM_STEPS = [30, 50, 100, 200]  # no balance loss before
UNTIL_STEP = 400  # none after: as many steps with the loss as from step 200
ARMS = [
    *(f"{c:g}" for c in COEFFICIENTS),
    "cannot learn",
    *(f"from {step}" for step in FROM_STEPS),
    f"until {UNTIL_STEP}",
]
SHORT_STEPS = 80
CLAIMS = {
    "switch-coefficient": {
        "claim": "A coefficient of 0.01 balances the load quickly without interfering with the training loss.",
        "source": "switch",
    }
}


def verdicts(results: dict) -> dict:
    """Balanced: at the end, MaxVio is less than half of what it is without the loss, in every seed. Not interfering: the mean held-out loss
    is at most 0.02 nats above that without the loss, at the end. Both: reproduced; the first alone: partly."""

    def mean_violation(arm):
        return [sum(one["max_violation"]) / len(one["max_violation"]) for one in results[arm]]

    without, with_loss = mean_violation("0"), mean_violation("0.01")
    final = {arm: [one["valid_loss"][-1] for one in results[arm]] for arm in ("0", "0.01")}
    cost = sum(b - a for a, b in zip(final["0"], final["0.01"])) / len(final["0"])
    balanced = all(b < a / 2 for a, b in zip(without, with_loss))
    verdict = "not at this scale" if not balanced else "reproduced" if cost <= 0.02 else "partly"
    means = [sum(v) / len(v) for v in (without, with_loss)]
    return {
        "switch-coefficient": {
            "verdict": verdict,
            "because": (
                f"MaxVio {means[1]:.2f} instead of {means[0]:.2f}; held-out loss {cost:+.3f} nats against no balance loss, mean of {len(without)} seeds"
            ),
        }
    }


def build(seed: int, coefficient: float) -> LanguageModel:
    """The model of one run; with one seed, all arms start from the same weights."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        CONFIG["top_k"],
        norm_topk_prob=False,
        aux_loss_weight=coefficient,
        backend="loop",
    )
    return LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))


def forbid_learning(router) -> None:
    """The router keeps its random start, and no gradient goes through it to what stands before it: nothing is learned about the choice."""
    router.weight.requires_grad_(False)
    router.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))


def tokens_alike(x: torch.Tensor) -> float:
    """The mean cosine between two of the tokens x (..., D), each with itself included."""
    return float(F.normalize(x.flatten(0, -2), dim=-1).mean(0).square().sum())


def switches(arm: str) -> dict[int, float]:
    """Step -> the coefficient from there on; 0 is the start."""
    kind, _, step = arm.partition(" ")
    if kind == "cannot":
        return {0: 0.0}
    if kind == "from":
        return {0: 0.0, int(step): SWITCHED}
    if kind == "until":
        return {0: SWITCHED, int(step): 0.0}
    return {0: float(arm)}


def run(arm: str, seed: int, text: corpus.Corpus, *, steps: int = CONFIG["steps"]) -> dict:
    """Train once; log, for each layer, load, router entropy and how alike its tokens are, and at the end held-out loss, load and MaxVio."""
    coefficients = switches(arm)
    model = build(seed, coefficients[0])
    routers, seen = [block.feed_forward.router for block in model.blocks], {}
    for layer, router in enumerate(routers):
        if arm == "cannot learn":
            forbid_learning(router)
        router.register_forward_pre_hook(
            lambda module, inputs, layer=layer: seen.update({layer: inputs[0].detach()})
        )
    start = [router.weight.detach().clone() for router in routers]
    log = {"step": [], "load": [], "entropy": [], "alike": []}

    def look(step, model, routings):
        for router in routers:
            router.aux_loss_weight = coefficients.get(step, router.aux_loss_weight)
        if step == 1 or step % (10 if step <= 100 else 25) == 0:
            log["step"].append(step)
            log["load"].append(
                [[round(v, 3) for v in metrics.load_share(r).tolist()] for r in routings]
            )
            log["entropy"].append([round(metrics.router_entropy(r).item(), 3) for r in routings])
            log["alike"].append([round(tokens_alike(seen[i]), 3) for i in range(len(routings))])

    history = train(
        model,
        text,
        steps=steps,
        **TRAINING,
        seed=seed,
        eval_every=100,
        progress=False,
        on_step=look,
    )
    stayed = all(torch.equal(a, r.weight) for a, r in zip(start, routers))
    assert stayed == (arm == "cannot learn"), arm
    model.eval()
    sample, _ = text.batch(
        32, CONFIG["seq_len"], generator=torch.Generator().manual_seed(3), split="valid"
    )
    with torch.no_grad():
        routings = model(sample)[1]
    return {
        **log,
        "eval_step": history.eval_step,
        "valid_loss": history.valid_loss,
        "valid_load": [metrics.load_share(r).tolist() for r in routings],
        "max_violation": [metrics.max_violation(r).item() for r in routings],
    }


def main() -> None:
    text = corpus.load()
    results = runs.sweep(run, ARMS, SEEDS, text)
    results["short"] = {
        arm: run(arm, 0, text, steps=SHORT_STEPS) for arm in ("0", "0.1")
    }  # what the chapter runs live
    results["verdicts"] = verdicts(results)
    config = {
        **CONFIG,
        "coefficients": COEFFICIENTS,
        "switched": SWITCHED,
        "from_steps": FROM_STEPS,
        "until_step": UNTIL_STEP,
        "short_steps": SHORT_STEPS,
        "domains": list(text.domains),
        "claims": CLAIMS,
    }
    print(runs.save("collapse", text=text, config=config, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
