"""PretrainConfig: a training run in numbers, from a file, from flags, or both."""

import argparse
import json
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

from moe_core.config import MoEConfig
from moe_core.lm import LMConfig
from moe_core.validate import at_least, boolean, one_of, whole

# What says how processes share the work; a run may go on with others.
OF_THE_PROCESSES = ("ep_size", "placement", "replicas", "timeout", "threads")
PLACEMENTS = ("contiguous", "round_robin", "by_load")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PretrainConfig:
    """A training run.

    The field's metadata says what each means; it is also the help of the command line.

    Raises:
        ValueError: a value is out of range, or two do not go together.
    """

    steps: int = _option(200, "optimiser steps in all")
    out: str = _option("runs/pretrain", "folder for the log, the config and the checkpoints")
    text: str = _option(
        "builtin", "what to read: 'builtin', a text file, a folder of .txt files, or hf:NAME"
    )
    seed: int = _option(0, "of the weights, the batches and the noise")
    batch_size: int = _option(
        16, "sequences of one optimiser step, over all ranks and micro-batches"
    )
    micro_batch_size: int = _option(
        0, "sequences one rank takes at a time; 0 for its whole share of the batch"
    )
    seq_len: int = _option(128, "tokens (bytes) of a sequence")
    lr: float = _option(
        3e-3,
        "peak learning rate: it rises over the first twentieth of the steps and falls to a tenth",
    )
    weight_decay: float = _option(0.1, "of AdamW")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm")
    d_model: int = _option(128, "D, width of the model")
    n_layers: int = _option(2, "transformer blocks, all MoE")
    n_heads: int = _option(4, "attention heads")
    d_ff: int = _option(256, "F, width of one expert")
    n_experts: int = _option(8, "E, experts a layer")
    top_k: float = _option(2, "K, experts a token")
    n_shared_experts: int = _option(0, "experts that every token visits besides its K")
    router: str = _option("topk", "name of the router")
    aux_loss_weight: float | None = _option(
        None, "coefficient of the balance loss; left out: 0.01 for topk, else as the router has it"
    )
    moe: dict = field(
        default_factory=dict,
        metadata={
            "help": (
                'anything else of MoEConfig, as JSON: \'{"capacity_factor": 1.25,'
                ' "router_options": {...}}\''
            )
        },
    )
    global_balance: bool = _option(
        False, "balance loss over all ranks and micro-batches together, not over each for itself"
    )
    ep_size: int = _option(
        1, "ranks the experts are spread over; must divide the number of processes"
    )
    placement: str = _option(
        "contiguous",
        f"which rank holds which expert: {', '.join(PLACEMENTS)} (as the run to resume logged it)",
    )
    replicas: int = _option(
        0, "by_load: places for additional copies of the busiest experts, in each layer"
    )
    precision: str = _option("float32", "float32, or bfloat16 for autocast")
    eval_every: int = _option(
        50, "measure the held-out loss every so many steps, and at the end; 0 only at the end"
    )
    save_every: int = _option(50, "write a checkpoint every so many steps, and at the end")
    keep: int = _option(0, "how many checkpoints are kept, the newest ones; 0 keeps all")
    timeout: float = _option(30.0, "seconds after which a rank that does not answer is given up")
    threads: int = _option(1, "processor threads of each process; 0 leaves it to torch")

    def __post_init__(self):
        whole(
            1,
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            ep_size=self.ep_size,
            save_every=self.save_every,
        )
        whole(
            0,
            seed=self.seed,
            micro_batch_size=self.micro_batch_size,
            eval_every=self.eval_every,
            threads=self.threads,
            replicas=self.replicas,
            keep=self.keep,
        )
        if not self.out:
            raise ValueError("out='' must name a folder")
        object.__setattr__(self, "out", str(Path(self.out).expanduser()))  # frozen
        at_least(0, lr=self.lr, weight_decay=self.weight_decay, timeout=self.timeout)
        for name in ("max_grad_norm", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be more than 0")
        if self.seq_len < 2:
            raise ValueError(
                f"seq_len={self.seq_len} must be at least 2: the last token is only predicted"
            )
        boolean(global_balance=self.global_balance)
        one_of(PLACEMENTS, placement=self.placement)
        one_of(("float32", "bfloat16"), precision=self.precision)
        if self.replicas and self.placement != "by_load":
            raise ValueError(
                f"replicas={self.replicas} needs placement='by_load', not {self.placement!r}"
            )
        if (self.n_experts + self.replicas) % self.ep_size:
            raise ValueError(
                f"ep_size={self.ep_size} must divide n_experts + replicas = "
                f"{self.n_experts + self.replicas}"
            )
        if not self.model().moe.aux_loss_weight and self.global_balance:
            raise ValueError(
                "global_balance=True needs a balance loss: aux_loss_weight above 0, with a router "
                f"that has one, not {self.router!r}"
            )

    def model(self) -> LMConfig:
        """The language model of this run."""
        weight = self.aux_loss_weight
        if weight is None and self.router == "topk":
            weight = 0.01
        fields = {
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "n_experts": self.n_experts,
            "router": self.router,
            "aux_loss_weight": weight,
            "top_k": int(self.top_k) if float(self.top_k).is_integer() else self.top_k,
            "n_shared_experts": self.n_shared_experts,
        }
        twice = sorted(set(fields) & set(self.moe))
        if twice:
            raise ValueError(
                f"moe={self.moe!r} must not hold {', '.join(twice)}: give it as an option of "
                "its own"
            )
        if weight is None:  # as the router has it
            del fields["aux_loss_weight"]
        moe = MoEConfig.from_dict(fields | self.moe)
        return LMConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            max_seq_len=self.seq_len,
            moe=moe,
        )

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """How many micro-batches a rank runs in a step, and of how many sequences.

        Raises:
            ValueError: the batch cannot be cut into equal parts.
        """
        size = self.micro_batch_size or self.batch_size // world_size
        if size == 0 or self.batch_size % (size * world_size):
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={size} times "
                f"{world_size} ranks"
            )
        return self.batch_size // (size * world_size), size

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "PretrainConfig":
        """The inverse of ``to_dict``.

        Raises ValueError for a key that is not a field, or a value of the wrong type.
        """
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"unknown keys in PretrainConfig: {', '.join(unknown)}; known are "
                f"{', '.join(known)}"
            )
        for name, value in values.items():
            wanted = _plain_type(known[name])
            fits = isinstance(value, (int, float) if wanted is float else wanted) and isinstance(
                value, bool
            ) == (wanted is bool)
            if not fits and not (value is None and known[name].default is None):
                raise ValueError(f"{name}={value!r} must be of type {wanted.__name__}")
        return cls(**values)


