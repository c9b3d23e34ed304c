"""Does expert choice read the future? One small language model, with token choice and with expert choice in pools of four sizes.

Within a seed all arms start from the same weights and read the same batches; all weights are sigmoids of the logits, so that arms differ in
who chooses and among how many tokens. Run it with `python book/runs/expert_choice_leaks.py` (about eleven minutes on one quiet CPU core);
chapter 9 shows expert_choice_leaks.json.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch
import torch.nn.functional as F

from moe_book import corpus, runs
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig, metrics
from moe_core.routers.expert_choice import ExpertChoiceRouter

SEEDS = [0, 1, 2]
SHORT_STEPS = 100
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 64, "batch_size": 16, "lr": 3e-3}
CONFIG = {
    **SIZES,
    **TRAINING,
    "steps": 300,
    "d_ff": 128,
    "n_experts": 8,
    "top_k": 2,
    "aux_loss_weight": 0.01,
    "windows": 64,
    "probe_bytes": 4,
    "probe_windows": 1024,
    "probe_steps": 600,
}
ARMS = {
    "token choice": 0,
    "token choice, no loss": 0,  # the control: what the balance loss of token choice costs
    "pool 4": 4,
    "pool 16": 16,
    "pool 64": 64,
    "pool 1024": 1024,
}  # name -> tokens an expert chooses among; 0: tokens choose
PASSAGE = b'def mean(values):\n    """The average of some values"""\n    if not values:\n        return 0\n    return sum(values) / len(values)\n'
CLAIMS = {
    "expert-choice-leaks": {
        "claim": "Expert choice breaks causality in a language model: with a pool (chunk) as small as 512 tokens, the training loss drops "
        "abnormally, by about 10 %, because tokens read the future out of the routing.",
        "source": "lossfree",
    }
}


class PooledExpertChoice(ExpertChoiceRouter):
    """Expert choice within pools of ``pool`` tokens that follow each other; in the whole batch if it is smaller."""

    def forward(self, x, padding_mask=None, token_ids=None):
        B, N, D = x.shape
        size = min(self.pool, B * N)
        mask = None if padding_mask is None else padding_mask.reshape(-1, size)
        routing = super().forward(x.reshape(-1, size, D), mask)
        fields = (
            "expert_indices",
            "expert_weights",
            "capacity_mask",
            "logits",
            "scores",
            "drop_reason",
        )
        return replace(
            routing,
            capacity=routing.capacity * (B * N // size),
            capacity_scope="batch",
            padding_mask=padding_mask,
            **{name: getattr(routing, name).reshape(B, N, -1) for name in fields},
        )


class CutoffRouter(ExpertChoiceRouter):
    """The causal stand-in: an expert takes a token whose score is above the fixed ``cutoff_E``, whatever the other tokens are."""

    def forward(self, x, padding_mask=None, token_ids=None):
        logits_BNE = self.logits(x)
        scores_BNE = logits_BNE.sigmoid()
        return self.routing(
            self.every_expert(x),
            scores_BNE,
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
            selected_BNK=scores_BNE > self.cutoff_E,
        )


def build(seed: int, pool: int, aux_loss_weight: float = 0.0) -> LanguageModel:
    """The model of one run; with one seed, all arms start from the same weights."""
    torch.manual_seed(seed)
    common = {
        "d_model": CONFIG["d_model"],
        "d_ff": CONFIG["d_ff"],
        "n_experts": CONFIG["n_experts"],
        "top_k": CONFIG["top_k"],
        "backend": "loop",
    }
    if pool == 0:
        moe = MoEConfig(
            **common,
            aux_loss_weight=aux_loss_weight,
            norm_topk_prob=False,
            router_options={"score_func": "sigmoid"},
        )
    else:
        moe = MoEConfig(
            **common,
            router="expert_choice",
            router_options={"score_func": "sigmoid", "scope": "sequence"},
        )
    model = LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))
    for router in routers(model) if pool else []:
        router.__class__, router.pool = PooledExpertChoice, pool
    return model


def routers(model: LanguageModel) -> list:
    """The routers, layer by layer."""
    return [block.feed_forward.router for block in model.blocks]


def held_out(text: corpus.Corpus, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of held-out text, and as many others of the same domains, one for one: the false futures."""
    generator = torch.Generator().manual_seed(77)
    tokens, labels = text.batch(windows, CONFIG["seq_len"], generator=generator, split="valid")
    others = [
        text.batch(
            1, CONFIG["seq_len"], generator=generator, split="valid", domain=text.domains[label]
        )[0]
        for label in labels.tolist()
    ]
    return tokens, torch.cat(others)


def loss_at(logits: torch.Tensor, tokens: torch.Tensor, t: int) -> float:
    """Mean cross-entropy in nats of the byte after position t."""
    return F.cross_entropy(logits[:, t], tokens[:, t + 1]).item()


