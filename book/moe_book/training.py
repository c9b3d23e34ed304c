"""One training loop for every chapter, and the history it leaves behind."""

import time
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm

from moe_core import LanguageModel
from moe_core.lm import next_token_loss, train_step
from moe_tools.schedule import warmup_cosine

from .corpus import Corpus


@dataclass
class History:
    """What a training run logged.

    Attributes:
        step: (S,) steps at which the training loss was logged: every step.
        loss: (S,) cross-entropy of the training batch, nats per byte, without auxiliary losses.
        aux_loss: (S,) sum of all layers' weighted auxiliary losses.
        eval_step, valid_loss: steps at which the held-out loss was measured, and the loss in nats per byte.
        load: one entry a step, [layer][expert]: share of kept slots; empty for a dense model.
        seconds: wall time of the training steps, evaluation excluded.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    aux_loss: list[float] = field(default_factory=list)
    eval_step: list[int] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    load: list[list[list[float]]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return asdict(self)

    def plot(self):
        """Held-out and training loss against the step, as a plotly Figure."""
        from .figures import curves  # plotly is not needed to train

        series = {"training batch": self.loss, "held-out text": self.valid_loss}
        return curves(
            series,
            x={"training batch": self.step, "held-out text": self.eval_step},
            y_title="loss (nats per byte)",
        )


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    corpus: Corpus,
    *,
    batches: int = 8,
    batch_size: int = 16,
    seq_len: int = 128,
    domain: str | None = None,
    split: str = "valid",
) -> float:
    """Mean cross-entropy on held-out text, in nats per byte, always over the same windows; split="shifted" for another mixture."""
    device, was_training = next(model.parameters()).device, model.training
    generator = torch.Generator().manual_seed(12345)
    model.eval()
    losses = []
    for _ in range(batches):
        tokens, _labels = corpus.batch(
            batch_size, seq_len, generator=generator, split=split, domain=domain
        )
        tokens = tokens.to(device)
        losses.append(float(next_token_loss(model(tokens)[0], tokens)))
    model.train(was_training)
    return sum(losses) / len(losses)


def train(
    model: LanguageModel,
    corpus: Corpus,
    *,
    steps: int,
    batch_size: int = 16,
    seq_len: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    eval_every: int | None = None,
    progress: bool = True,
    on_step=None,
) -> History:
    """Train a language model on the corpus with AdamW, a short warm-up and cosine decay.

    Args:
        steps: optimiser steps. batch_size, seq_len: B and N of each.
        lr: peak learning rate; it rises over the first twentieth of the steps and falls to a tenth.
        seed: of the batches; the model was initialised by the caller.
        eval_every: measure the held-out loss every so many steps, and always at the end; None only at the end.
        progress: show a progress bar.
        on_step: called as on_step(step, model, routings) after each optimiser step.

    Returns:
        A ``History``.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = warmup_cosine(optimizer, steps)
    history = History()
    model.train()
    bar = tqdm(range(1, steps + 1), disable=not progress, unit="step", mininterval=1.0)
    for step in bar:
        start = time.perf_counter()
        tokens = corpus.batch(batch_size, seq_len, generator=generator)[0].to(device)
        loss, routings = train_step(model, optimizer, tokens)
        schedule.step()
        history.step.append(step)
        history.loss.append(loss.item())
        history.aux_loss.append(sum((r.aux_loss for r in routings), start=torch.zeros(())).item())
        history.load.append(
            [
                (r.tokens_per_expert / r.tokens_per_expert.sum().clamp(min=1)).tolist()
                for r in routings
            ]
        )
        history.seconds += time.perf_counter() - start
        if on_step is not None:
            on_step(step, model, routings)
        if step == steps or (eval_every and step % eval_every == 0):
            history.eval_step.append(step)
            history.valid_loss.append(
                evaluate(model, corpus, batch_size=batch_size, seq_len=seq_len)
            )
            bar.set_postfix(held_out=f"{history.valid_loss[-1]:.3f}")
    return history
