"""One way to train the patients of the clinic: a small language model on the corpus, logged every few steps.

Patients start from a dense model that has learned a little, and their routers from logits as far apart as a large model's are: the first
hundred steps of a small model from nothing are a turmoil that would look like half of the illnesses.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moe_core import LanguageModel, LMConfig, MixtureOfExperts, MoEConfig
from moe_core.lm import next_token_loss, train_step
from moe_tools import corpus
from moe_tools.diagnosis.routing_log import RoutingLog

SEEDS = range(5)
STEPS, EVERY = 60, 5
TRUNK = dict(d_model=32, n_layers=2, n_heads=2, max_seq_len=64)
D_FF, N_EXPERTS, BATCH, LENGTH = 32, 8, 8, 64
PADDING = 0  # the byte that fills up a padded row


@cache
def text() -> corpus.Corpus:
    return corpus.load()


@cache
@torch.enable_grad()  # patient() calls it without
def dense() -> LanguageModel:
    """The model that all patients start from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LanguageModel(LMConfig(**TRUNK, d_ff=D_FF))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(400):
        tokens = text().batch(BATCH, LENGTH, generator=generator)[0]
        train_step(model, optimizer, tokens)
    return model


def newborn(seed: int, **fields) -> LanguageModel:
    """A model that knows nothing yet; fields are MoEConfig's."""
    torch.manual_seed(seed)
    sizes = dict(d_model=TRUNK["d_model"], d_ff=D_FF, n_experts=N_EXPERTS, top_k=2)
    return LanguageModel(LMConfig(**TRUNK, moe=MoEConfig(**{**sizes, **fields})))


@torch.no_grad()
def patient(seed: int, **fields) -> LanguageModel:
    """A model whose trunk is the dense one's and whose experts are noisy copies of its feed-forward layers; fields are MoEConfig's.

    Copies are divided by the mean weight a token gives them, so that a layer starts with about the dense layer's output.
    """
    model = newborn(seed, **fields)
    missing = model.load_state_dict(dense().state_dict(), strict=False).missing_keys
    assert all(".feed_forward." in name for name in missing)
    for block, trained in zip(model.blocks, dense().blocks):
        router = block.feed_forward.router
        if not router.prescribes_start:
            router.reset_parameters()  # uniform in +-1/sqrt(D): the LM's 0.02 is made for a D of thousands
        for name in ("gate_up_proj", "down_proj"):
            bank, weight = (
                getattr(block.feed_forward.experts, name),
                getattr(trained.feed_forward, name).weight,
            )
            bank.copy_(weight)
            bank += 0.1 * weight.std() * torch.randn_like(bank)
    tokens = text().batch(BATCH, LENGTH, generator=torch.Generator().manual_seed(seed))[0]
    for layer, routing in zip(layers(model), model(tokens)[1]):
        layer.experts.down_proj /= (routing.expert_weights * routing.capacity_mask).sum(-1).mean()
    return model


def layers(model: LanguageModel) -> list[MixtureOfExperts]:
    return [block.feed_forward for block in model.blocks]


def train(
    model: LanguageModel,
    *,
    seed: int,
    steps: int = STEPS,
    lr: float = 3e-3,
    router_lr: float = 1.0,
    pad: bool = False,
    tell_padding: bool = True,
    measure: Callable[[LanguageModel, Tensor, list], dict] = lambda *_: {},
) -> RoutingLog:
    """Train and log; in the second half the batch of each logged step is evaluated too, before it is learned from.

    Args:
        router_lr: times lr, for the routers.
        pad: the last quarter of each row is padding. tell_padding: the model is told so.
        measure: (model, tokens, routings) -> what log.add gets besides, at the logged steps.
    """
    generator = torch.Generator().manual_seed(seed)
    of_routers = {id(p) for layer in layers(model) for p in layer.router.parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if id(p) not in of_routers]},
            {
                "params": [p for p in model.parameters() if id(p) in of_routers],
                "lr": lr * router_lr,
            },
        ],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=steps // 10)
    log = RoutingLog(model, every=EVERY)
    for step in range(1, steps + 1):
        tokens, mask = text().batch(BATCH, LENGTH, generator=generator)[0], None
        if pad:
            mask = (torch.arange(LENGTH) < LENGTH * 3 // 4).expand(BATCH, -1)
            tokens = tokens.masked_fill(~mask, PADDING)
        told = mask if tell_padding else None
        if step % EVERY == 0 and step > steps // 2:
            model.eval()
            with torch.no_grad():
                logits, routings = model(tokens, told)
            log.add_evaluation(
                step, routings, loss=next_token_loss(logits, tokens, told), padding_mask=mask
            )
        model.train()
        loss, routings = train_step(model, optimizer, tokens, told)
        warmup.step()
        measured = measure(model, tokens, routings) if step % EVERY == 0 else {}
        log.add(step, routings, loss=loss, padding_mask=mask, **measured)
    return log