def from_command_line(argv: list[str] | None = None) -> tuple[PretrainConfig, bool]:
    """The config, and whether to resume: the defaults, then --config, then the flags.

    Between the defaults and --config, --resume reads the options of the run it goes on with, but
    for ``OF_THE_PROCESSES``.

    Ends the program with the reason (exit status 2) where a flag, a key or a value is wrong.
    """
    parser = argparse.ArgumentParser(
        "python -m moe_tools.pretrain",
        description="Train an MoE language model, in one process or under torchrun.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "torchrun --standalone --nproc-per-node 2 -m moe_tools.pretrain --ep-size 2 --steps 20 "
            "--out runs/second"
        ),
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON or TOML with any of these options (with _ for -); flags win",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last whole checkpoint in --out, at any world size, with the options "
        "of that run where no others are given",
    )
    for f in fields(PretrainConfig):
        kind = _plain_type(f)
        how = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": json.loads if kind is dict else kind, "metavar": kind.__name__.upper()}
        )
        default = "" if kind is dict or f.default is None else f" (default: {f.default})"
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            default=None,
            help=f.metadata["help"].replace("%", "%%") + default,
            **how,
        )
    flags = vars(parser.parse_args(argv))
    file, resume = flags.pop("config"), flags.pop("resume")
    try:
        values = _read(file) if file else {}
        values |= {name: value for name, value in flags.items() if value is not None}
        if resume:
            out = Path(values.get("out", PretrainConfig.out)).expanduser()
            before = out / "config.json"
            stored = _read(str(before)) if before.is_file() else {}
            stored = {k: v for k, v in stored.items() if k not in OF_THE_PROCESSES}
            values = stored | values | {"out": str(out)}
        return PretrainConfig.from_dict(values), resume
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _plain_type(f) -> type:
    return get_args(f.type)[0] if get_args(f.type) else f.type


def _read(file: str) -> dict:
    text = Path(file).read_text()
    try:
        values = tomllib.loads(text) if file.lower().endswith(".toml") else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON or, by its name, TOML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a table of options")
    return values
