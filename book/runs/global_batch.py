"""Micro-batch or global-batch balance: does a router specialise more when only the whole batch must be balanced?

Each step reads three micro-batches, one of each domain of the corpus. The balance loss is computed with the shares f of each micro-batch, or
with those of all three together; nothing else differs.

Run it with `python book/runs/global_batch.py` (about four minutes on one quiet CPU core); chapter 5 shows global_batch.json.
"""

import math
import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch

from moe_book import corpus, runs
from moe_book.training import evaluate
from moe_core import LanguageModel, LMConfig, MoEConfig, losses, metrics
from moe_core.lm import next_token_loss

SEEDS = [0, 1, 2, 3, 4]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
CONFIG = {
    **SIZES,
    "seq_len": 64,
    "micro_batch_size": 6,
    "steps": 300,
    "lr": 3e-3,
    "d_ff": 128,
    "n_experts": 8,
    "top_k": 2,
    "coefficient": 0.1,
}
ARMS = ("none", "micro", "global")
CLAIMS = {
    "global-specialises": {
        "claim": "With the balance loss over the global batch, experts specialise on domains more than with the loss over each micro-batch.",
        "source": "globalbatch",
    },
    "global-lowers-loss": {
        "claim": "With the balance loss over the global batch, the language model gets better than with the loss over each micro-batch.",
        "source": "globalbatch",
    },
}


def verdicts(results: dict) -> dict:
    """Specialises: the mutual information of domain and expert, mean of the layers, is at least 1.25 times as large in every seed; partly
    if it is so in the mean. Lowers the loss: by more than 0.005 nats in every seed; partly if in the mean."""

    def values(arm):
        return [
            sum(one["mutual_information"]) / len(one["mutual_information"]) for one in results[arm]
        ]

    def judge(each, mean):
        return "reproduced" if all(each) else "partly" if mean else "not at this scale"

    def average(numbers):
        return sum(numbers) / len(numbers)

    micro, whole = values("micro"), values("global")
    loss = [[one["valid_loss"] for one in results[arm]] for arm in ("micro", "global")]
    gain = [a - b for a, b in zip(*loss)]
    n = len(gain)
    return {
        "global-specialises": {
            "verdict": judge(
                [b >= 1.25 * a for a, b in zip(micro, whole)],
                average(whole) >= 1.25 * average(micro),
            ),
            "because": f"mutual information {average(whole):.4f} nats over the global batch and {average(micro):.4f} over micro-batches, larger in "
            f"{sum(b > a for a, b in zip(micro, whole))} of {n} seeds; at most {math.log(len(results['global'][0]['load'][0])):.2f} is possible",
        },
        "global-lowers-loss": {
            "verdict": judge([g > 0.005 for g in gain], average(gain) > 0.005),
            "because": f"held-out loss {average(loss[1]):.3f} and {average(loss[0]):.3f} nats, lower in {sum(g > 0 for g in gain)} of {n} seeds",
        },
    }


def build(seed: int) -> LanguageModel:
    """The model of one run; with one seed, all arms start from the same weights."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"], CONFIG["d_ff"], CONFIG["n_experts"], CONFIG["top_k"], backend="loop"
    )
    return LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))


def balance(arm: str, routings: list[list]) -> torch.Tensor:
    """The balance loss of one step; routings[m][l] of micro-batch m and layer l."""
    if arm == "none":
        return torch.zeros(())
    layers = list(zip(*routings))
    if arm == "global":
        return sum(losses.global_balance(layer) for layer in layers)
    return sum(losses.load_balance(routing) for layer in layers for routing in layer) / len(
        routings
    )


def mutual_information(load_DE: torch.Tensor) -> float:
    """Between domain and expert, in nats, domains equally frequent: 0 if the domains' loads are equal, ln D if no two share an expert."""
    share_DE = load_DE / load_DE.sum(-1, keepdim=True)
    return float(
        torch.special.entr(share_DE.mean(0)).sum() - torch.special.entr(share_DE).sum(-1).mean()
    )


def run(arm: str, seed: int, text: corpus.Corpus) -> dict:
    """Train once; then the held-out loss, and on held-out text the load of each layer, domain by domain."""
    model, generator = build(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=CONFIG["lr"], betas=(0.9, 0.95), weight_decay=0.1
    )
    warmup = CONFIG["steps"] // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup)
    )
    for _ in range(CONFIG["steps"]):
        micro = [
            text.batch(
                CONFIG["micro_batch_size"], CONFIG["seq_len"], generator=generator, domain=d
            )[0]
            for d in text.domains
        ]
        outputs = [model(tokens) for tokens in micro]
        loss = sum(
            next_token_loss(logits, tokens) for (logits, _), tokens in zip(outputs, micro)
        ) / len(micro)
        optimizer.zero_grad(set_to_none=True)
        (
            loss + CONFIG["coefficient"] * balance(arm, [routings for _, routings in outputs])
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    load_LDE = []
    for domain in text.domains:
        sample, _ = text.batch(
            32,
            CONFIG["seq_len"],
            generator=torch.Generator().manual_seed(3),
            split="valid",
            domain=domain,
        )
        with torch.no_grad():
            load_LDE.append(
                torch.stack([metrics.load_share(routing) for routing in model(sample)[1]])
            )
    load_LDE = torch.stack(load_LDE, dim=1)
    return {
        "valid_loss": evaluate(model, text, seq_len=CONFIG["seq_len"]),
        "load": load_LDE.tolist(),
        "mutual_information": [mutual_information(load_DE) for load_DE in load_LDE],
        "max_violation": [
            float(load_DE.mean(0).max() * CONFIG["n_experts"] - 1) for load_DE in load_LDE
        ],
    }


def main() -> None:
    text = corpus.load()
    results = runs.sweep(run, ARMS, SEEDS, text)
    results["verdicts"] = verdicts(results)
    config = {**CONFIG, "domains": list(text.domains), "claims": CLAIMS}
    print(runs.save("global_batch", text=text, config=config, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