@torch.no_grad()
def losses_by_position(
    model: LanguageModel, tokens: torch.Tensor, others: torch.Tensor
) -> dict[str, list[float]]:
    """The loss of every byte, by its position, with three futures: the true one, one from another text, and none at all."""
    model.eval()
    found = {"true": [], "false": [], "none": []}
    positions = torch.arange(tokens.shape[1])
    for at in range(
        0, len(tokens), CONFIG["batch_size"]
    ):  # pools may span a batch, so batches are as in training
        here, other = tokens[at : at + CONFIG["batch_size"]], others[at : at + CONFIG["batch_size"]]
        whole = model(here)[0]
        found["true"].append([loss_at(whole, here, t) for t in range(here.shape[1] - 1)])
        found["false"].append(
            [
                loss_at(model(torch.where(positions <= t, here, other))[0], here, t)
                for t in range(here.shape[1] - 1)
            ]
        )
        found["none"].append(
            [
                loss_at(model(here, (positions <= t).expand_as(here))[0], here, t)
                for t in range(here.shape[1] - 1)
            ]
        )
    return {name: torch.tensor(rows).mean(0).tolist() for name, rows in found.items()}


@torch.no_grad()
def with_cutoffs(model: LanguageModel, text: corpus.Corpus) -> None:
    """Turn the routers into CutoffRouters: the cutoffs let through G of E on training text, as it is routed in training."""
    model.eval()
    generator = torch.Generator().manual_seed(78)
    batches = [
        text.batch(CONFIG["batch_size"], CONFIG["seq_len"], generator=generator)[0]
        for _ in range(32)
    ]
    layers = zip(*(model(tokens)[1] for tokens in batches))
    for router, routings in zip(routers(model), layers):
        scores_TE = torch.cat([routing.scores.flatten(0, 1) for routing in routings])
        router.cutoff_E = scores_TE.quantile(1 - CONFIG["top_k"] / CONFIG["n_experts"], dim=0)
        router.__class__ = CutoffRouter


