"""One run of the router bench: train one router with one seed, and measure it."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_core import metrics
from moe_core.layer import MixtureOfExperts
from moe_core.lm import LanguageModel, next_token_loss, train_step

from ..probe import probe
from ..schedule import warmup_cosine
from ._router_rows import Budget, config, text


def run(name: str, seed: int, budget: Budget, make: Callable | None = None) -> dict:
    """Train one router with one seed, on one thread, and measure it; plain numbers only.

    ``make(name, seed, budget)`` is the model, where it is another one than ``build``'s.
    """
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        model = (make or build)(name, seed, budget)
        found = {
            "name": name,
            "seed": seed,
            **_train(model, seed, budget),
            **_evaluate(model, budget),
            **_probe(model, budget),
        }
        return found | {"run_seconds": time.process_time() - start}
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)


def _train(model: LanguageModel, seed: int, budget: Budget) -> dict:
    """Train; what is said of it is the mean over the last fifth of the steps."""
    batches = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=budget.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = warmup_cosine(optimizer, budget.steps)
    torch.manual_seed(seed)  # of the routers' own noise
    model.train()
    log = []
    for _ in range(budget.steps):
        tokens = text().batch(budget.batch_size, budget.seq_len, generator=batches)[0]
        start = time.process_time()
        loss, routings = train_step(model, optimizer, tokens)
        schedule.step()
        seconds = time.process_time() - start
        log.append(
            {
                "loss": loss.item(),
                "step_ms": 1000 * seconds,
                **_mean_over_layers(model, [[r] for r in routings]),
            }
        )
    late = log[-max(1, budget.steps // 5) :]
    mean = {key: statistics.fmean(entry[key] for entry in late) for key in log[0]}
    stride = max(1, budget.steps // 50)
    curve = {
        key: [
            statistics.fmean(entry[key] for entry in log[i : i + stride])
            for i in range(0, len(log), stride)
        ]
        for key in ("loss", "max_violation", "experts_per_token")
    }
    return {
        "training_loss": mean.pop("loss"),
        "step_ms": statistics.median(entry["step_ms"] for entry in late),
        "training": {key: value for key, value in mean.items() if key != "step_ms"},
        "curve": curve,
    }


def _mean_over_layers(model: LanguageModel, routings_of_layers: list[list]) -> dict:
    """Each layer's metrics, averaged over layers; dead experts are added up."""
    found = []
    for layer, routings in zip(_layers(model), routings_of_layers):
        kept_E = torch.stack([routing.tokens_per_expert for routing in routings]).sum(0)
        n_tokens = sum(routing.real_tokens.sum() for routing in routings)
        experts = float(
            kept_E[: layer.config.n_experts].sum() / n_tokens
        )  # those that compute something
        found.append(metrics.summary(routings) | {"experts_per_token": experts})
    mean = {key: statistics.fmean(layer[key] for layer in found) for key in found[0]}
    return mean | {"dead_experts": sum(layer["dead_experts"] for layer in found)}


@torch.no_grad()
def _evaluate(model: LanguageModel, budget: Budget) -> dict:
    """Held-out loss and metrics, and the loss of some windows whole and prefix by prefix."""
    model.eval()
    windows = torch.Generator().manual_seed(12345)
    draw = lambda B: text().batch(B, budget.seq_len, generator=windows, split="valid")[0]
    losses, routings_of_batches = [], []
    for _ in range(budget.eval_batches):
        tokens = draw(budget.batch_size)
        logits, routings = model(tokens)
        losses.append(float(next_token_loss(logits, tokens)))
        routings_of_batches.append(routings)
    tokens = draw(budget.alone_windows)
    whole_loss = float(next_token_loss(model(tokens)[0], tokens))
    alone = [next_token_loss(_prefix_by_prefix(model, row), row.unsqueeze(0)) for row in tokens]
    return {
        "held_out": statistics.fmean(losses),
        "alone": float(torch.stack(alone).mean()),
        "not_alone": whole_loss,
        "eval": _mean_over_layers(model, list(zip(*routings_of_batches))),
    }


def _prefix_by_prefix(model: LanguageModel, tokens_N: Tensor) -> Tensor:
    """(1, N, V): each position's logits without what follows it or other sequences."""
    return torch.cat(
        [model(tokens_N[: n + 1].unsqueeze(0))[0][:, -1:] for n in range(len(tokens_N))], dim=1
    )


def _probe(model: LanguageModel, budget: Budget) -> dict:
    """What the probe finds in float64 on two rows of text and one that crowds an expert."""
    rows = text().batch(
        2, budget.seq_len, generator=torch.Generator().manual_seed(54321), split="valid"
    )[0]
    tokens = torch.cat([rows, torch.full_like(rows[:1], ord(" "))])
    model = copy.deepcopy(model).double()
    eval_found, training_found = (
        probe(model.eval(), tokens, trials=24),
        probe(model.train(), tokens, trials=24),
    )
    return {
        "causal": eval_found.causal,
        "batch_invariant": eval_found.batch_invariant,
        "streams": eval_found.streams,
        "causal_in_training": training_found.causal,
    }


def build(name: str, seed: int, budget: Budget) -> LanguageModel:
    """The model with the weights that top-k has from this seed, wherever it has such a weight."""
    torch.manual_seed(seed)
    model = LanguageModel(config(name, budget))
    torch.manual_seed(seed)
    start = dict(LanguageModel(config("topk", budget)).named_parameters())
    own = {
        id(p)
        for layer in _layers(model)
        if layer.router.prescribes_start
        for p in layer.router.parameters()
    }
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in start and start[key].shape == parameter.shape and id(parameter) not in own:
                parameter.copy_(start[key])
    return model


def _layers(model: LanguageModel) -> list[MixtureOfExperts]:
    return [block.feed_forward for block in model.blocks]
