"""Does capacity stop collapse, and which factor is enough? One small language model with and without capacity, with and without a balance loss.

Three controls: routers that cannot learn at all; a shared expert that takes over the dropped slots, so that the router feels them; and a
factor that changes after the first hundred steps.

Run it with `python book/runs/capacity.py` (about fifteen minutes on one quiet CPU core); chapter 6 shows capacity.json.
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
# name -> capacity factor in training (None: dropless), coefficient of the balance loss, treatment
ARMS = {
    "dropless, no balance loss": (None, 0.0, ""),
    "capacity 1.25, no balance loss": (1.25, 0.0, ""),
    "dropless, balance loss": (None, BALANCE, ""),
    "capacity 1.0, balance loss": (1.0, BALANCE, ""),
    "capacity 1.25, balance loss": (1.25, BALANCE, ""),
    "capacity 1.5, balance loss": (1.5, BALANCE, ""),
    "capacity 2.0, balance loss": (2.0, BALANCE, ""),
    "dropless, cannot learn": (None, 0.0, "cannot learn"),
    "capacity 1.25, cannot learn": (1.25, 0.0, "cannot learn"),
    "capacity 1.25, shared expert beside": (1.25, 0.0, "beside"),
    "capacity 1.25, shared expert takes over": (1.25, 0.0, "takes over"),
    "capacity 2.0, then 1.25, balance loss": (2.0, BALANCE, 1.25),
    "capacity 1.25, then 2.0, balance loss": (1.25, BALANCE, 2.0),
}
CHANGE = 100  # the step after which the last two arms take the other factor
EVAL_FACTORS = [1.0, 1.25, 1.5, 2.0, 4.0, None]
SHIFTED_FACTORS = [1.25, 2.0, None]  # judged on the text of another mixture, too


def routers(model: LanguageModel) -> list:
    return [block.feed_forward.router for block in model.blocks]


def limit(model: LanguageModel, rule: CapacityRule) -> None:
    """From now on with this rule; a router that was built dropless asks its capacity_factor first."""
    for router in routers(model):
        router.capacity_factor = router.capacity_rule = rule


def build(seed: int, factor: float | None, balance: float, treatment: str | float) -> LanguageModel:
    """The model of one run; with one seed, all arms without a shared expert start from the same weights."""
    torch.manual_seed(seed)
    overflow = "shared" if treatment == "takes over" else "drop"
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        CONFIG["top_k"],
        capacity_factor=factor and CapacityRule(factor, overflow=overflow),
        n_shared_experts=int(treatment in ("beside", "takes over")),
        aux_loss_weight=balance,
        backend="loop",
    )
    model = LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))
    if treatment == "cannot learn":
        for router in routers(model):  # neither by its weights nor by what it is shown
            router.weight.requires_grad_(False)
            router.register_forward_pre_hook(lambda _m, args: (args[0].detach(), *args[1:]))
    return model


def in_points(curve_SL: list) -> list:
    """(steps, layers) -> (layers, points): means over EVERY steps."""
    return torch.tensor(curve_SL, dtype=torch.float64).unflatten(0, (-1, EVERY)).mean(1).T.tolist()


@torch.no_grad()
def judge(model: LanguageModel, text: corpus.Corpus, factor: float | None, split="valid") -> dict:
    """Held-out loss and drop rate with this factor in eval."""
    overflow = routers(model)[0].capacity_rule.overflow
    limit(model, CapacityRule(eval_factor=factor, overflow=overflow))
    model.eval()
    sizes = {"batch_size": CONFIG["batch_size"], "seq_len": CONFIG["seq_len"]}
    generator, routings = torch.Generator().manual_seed(7), []
    for _ in range(4):
        routings += model(text.batch(**sizes, generator=generator, split=split)[0])[1]
    return {
        "loss": evaluate(model, text, **sizes, split=split),
        "drop_rate": float(metrics.drop_rate(routings)),
    }


def run(name: str, seed: int, text: corpus.Corpus) -> dict:
    """Train once; the busiest expert's share of the wishes and the drop rate over the steps, then the loss under several factors."""
    model, busiest, dropped = build(seed, *ARMS[name]), [], []
    treatment = ARMS[name][2]

    def look(step, model, routings):
        busiest.append([float(r.slot_share().max()) for r in routings])
        dropped.append([float(r.drop_rate) for r in routings])
        if step == CHANGE and isinstance(treatment, float):
            limit(model, CapacityRule(treatment))

    train(model, text, **TRAINING, seed=seed, progress=False, on_step=look)
    return {
        "busiest": in_points(busiest),
        "drop_rate": in_points(dropped),
        "eval": {str(factor): judge(model, text, factor) for factor in EVAL_FACTORS},
        "shifted": {str(f): judge(model, text, f, "shifted") for f in SHIFTED_FACTORS},
    }


def main() -> None:
    results = runs.sweep(run, ARMS, SEEDS, (text := corpus.load()))
    config = {
        **CONFIG,
        "arms": {name: list(arm) for name, arm in ARMS.items()},
        "every": EVERY,
        "change": CHANGE,
        "eval_factors": EVAL_FACTORS,
    }
    print(runs.save("capacity", text=text, config=config, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
