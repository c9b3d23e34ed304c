"""The router bench's rows: the budget they share, and what each router is given besides."""

from dataclasses import asdict, dataclass
from functools import cache

import torch

from moe_core.capacity import CapacityRule
from moe_core.config import MoEConfig
from moe_core.lm import LMConfig
from moe_core.validate import at_least, whole

from .. import corpus


@dataclass(frozen=True)
class Budget:
    """What every router gets.

    Raises ValueError unless the sizes are whole numbers above 0, and lr at least 0.
    """

    steps: int = 500
    batch_size: int = 16
    seq_len: int = 64
    lr: float = 3e-3
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_experts: int = 8
    top_k: int = 2
    d_ff: int = 64
    eval_batches: int = 8
    alone_windows: int = 8

    def __post_init__(self):
        whole(1, **{name: value for name, value in asdict(self).items() if name != "lr"})
        at_least(0, lr=self.lr)


@dataclass(frozen=True)
class Row:
    """How the bench sets up a router: MoEConfig's fields, the router's options, a note."""

    fields: dict
    options: dict
    note: str


_WIDE = {"top_k": 1}  # its one expert is K times as wide
ROWS = {
    "topk": Row({"aux_loss_weight": 0.01}, {}, "balance loss"),
    "noisy_topk": Row(
        {},
        {"importance_loss_weight": 0.1, "load_loss_weight": 0.1},
        "noise in training; importance and load losses",
    ),
    "switch": Row(
        {
            **_WIDE,
            "capacity_factor": CapacityRule(factor=1.25, eval_factor=2.0),
            "aux_loss_weight": 0.01,
            "jitter_noise": 0.01,
        },
        {},
        "K = 1, wide; capacity 1.25, eval 2; balance loss",
    ),
    "gshard": Row(
        {"top_k": 2, "capacity_factor": 1.25, "aux_loss_weight": 0.01},
        {},
        "second expert by lot; capacity 1.25; balance loss",
    ),
    "loss_free": Row({}, {"bias_update_rate": 0.005}, "selection bias, step 0.005"),
    "hash": Row(
        {},
        {"vocab_size": corpus.VOCAB_SIZE, "frequencies": "of the training text"},
        "table from byte to experts, not learned",
    ),
    "expert_choice": Row(
        {}, {"scope": "batch"}, "NOT CAUSAL: experts choose among all tokens of the batch"
    ),
    "expert_threshold": Row(
        {},
        {"ema_decay": 0.99, "warmup_steps": "a fifth of the steps", "capacity_band": 0.5},
        "warms up as expert choice; training: band 0.5; eval: thresholds",
    ),
    "sinkhorn": Row({}, {}, "training: balanced plan; eval: top-k of the logits"),
    "base": Row(_WIDE, {}, "K = 1, wide; training: balanced assignment; eval: best expert"),
    "quantile_balancing": Row({}, {}, "selection bias, solved for after each step"),
    "relu": Row(
        {},
        {"l1_weight": 1e-8, "l1_multiplier": 1.2},
        "K in the mean only, after the L1 weight has grown",
    ),
    "zero_computation": Row(
        {"top_k": 3, "aux_loss_weight": 0.01},
        {"n_zero_experts": 1, "n_copy_experts": 1, "n_constant_experts": 1, "ffn_ratio": 0.75},
        "K = 3 of 8 + 3 cheap; tau = 3/4 asks for 2 real ones; balance loss",
    ),
}


@cache
def text() -> corpus.Corpus:
    """The corpus of all runs, read once."""
    return corpus.load()


def config(name: str, budget: Budget) -> LMConfig:
    """The model of one row.

    Raises:
        ValueError: there is no such router, or the budget does not suit it.
    """
    if name not in ROWS:
        raise ValueError(f"router={name!r} must be one of {', '.join(ROWS)}")
    options = dict(ROWS[name].options)
    if name == "hash":
        options["frequencies"] = (
            torch.cat([pieces.flatten() for pieces in text().train.values()])
            .bincount(minlength=corpus.VOCAB_SIZE)
            .tolist()
        )
    if name == "expert_threshold":
        options["warmup_steps"] = budget.steps // 5
    fields = {"top_k": budget.top_k, **ROWS[name].fields}
    d_ff = budget.d_ff * (budget.top_k if fields["top_k"] == 1 else 1)
    moe = MoEConfig(
        d_model=budget.d_model,
        d_ff=d_ff,
        n_experts=budget.n_experts,
        router=name,
        router_options=options,
        **fields,
    )
    return LMConfig(
        d_model=budget.d_model,
        n_layers=budget.n_layers,
        n_heads=budget.n_heads,
        max_seq_len=budget.seq_len,
        moe=moe,
    )
