"""``python -m moe_tools.design --active 1.5B --tokens 200B --gpus 64 --gpu h100``."""

import argparse
import json
import sys
from pathlib import Path

from ..accounting import ACCELERATORS
from .assistant import design
from .budget import DESIGN_ROUTERS, DesignBudget, number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, exit status 2."""
        self.exit(2, f"error: {message}\n")


def _number(text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _whole(text: str) -> int:
    value = _number(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number")
    return int(value)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "python -m moe_tools.design",
        description=(
            "From a budget to a written MoE design. Numbers may be written 1.5B, 200B, 3e21."
        ),
        epilog=(
            "python -m moe_tools.design --active 1.5B --tokens 200B --gpus 64 --out design.md "
            "--hf-config config.json"
        ),
    )
    size = parser.add_argument_group("size of the model (give one)")
    size.add_argument(
        "--active", type=_number, help="active parameters, embedding and head included"
    )
    size.add_argument("--flops", type=_number, help="FLOPs of the whole training")
    parser.add_argument("--tokens", type=_number, required=True, help="training tokens")
    parser.add_argument("--gpus", type=_whole, required=True, help="how many")
    parser.add_argument("--gpu", choices=ACCELERATORS, default="h100", help="(default: h100)")
    parser.add_argument(
        "--ranks-per-node",
        type=_whole,
        help="GPUs of a node (default: 8, or all if there are fewer)",
    )
    parser.add_argument(
        "--total",
        type=_number,
        help="total parameters (default: 16 experts for each one a token takes, if they fit)",
    )
    parser.add_argument("--top-k", type=_whole, help="experts per token (default: by the rules)")
    parser.add_argument(
        "--seq-len",
        type=_whole,
        default=DesignBudget.seq_len,
        help=f"(default: {DesignBudget.seq_len})",
    )
    parser.add_argument(
        "--vocab-size",
        type=_whole,
        default=DesignBudget.vocab_size,
        help=f"(default: {DesignBudget.vocab_size})",
    )
    parser.add_argument(
        "--batch-tokens", type=_number, help="tokens of an optimiser step (default: by the rules)"
    )
    parser.add_argument(
        "--memory-limit",
        type=_number,
        metavar="BYTES",
        help="of a GPU, such as 70G (default: nine tenths of what it has)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=DesignBudget.utilisation,
        help=f"share of the peak while computing, assumed (default: {DesignBudget.utilisation})",
    )
    parser.add_argument(
        "--router",
        choices=DESIGN_ROUTERS,
        help="(default: loss_free, or expert_threshold with --streaming)",
    )
    parser.add_argument(
        "--streaming", action="store_true", help="a token's experts may hang on that token alone"
    )
    parser.add_argument(
        "--fp8-dispatch", action="store_true", help="send rows to the experts in one byte a number"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="FILE",
        help="write the model as a Hugging Face config.json",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 where nothing fits, 2 where an option is wrong; errors are a line."""
    parser = _parser()
    asked = vars(parser.parse_args(argv))
    out, hf_file = asked.pop("out"), asked.pop("hf_config")
    try:
        found = design(DesignBudget(**asked))
        config = found.hf_config() if hf_file else None
        if out:
            out.write_text(found.markdown(), encoding="utf8")
        if hf_file:
            hf_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
