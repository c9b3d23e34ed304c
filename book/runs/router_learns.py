"""Does the router learn anything? The same small language model with eight routers that differ in how they choose and what they learn.

Run it with `python book/runs/router_learns.py` (about ten minutes on one quiet CPU core); chapter 2 shows router_learns.json.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch

from moe_book import corpus, runs
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig, TopKRouter

SEEDS = [0, 1, 2, 3]
MORE_SEEDS = [4, 5, 6, 7]  # for the one comparison that four seeds do not settle
MORE = ("learned", "frozen")
SHORT_STEPS = 100
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "lr": 3e-3}
CONFIG = {**SIZES, **TRAINING, "steps": 300, "d_ff": 128, "n_experts": 8}
ROUTERS = {  # name -> top_k, norm_topk_prob, how the router is treated
    "learned": (2, True, "learned"),
    "frozen": (2, True, "frozen"),
    "dice": (2, True, "dice"),
    "top-1 learned": (1, False, "learned"),
    "top-1 frozen": (1, False, "frozen"),
    "top-1 learned, times 8": (1, False, "scaled"),
    "top-1 frozen, times 8": (1, False, "scaled and frozen"),
    "top-1 renormalised": (1, True, "learned"),
}
PASSAGE = b"def mean(values):\n    total = sum(values)\n    return total / 2"


class DiceRouter(TopKRouter):
    """Every visit of every token draws its logits anew: no token can know an expert again."""

    def logits(self, x):
        return 0.16 * torch.randn(*x.shape[:2], self.n_experts, generator=self.dice)


class ScaledRouter(TopKRouter):
    """The weights times E: at the start, where all scores are about 1/E, they are about 1."""

    def forward(self, x, padding_mask=None, token_ids=None):
        routing = super().forward(x, padding_mask)
        return replace(routing, expert_weights=self.n_experts * routing.expert_weights)


def build(seed: int, top_k: int, norm_topk_prob: bool, treatment: str) -> LanguageModel:
    """The model of one run; with one seed, all treatments start from the same weights."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        top_k,
        norm_topk_prob=norm_topk_prob,
        backend="loop",
    )
    model = LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))
    for layer, router in enumerate(routers(model)):
        if treatment == "dice":
            router.__class__, router.dice = (
                DiceRouter,
                torch.Generator().manual_seed(100 * seed + layer),
            )
        if treatment.startswith("scaled"):
            router.__class__ = ScaledRouter
        if treatment in ("frozen", "dice", "scaled and frozen"):
            router.weight.requires_grad_(False)
    return model


def routers(model: LanguageModel) -> list[TopKRouter]:
    """The routers, layer by layer."""
    return [block.feed_forward.router for block in model.blocks]


def run(name: str, seed: int, text: corpus.Corpus, *, steps: int = CONFIG["steps"]) -> dict:
    """Train once, and look at the router: loss, how far its rows turned, how sure it is, how even the load, who takes which byte."""
    model = build(seed, *ROUTERS[name])
    start = [router.weight.detach().clone() for router in routers(model)]
    history = train(model, text, steps=steps, **TRAINING, seed=seed, eval_every=25, progress=False)
    model.eval()
    sample, _ = text.batch(
        32, CONFIG["seq_len"], generator=torch.Generator().manual_seed(3), split="valid"
    )
    with torch.no_grad():
        routings = model(sample)[1]
        passage = model(torch.tensor([list(PASSAGE)]))[1]
        pairs = [(before, router.weight) for before, router in zip(start, routers(model))]
        cosine = [
            torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in pairs
        ]
        length = [
            (after.norm(dim=-1) / before.norm(dim=-1)).mean().item() for before, after in pairs
        ]
    return {
        "eval_step": history.eval_step,
        "valid_loss": history.valid_loss,
        "cosine_to_start": cosine,
        "length_ratio": length,
        "entropy": [-(r.scores * r.scores.log()).sum(-1).mean().item() for r in routings],
        "load": [r.slot_share().tolist() for r in routings],
        "passage_expert": [r.expert_indices[0, :, 0].tolist() for r in passage],
    }


def main() -> None:
    text = corpus.load()
    results = runs.sweep(run, ROUTERS, SEEDS, text)
    for name, more in runs.sweep(run, MORE, MORE_SEEDS, text).items():
        results[name] += more
    short = run("learned", 0, text, steps=SHORT_STEPS)  # what the chapter runs live
    results["short"] = {"eval_step": short["eval_step"], "valid_loss": short["valid_loss"]}
    config = {
        **CONFIG,
        "short_steps": SHORT_STEPS,
        "routers": {name: list(how) for name, how in ROUTERS.items()},
        "domains": list(text.domains),
        "passage": PASSAGE.decode(),
    }
    print(
        runs.save(
            "router_learns", text=text, config=config, seeds=SEEDS + MORE_SEEDS, results=results
        )
    )


if __name__ == "__main__":
    main()
