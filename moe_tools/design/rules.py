"""The rules behind the choices, each with its source; what is a rule of thumb is called one.

"paper": stated and shown there. "measured": counted here, on ``moe_core.published`` or in a stored
run. "rule of thumb": widely used, shown by nobody as a law.
"""

from dataclasses import dataclass

from moe_core.validate import one_of

KINDS = ("paper", "measured", "rule of thumb")


@dataclass(frozen=True)
class Rule:
    """A rule: its name, what it says, where that stands, and of which of ``KINDS`` it is."""

    name: str
    text: str
    source: str
    kind: str

    def __post_init__(self):
        one_of(KINDS, kind=self.kind)


_PUBLISHED = "moe_core.published, decoder-only models"
_V3 = "DeepSeek-V3, arXiv 2412.19437"
_ET = "Sun et al. 2026, arXiv 2603.11535"

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "shape",
            "d_model / layers is 94 in the median published model (quartiles 74 and 125), the "
            "active MLP 3.3 d_model wide (2.6 to 4.2)",
            _PUBLISHED,
            "measured",
        ),
        Rule(
            "sparsity",
            "experts / experts per token is 16 in the median published model (quartiles 11 and 32)",
            _PUBLISHED,
            "measured",
        ),
        Rule(
            "sparser is better",
            "at loss 1.5, sparsity 48 needs 1.69, 1.39 and 1.15 times fewer FLOPs than 8, 16 "
            "and 32",
            "Kimi-K2 technical report",
            "paper",
        ),
        Rule(
            "granularity",
            "the active MLP cut into more, narrower experts: a lower loss, with diminishing "
            "returns; the best cut is 8 to 12",
            "Krajewski et al. 2024, arXiv 2402.07871; arXiv 2507.17702",
            "paper",
        ),
        Rule(
            "expert width",
            "d*f/(d+f) of an expert must exceed the GPU's ridge (in bfloat16), or no number of "
            "tokens makes its products compute-bound",
            "Williams et al. 2009, Roofline; arithmetic",
            "paper",
        ),
        Rule(
            "top-2 or top-1",
            "two experts a token for quality, one for throughput at half the expert compute",
            "practice since GShard and Switch",
            "rule of thumb",
        ),
        Rule(
            "divisible experts",
            "a number of experts that divides evenly over the GPUs, best a power of two",
            "practice",
            "rule of thumb",
        ),
        Rule(
            "shared queries",
            "about four query heads share a key head: a smaller cache at little loss",
            "Ainslie et al. 2023, arXiv 2305.13245; the factor is practice",
            "rule of thumb",
        ),
        Rule(
            "tied head",
            "embedding and head are one matrix where two would take over a fifth of the active "
            "parameters",
            "practice",
            "rule of thumb",
        ),
        Rule(
            "batch",
            "2^22 tokens a step; fewer where that would leave under 20 000 steps (arXiv "
            "2603.11535: 10B tokens, 0.5M a step)",
            "practice",
            "rule of thumb",
        ),
        Rule(
            "loss-free bias",
            "a bias that only selects, moved by 0.001 against the load: at 1B parameters "
            "perplexity 9.56 -> 9.50 and MaxVio 0.72 -> 0.04 against a balance loss",
            "Wang et al. 2024, arXiv 2408.15664",
            "paper",
        ),
        Rule(
            "sequence loss",
            "beside the bias a sequence-wise balance loss of 0.0001, against extreme sequences",
            _V3,
            "paper",
        ),
        Rule(
            "sigmoid scores",
            "each expert's score by itself, normalised over the chosen ones",
            _V3,
            "paper",
        ),
        Rule(
            "balance loss",
            "coefficient 0.01 to 0.02 (value 1 at balance): Switch 0.01, OLMoE 0.01; over the "
            "global batch where you can (arXiv 2501.11873)",
            "Fedus et al. 2021, arXiv 2101.03961; arXiv 2409.02060; the range is practice",
            "rule of thumb",
        ),
        Rule(
            "z-loss",
            "coefficient 0.001 keeps softmax logits small; of the stabilisers tried the one that "
            "cost no quality",
            "Zoph et al. 2022, arXiv 2202.08906; OLMoE, arXiv 2409.02060",
            "paper",
        ),
        Rule(
            "no jitter",
            "noise on the router's input made 3 of 3 runs stable, against 4 of 6, at a loss in "
            "quality (-1.777 against -1.755); add it when an expert gets under 1 % of the tokens",
            "Zoph et al. 2022, arXiv 2202.08906; the last is practice",
            "rule of thumb",
        ),
        Rule(
            "top-1 weights",
            "with one expert a token, renormalised weights are constant and the router gets no "
            "gradient",
            "the museum of bugs; Megatron-LM #894",
            "measured",
        ),
        Rule(
            "dropless",
            "grouped products need no capacity: nothing is dropped",
            "MegaBlocks, arXiv 2211.15841; OLMoE, arXiv 2409.02060",
            "paper",
        ),
        Rule(
            "capacity",
            "where shapes must be static or memory is short: 1.0 to 1.5 in training (Switch 1.25), "
            "2.0 and more in evaluation",
            "Switch's published configs; the range is practice",
            "rule of thumb",
        ),
        Rule(
            "threshold routing",
            "causal and balanced without an auxiliary loss, for streams; EMA decay 0.999, expert "
            "choice for the first 4 memories (else experts starve), capacity band 0.5 in "
            "training",
            _ET,
            "paper",
        ),
        Rule(
            "shared expert",
            "one expert that every token visits. Evidence is mixed: threshold routing loses 0.02 "
            "nats without it, OLMoE found no gain, DeepSeek-V3 has one",
            f"{_ET}; arXiv 2409.02060; {_V3}",
            "paper",
        ),
        Rule(
            "when to spread experts",
            "expert parallelism when expert weights no longer fit, or get too few tokens; it is "
            "orthogonal to tensor and pipeline parallelism. Inside a node first: its links are "
            "several times faster",
            "practice",
            "rule of thumb",
        ),
        Rule(
            "backward repeats",
            "backward moves what forward moved: two dispatches and two combines a layer and step",
            "README of DeepEP",
            "paper",
        ),
        Rule(
            "30 % exchange",
            "all-to-all above 30 % of the step: fewer or wider experts, a node limit, one-byte "
            "dispatch (expert choice too, but not in a causal model: it reads the future)",
            "practice",
            "rule of thumb",
        ),
        Rule(
            "node limit",
            "a token goes to at most 4 nodes (of 8; of fewer, here to half of them); a copy "
            "crosses to each once",
            f"{_V3}, section 2.1.2; the half is practice",
            "paper",
        ),
        Rule(
            "4 x total",
            "an MoE needs about 4 times the parameters of a dense model of equal quality",
            "practice",
            "rule of thumb",
        ),
        Rule(
            "memory reserve",
            "a tenth of the memory stays free for kernels, buffers and fragmentation",
            "practice",
            "rule of thumb",
        ),
        Rule(
            "optimizer state",
            "16 bytes a parameter; moments and master copy are divided among the ranks that hold "
            "the same weights",
            "Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054",
            "paper",
        ),
    )
}


@dataclass(frozen=True)
class Choice:
    """What was chosen, why, and by which rule (None where it follows from another choice)."""

    what: str
    value: str
    why: str
    rule: Rule | None = None


def choice(what: str, value: str, why: str, rule: str) -> Choice:
    """A choice by the rule of that name."""
    return Choice(what, value, why, RULES[rule])
