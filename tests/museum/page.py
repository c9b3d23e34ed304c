"""The museum as a page of the book: `python -m tests.museum.page` writes the table of book/mistakes.md again."""

import re
from pathlib import Path

from . import MUSEUM

PAGE = Path(__file__).resolve().parents[2] / "book/mistakes.md"
START, END = "<!-- from the museum -->", "<!-- until here -->"
REPOSITORIES = {
    "transformers": "huggingface/transformers",
    "trl": "huggingface/trl",
    "NeMo Automodel": "NVIDIA-NeMo/Automodel",
    "vllm": "vllm-project/vllm",
    "mlx-lm": "ml-explore/mlx-lm",
    "DeepSeek-V3": "deepseek-ai/DeepSeek-V3",
    "flashinfer": "flashinfer-ai/flashinfer",
    "minimind": "jingyaogong/minimind",
    "Megatron-LM": "NVIDIA/Megatron-LM",
    "DeepSpeed": "deepspeedai/DeepSpeed",
    "PaddleFormers": "PaddlePaddle/PaddleFormers",
    "torchtitan": "pytorch/torchtitan",
    "pytorch": "pytorch/pytorch",
    "sglang": "sgl-project/sglang",
    "unsloth-zoo": "unslothai/unsloth-zoo",
    "davidmrau/mixture-of-experts": "davidmrau/mixture-of-experts",
    "grouped_gemm": "tgale96/grouped_gemm",
}


def linked(source: str) -> str:
    """A source with its issues as links: "vllm #12002, #14027; trl #7222"."""
    parts = []
    for part in source.split("; "):
        name = re.match(r"[^#]*", part)[0].strip(" ,")
        repository = REPOSITORIES.get(name)
        if repository:
            part = re.sub(
                r"#(\d+)",
                lambda n: f"[#{n[1]}](https://github.com/{repository}/issues/{n[1]})",
                part,
            )
        parts.append(part)
    return "; ".join(parts)


def rows() -> str:
    """One row per bug, by its number."""
    lines = [
        "| mistake | what you see | where it was seen | what our tests demand |",
        "| --- | --- | --- | --- |",
    ]
    for bug in MUSEUM:
        lines.append(
            f"| **{bug.title}** | {bug.symptom} | {linked(bug.source)} | {bug.caught_by} |".replace(
                "\n", " "
            )
        )
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table as the museum is now."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{rows()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf8")), "utf8")
    print(PAGE)