@torch.no_grad()
def routed_text(
    model: LanguageModel, text: corpus.Corpus, windows: int, split: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (W, N), and who took them in all layers, as 0 and 1: (W, N, layers * E)."""
    generator = torch.Generator().manual_seed(79)
    model.eval()
    rows = []
    for _ in range(windows // CONFIG["batch_size"]):
        tokens = text.batch(
            CONFIG["batch_size"], CONFIG["seq_len"], generator=generator, split=split
        )[0]
        rows.append(
            (
                tokens,
                torch.cat(
                    [metrics.expert_sets(routing, kept=True) for routing in model(tokens)[1]], -1
                ).float(),
            )
        )
    return tuple(torch.cat(part) for part in zip(*rows))


def eavesdrop(train_text, held_out_text, *, listening: bool) -> float:
    """Bits per byte that an MLP needs for the next byte, from the last few bytes and, if listening, from who took them."""
    torch.manual_seed(0)
    last, N = CONFIG["probe_bytes"], CONFIG["seq_len"]
    width = train_text[1].shape[-1]
    embed, place = torch.nn.Embedding(256, 16), torch.nn.Embedding(N, 16)
    mlp = torch.nn.Sequential(
        torch.nn.Linear(last * (16 + width) + 16, 256), torch.nn.SiLU(), torch.nn.Linear(256, 256)
    )
    parameters = [p for module in (embed, place, mlp) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CONFIG["probe_steps"])

    def loss(text, w, t):
        tokens, taken = text
        back = t[:, None] - torch.arange(last)
        heard = taken[w[:, None], back] * float(listening)
        x = torch.cat([embed(tokens[w[:, None], back]).flatten(1), heard.flatten(1), place(t)], 1)
        return F.cross_entropy(mlp(x), tokens[w, t + 1])

    generator = torch.Generator().manual_seed(1)
    for _ in range(CONFIG["probe_steps"]):
        w = torch.randint(len(train_text[0]), (1024,), generator=generator)
        t = torch.randint(last - 1, N - 1, (1024,), generator=generator)
        optimizer.zero_grad()
        loss(train_text, w, t).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        w, t = torch.meshgrid(
            torch.arange(len(held_out_text[0])), torch.arange(last - 1, N - 1), indexing="ij"
        )
        return loss(held_out_text, w.flatten(), t.flatten()).item() / torch.tensor(2.0).log().item()


@torch.no_grad()
def looks(model: LanguageModel, tokens: torch.Tensor) -> dict:
    """Load, balance, and how many experts a token gets, layer by layer, on held-out text."""
    model.eval()
    batches = [
        model(tokens[at : at + CONFIG["batch_size"]])[1]
        for at in range(0, len(tokens), CONFIG["batch_size"])
    ]
    layers = list(zip(*batches))
    taken = [
        torch.cat(
            [metrics.expert_sets(routing, kept=True).sum(-1).flatten() for routing in routings]
        )
        for routings in layers
    ]
    return {
        "max_violation": [metrics.max_violation(routings).item() for routings in layers],
        "max_violation_of_a_batch": [
            max(metrics.max_violation(routing).item() for routing in routings)
            for routings in layers
        ],
        "load": [metrics.load_share(routings).tolist() for routings in layers],
        "drop_rate": [metrics.drop_rate(routings).item() for routings in layers],
        "experts_per_token": [
            (taken_T.bincount(minlength=CONFIG["n_experts"] + 1) / len(taken_T)).tolist()
            for taken_T in taken
        ],
    }


def run(name: str, seed: int, text: corpus.Corpus, *, steps: int = CONFIG["steps"]) -> dict:
    """Train once; then look, change the future, listen, and at last route by fixed cutoffs."""
    pool = ARMS[name]
    model = build(seed, pool, CONFIG["aux_loss_weight"] if name == "token choice" else 0.0)
    history = train(model, text, steps=steps, **TRAINING, seed=seed, eval_every=25, progress=False)
    tokens, others = held_out(text, CONFIG["windows"])
    found = {
        "eval_step": history.eval_step,
        "valid_loss": history.valid_loss,
        "training_loss": sum(history.loss[-50:]) / 50,
        "losses": losses_by_position(model, tokens, others),
        **looks(model, tokens),
    }
    model.eval()
    with torch.no_grad():
        rows = torch.cat(
            [torch.tensor(list(PASSAGE)).view(2, -1), tokens[: CONFIG["batch_size"] - 2]]
        )
        found["passage_experts"] = [
            metrics.expert_sets(routing, kept=True)[:2].sum(-1).flatten().tolist()
            for routing in model(rows)[1]
        ]
    heard = (
        routed_text(model, text, CONFIG["probe_windows"], "train"),
        routed_text(model, text, 256, "valid"),
    )
    found["probe_bits"] = {
        "bytes": eavesdrop(*heard, listening=False),
        "bytes and routing": eavesdrop(*heard, listening=True),
    }
    if pool:
        with_cutoffs(model, text)
        with torch.no_grad():
            pieces = [
                model(tokens[at : at + CONFIG["batch_size"]])[0]
                for at in range(0, len(tokens), CONFIG["batch_size"])
            ]
        found["losses"]["cutoff"] = [
            loss_at(torch.cat(pieces), tokens, t) for t in range(tokens.shape[1] - 1)
        ]
        found["with_cutoffs"] = {
            key: value
            for key, value in looks(model, tokens).items()
            if key in ("max_violation", "experts_per_token")
        }
    else:
        found["losses"]["cutoff"] = found["losses"]["true"]  # its route is its own affair already
    return found


def mean_losses(results: dict, arm: str, future: str) -> list[float]:
    """One number a seed: the mean over positions, nats per byte."""
    return [sum(one["losses"][future]) / len(one["losses"][future]) for one in results[arm]]


def verdicts(results: dict) -> dict:
    """Partly: in every seed the smallest pool trains at least 5 % below token choice, and a false future takes at least that gain away again.
    Reproduced: the same holds for a pool near the claim's 512 tokens (64 or 1024). Else: not. (The first rule, written before the run, asked
    for the smallest pool only; the claim names 512, so this one is stricter.)"""
    honest = mean_losses(results, "token choice", "true")

    def gains(arm):
        return [1 - low / a for a, low in zip(honest, mean_losses(results, arm, "true"))]

    def cheats(arm):
        return all(g >= 0.05 for g in gains(arm)) and all(
            f >= a for f, a in zip(mean_losses(results, arm, "false"), honest)
        )

    def rise(arm):
        return mean(
            [
                f - t
                for f, t in zip(
                    mean_losses(results, arm, "false"), mean_losses(results, arm, "true")
                )
            ]
        )

    mean = lambda values: sum(values) / len(values)
    near = max(mean(gains("pool 64")), mean(gains("pool 1024")))
    because = (
        f"With pools of 4 tokens the held-out loss is {mean(gains('pool 4')):.1%} below token choice's ({min(gains('pool 4')):.1%} to "
        f"{max(gains('pool 4')):.1%}); with another text in place of the future it rises by {rise('pool 4'):.2f} nats per byte. With pools of 16, 64 and "
        f"1024 it rises by {rise('pool 16'):.3f}, {rise('pool 64'):.3f} and {rise('pool 1024'):.3f}. Near the claim's 512 tokens the loss is at most "
        f"{near:.1%} lower."
    )
    verdict = (
        ("reproduced" if cheats("pool 64") or cheats("pool 1024") else "partly")
        if cheats("pool 4")
        else "not at this scale"
    )
    return {"expert-choice-leaks": {"verdict": verdict, "because": because}}


def main() -> None:
    text = corpus.load()
    results = runs.sweep(run, ARMS, SEEDS, text)
    short = train(
        model := build(0, ARMS["pool 4"]), text, steps=SHORT_STEPS, **TRAINING, progress=False
    )  # what the chapter runs live
    tokens, others = held_out(text, 16)
    found = losses_by_position(model, tokens, others)
    results["short"] = {
        "valid_loss": short.valid_loss,
        **{future: sum(found[future]) / len(found[future]) for future in ("true", "false")},
    }
    results = runs.rounded(results)  # so that the verdict is that of the stored numbers
    results["verdicts"] = verdicts(results)
    config = {
        **CONFIG,
        "short_steps": SHORT_STEPS,
        "pools": ARMS,
        "passage": PASSAGE.decode(),
        "domains": list(text.domains),
        "claims": CLAIMS,
    }
    print(runs.save("expert_choice_leaks", text=text, config=config, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
