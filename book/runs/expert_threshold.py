"""Chapter 10: expert threshold against expert choice, token choice and a dense model; and what warm-up and band are good for.

Run it with `python book/runs/expert_threshold.py` (about eleven minutes on one quiet CPU core); it writes expert_threshold.json. With
`--resume` it keeps the runs that file has and makes those it lacks.

Proportions as in the paper (arXiv 2603.11535), sizes as a laptop allows: one routed expert per token on average and one shared one, no
auxiliary loss, a memory of a twentieth of the run, four memories of warm-up.
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch
import torch.nn.functional as F

from moe_book import corpus, runs, training
from moe_core import (
    ExpertThresholdRouter,
    LanguageModel,
    LMConfig,
    MoEConfig,
    TopKRouter,
    losses,
    metrics,
)
from moe_core.lm import next_token_loss
from moe_core.routers.token_shares import take_best

SEEDS = [0, 1, 2]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "lr": 3e-3}
CONFIG = {
    **SIZES,
    **TRAINING,
    "steps": 400,
    "d_ff": 64,
    "n_experts": 8,
    "top_k": 1,
    "n_shared_experts": 1,
    "ema_decay": 0.95,
    "warmup_steps": 80,
    "capacity_band": 0.5,
    "aux_loss_weight": 0.01,
    "bias_update_rate": 0.005,
    "live_steps": 100,
}
TOKEN_CHOICE = {
    "score_func": "sigmoid",
    "norm_topk_prob": False,
}  # weights as large as the others': what differs is the choice
LONG, LONG_STEPS = 0.99, 600
NEVER = 10**6  # longer than the run: warms up, that is, lets experts choose, all the time
ARMS = {  # name -> router, its options, aux_loss_weight
    "dense": None,
    "token choice, balance loss": ("topk", TOKEN_CHOICE, CONFIG["aux_loss_weight"]),
    "token choice, bias": (
        "loss_free",
        {**TOKEN_CHOICE, "bias_update_rate": CONFIG["bias_update_rate"]},
        0,
    ),
    "expert choice, one sequence": (
        "expert_threshold",
        {"warmup_steps": NEVER, "pool": "sequence"},
        0,
    ),
    "expert choice, whole batch": ("expert_threshold", {"warmup_steps": NEVER}, 0),
    "threshold": (
        "expert_threshold",
        {"warmup_steps": CONFIG["warmup_steps"], "capacity_band": CONFIG["capacity_band"]},
        0,
    ),
    "threshold, no band": ("expert_threshold", {"warmup_steps": CONFIG["warmup_steps"]}, 0),
    "threshold, no warm-up": (
        "expert_threshold",
        {"warmup_steps": 0, "capacity_band": CONFIG["capacity_band"]},
        0,
    ),
    "threshold, neither": ("expert_threshold", {"warmup_steps": 0}, 0),
    # A second look, added when the four above did not starve: a memory as long as the time in which logits settle, and warm-ups that
    # are none of it, most of it, and three of it; LONG_STEPS, so that the longest one also has time to starve. No verdict rests on it.
    "long memory, no warm-up": ("expert_threshold", {"warmup_steps": 0, "ema_decay": LONG}, 0),
    "long memory, warm-up 80": ("expert_threshold", {"warmup_steps": 80, "ema_decay": LONG}, 0),
    "long memory, warm-up 300": ("expert_threshold", {"warmup_steps": 300, "ema_decay": LONG}, 0),
}
PASSAGE = "def mean(values):\n    # add up, then divide\n    total = sum(values)\n    return total / len(values)\n"
CLAIMS = {
    "equal": {
        "claim": "With a large pool, expert choice (evaluated by its cutoffs) and expert threshold reach the same loss: "
        "2.841 to 2.845 and 2.844.",
        "source": "expertthreshold",
    },
    "better": {
        "claim": "Both beat token choice, with or without balance loss or bias, by about 0.05 nats per token: 2.892 to 2.898.",
        "source": "expertthreshold",
    },
    "pool": {
        "claim": "Expert choice with a small pool is worse than with a large one, evaluated causally: 2.910 against 2.841 to 2.845.",
        "source": "expertthreshold",
    },
    "starves": {
        "claim": "Without the warm-up by expert choice, experts starve; the loss does not show it: 2.844 with and without.",
        "source": "expertthreshold",
    },
}
SAME, SEEN, STARVED = (
    0.02,
    0.005,
    0.1,
)  # nats per byte, nats per byte, share of an expert's fair load; chosen before the final run


class SequencePool(ExpertThresholdRouter):
    """Expert choice within each sequence: k best of N tokens in training; the cutoff to remember is the mean over sequences."""

    def forward(self, x, padding_mask=None, token_ids=None):
        if not self.training:
            return super().forward(x, padding_mask)
        h = self.logits(x)
        k = torch.full((len(x), self.n_experts), int(x.shape[1] * self.share))
        chosen = take_best(h, torch.ones(x.shape[:2], dtype=torch.bool), k)
        return self.routing(self.every_expert(x), h.sigmoid(), h, h.sigmoid(), selected_BNK=chosen)

    def update(self, routings):
        super().update(
            [
                replace(r, expert_indices=r.expert_indices[b : b + 1], logits=r.logits[b : b + 1])
                for r in routings
                for b in range(len(r.logits))
            ]
        )


class BalancedTopK(TopKRouter):
    """The balance loss on scores divided by their sum: sigmoids do not sum to 1."""

    def balance_loss(self, routing):
        return losses.load_balance(routing, relative_scores=True)


def build(name: str, seed: int) -> LanguageModel:
    """The model of one run; with one seed, all of them start from the same weights where they have the same."""
    router, options, aux = ARMS[name] or ARMS["threshold"]
    options = dict(options)
    pool = options.pop("pool", "batch")
    own = {key: options.pop(key) for key in ("norm_topk_prob",) if key in options}
    if router == "expert_threshold":
        options.setdefault("ema_decay", CONFIG["ema_decay"])
    moe = MoEConfig(
        CONFIG["d_model"],
        CONFIG["d_ff"],
        CONFIG["n_experts"],
        CONFIG["top_k"],
        router=router,
        router_options=options,
        backend="loop",
        n_shared_experts=CONFIG["n_shared_experts"],
        **own,
        **({"aux_loss_weight": aux} if aux else {}),
    )
    config = LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe)
    torch.manual_seed(seed)
    model = LanguageModel(config.dense_twin() if ARMS[name] is None else config)
    for router in routers(model):
        if pool == "sequence":
            router.__class__ = SequencePool
        if type(router) is TopKRouter:
            router.__class__ = BalancedTopK
    return model


def routers(model: LanguageModel) -> list:
    """The routers, layer by layer; none in a dense model."""
    return [
        block.feed_forward.router for block in model.blocks if hasattr(block.feed_forward, "router")
    ]


def steps_of(name: str) -> int:
    """How long an arm is trained."""
    return LONG_STEPS if name.startswith("long memory") else CONFIG["steps"]


def run(name: str, seed: int, text: corpus.Corpus, *, steps: int | None = None) -> dict:
    """Train once. Held-out loss along the way; how many tokens each expert asks for, every ten steps; and a look at the end."""
    model, cutoffs, asked = build(name, seed), [], {"step": [], "share": []}

    def on_step(step, model, routings):
        """The share of tokens above the threshold that was in force, before warm-up or band change it; else the load."""
        if ARMS[name] and ARMS[name][0] == "expert_threshold":
            above = [
                (r.logits > c).float().mean((0, 1)).tolist() for r, c in zip(routings, cutoffs)
            ]
            cutoffs[:] = [router.thresholds for router in routers(model)]
        else:
            above = [(r.slots_per_expert() / r.real_tokens.sum()).tolist() for r in routings]
        if step % 10 == 0 and above:
            asked["step"].append(step)
            asked["share"].append(above)

    cutoffs[:] = [r.thresholds for r in routers(model) if hasattr(r, "thresholds")]
    history = training.train(
        model,
        text,
        steps=steps or steps_of(name),
        **TRAINING,
        seed=seed,
        eval_every=50,
        progress=False,
        on_step=on_step,
    )
    found = {"eval_step": history.eval_step, "valid_loss": history.valid_loss, "asked": asked}
    return found | look(model, text, passage=seed == SEEDS[0])


@torch.no_grad()
def look(model: LanguageModel, text: corpus.Corpus, *, passage: bool) -> dict:
    """Held-out text once more, more of it: the loss, and per token how hard it was and how many experts it got."""
    windows = torch.Generator().manual_seed(7)
    tokens, domain_B = text.batch(256, CONFIG["seq_len"], generator=windows, split="valid")
    model.eval()
    logits, routings = model(tokens)
    loss_BN = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    found = {
        "final_loss": round(loss_BN.mean().item(), 4)
    }  # as stored, so that verdicts can be checked against the file
    if not routings:
        return found
    model.train()
    found["final_loss_as_trained"] = training_loss(model, tokens)
    model.eval()
    visits_BN = sum(metrics.expert_sets(r).sum(-1) for r in routings)[
        :, :-1
    ]  # over all layers, where the next byte is predicted
    tenths = loss_BN.flatten().argsort().chunk(10)  # from the easiest tenth to the hardest
    found |= {
        "share": [(r.slots_per_expert() / r.real_tokens.sum()).tolist() for r in routings],
        "per_token": [
            torch.bincount(
                metrics.expert_sets(r).sum(-1).flatten(), minlength=CONFIG["n_experts"] + 1
            ).tolist()
            for r in routings
        ],
        "visits_by_loss": [visits_BN.flatten()[tenth].float().mean().item() for tenth in tenths],
        "loss_by_loss": [loss_BN.flatten()[tenth].mean().item() for tenth in tenths],
        "visits_by_domain": [
            visits_BN[domain_B == d].float().mean().item() for d in range(len(text.domains))
        ],
        "correlation": torch.corrcoef(
            torch.stack([loss_BN.flatten(), visits_BN.flatten().float()])
        )[0, 1]
        .nan_to_num()
        .item(),  # 0: all alike
    }
    if passage:
        ids = torch.tensor([list(PASSAGE.encode())])
        parts = [
            model(ids[:, i : i + CONFIG["seq_len"]])[1]
            for i in range(0, ids.shape[1], CONFIG["seq_len"])
        ]
        found["passage_visits"] = [
            torch.cat([metrics.expert_sets(p[layer]).sum(-1)[0] for p in parts]).tolist()
            for layer in range(len(routings))
        ]
    return found


def training_loss(model: LanguageModel, tokens: torch.Tensor) -> float:
    """The same windows as in training: in its batches, with the experts choosing where they do."""
    batches = tokens.split(CONFIG["batch_size"])
    return fmean(float(next_token_loss(model(batch)[0], batch)) for batch in batches)


def starved(one: dict, *, since: float = 0.8) -> int:
    """How many experts, of all layers, were asked for by less than a tenth of their fair share over the last fifth of the steps."""
    share_SLE = torch.tensor(one["asked"]["share"])[int(since * len(one["asked"]["step"])) :]
    return int((share_SLE.mean(0) < STARVED * CONFIG["top_k"] / CONFIG["n_experts"]).sum())


def verdicts(results: dict) -> dict:
    """What the runs say about each claim, by rules that stood before the runs did.

    Two arms are the same if their mean losses differ by at most SAME; one beats another if it is lower in every seed, by SEEN on average.
    """
    loss = {
        name: [one["final_loss"] for one in arms] for name, arms in results.items() if name in ARMS
    }
    ahead = lambda a, b: [y - x for x, y in zip(loss[a], loss[b])]
    beats = lambda a, b: min(ahead(a, b)) > 0 and fmean(ahead(a, b)) >= SEEN
    same = lambda a, b: abs(fmean(ahead(a, b))) <= SAME
    say = lambda a, b: " ".join(f"{x:+.3f}" for x in ahead(a, b))
    grade = lambda *parts: (
        "reproduced" if all(parts) else "partly" if any(parts) else "not at this scale"
    )
    large, small, threshold, naked = (
        "expert choice, whole batch",
        "expert choice, one sequence",
        "threshold",
        "threshold, neither",
    )
    token_choice = [name for name in loss if name.startswith("token choice")]
    pairs = [(mine, theirs) for mine in (large, threshold) for theirs in token_choice]
    hungry = {
        name: [starved(one) for one in results[name]] for name in (naked, "threshold, no band")
    }
    return {
        "equal": {
            "verdict": "reproduced" if same(threshold, large) else "not at this scale",
            "because": f"threshold is ahead of large-pool expert choice by {say(threshold, large)} nats per byte, seed by seed",
        },
        "better": {
            "verdict": grade(*(beats(a, b) for a, b in pairs)),
            "because": "; ".join(f"{a} is ahead of {b} by {say(a, b)}" for a, b in pairs),
        },
        "pool": {
            "verdict": grade(beats(large, small)),
            "because": f"the large pool is ahead of the small one by {say(large, small)}",
        },
        "starves": {
            "verdict": grade(
                min(hungry[naked]) > 0 and max(hungry["threshold, no band"]) == 0,
                same(naked, "threshold, no band"),
            ),
            "because": f"without the band, starved experts at the end, seed by seed: {hungry[naked]} without warm-up, "
            f"{hungry['threshold, no band']} with it; in loss, warm-up is ahead by {say('threshold, no band', naked)}",
        },
    }


def main() -> None:
    text = corpus.load()
    kept = runs.load("expert_threshold")["results"] if "--resume" in sys.argv else {}
    made = runs.sweep(run, [name for name in ARMS if name not in kept], SEEDS, text)
    results = {name: kept.get(name) or made[name] for name in ARMS}
    live = run("threshold", 0, text, steps=CONFIG["live_steps"])  # what the chapter runs live
    results["live"] = {key: live[key] for key in ("eval_step", "valid_loss", "final_loss")}
    results["verdicts"] = verdicts(results)
    config = {
        **CONFIG,
        "long_memory": LONG,
        "long_steps": LONG_STEPS,
        "arms": list(ARMS),
        "claims": CLAIMS,
        "domains": list(text.domains),
        "passage": PASSAGE,
        "starved_below": STARVED,
        "same": SAME,
        "seen": SEEN,
    }
    print(runs.save("expert_threshold", text=text, config=config, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
