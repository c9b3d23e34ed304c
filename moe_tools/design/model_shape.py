"""From active parameters to a shape: width, depth, heads, and experts of a whole width."""

from dataclasses import dataclass
from functools import cached_property
from math import log

from ..accounting import AttentionSpec, ModelSpec, MoESpec, tokens_to_reach
from .budget import DesignBudget, Impossible
from .rules import Choice, choice

ASPECT, WIDTH = 94, 3.3  # rule "shape": d_model / layers, and width of the active MLP / d_model
TOLERANCE = 0.05  # of the active parameters asked for
TIED_ABOVE = 0.2  # rule "tied head"
SPARSITY = 16  # rule "sparsity"
TOP_KS = (8, 4, 2)


@dataclass(frozen=True)
class ModelShape:
    """A language model whose layers are all MoE: the numbers that its configs share.

    Heads fill the width: H d = D.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    n_experts: int
    top_k: int
    n_shared_experts: int
    vocab_size: int
    tied: bool

    @property
    def head_dim(self) -> int:
        """d."""
        return self.d_model // self.n_heads

    @property
    def granularity(self) -> int:
        """G: into how many experts the active MLP is cut."""
        return self.top_k + self.n_shared_experts

    @property
    def expansion(self) -> float:
        """Parameters of the experts over the active ones of them."""
        return (self.n_experts + self.n_shared_experts) / self.granularity

    @cached_property
    def spec(self) -> ModelSpec:
        """The same to count with: RMS norms, query and key norms, gated experts, no biases."""
        return ModelSpec.decoder(
            d_model=self.d_model,
            vocab_size=self.vocab_size,
            n_layers=self.n_layers,
            tied=self.tied,
            source="moe_tools.design",
            attention=AttentionSpec(self.n_heads, self.n_kv_heads, self.head_dim, qk_norm="head"),
            moe=MoESpec(self.n_experts, self.top_k, self.d_ff, self.n_shared_experts),
        )


def choose_shape(budget: DesignBudget, active: float) -> ModelShape:
    """The shape for ``active`` parameters.

    By the rules "shape", "granularity", "expert width" and "sparsity".

    Raises:
        Impossible: no shape has so few parameters with this vocabulary, or the total asked for
            leaves too few experts.
    """
    shared = 0 if budget.router_name == "topk" else 1
    *more, fewest = (budget.top_k,) if budget.top_k else TOP_KS
    for top_k in (*more, fewest):
        try:
            shape = find_shape(active, budget.vocab_size, top_k, shared, SPARSITY * top_k)
        except Impossible:
            if top_k == fewest:
                raise
            continue
        if tokens_to_reach(budget.accelerator.ridge, shape.d_model, shape.d_ff) < float("inf"):
            break
    if budget.total is None:
        return shape
    off, best = float("inf"), shape
    for _ in range(6):  # other experts move width and depth, and these what an expert takes
        n_experts = _experts_for(shape, budget)
        shape = find_shape(active, budget.vocab_size, top_k, shared, n_experts)
        if abs(log(shape.spec.total_params / budget.total)) < off:
            off, best = abs(log(shape.spec.total_params / budget.total)), shape
    return best


def find_shape(
    active: float, vocab_size: int, top_k: int, n_shared_experts: int, n_experts: int
) -> ModelShape:
    """The shape nearest to the published ones whose active parameters are within 5 % of ``active``.

    Raises Impossible if there is none.
    """
    best, found = float("inf"), None
    for d_model in (
        *range(32, 256, 32),
        *range(256, 1024, 128),
        *range(1024, 2048, 256),
        *range(2048, 16385, 512),
    ):
        head_dim = 128 if d_model >= 1024 else 64 if d_model >= 256 else 32
        heads = d_model // head_dim
        kv_heads = max(
            n for n in range(1, max(1, heads // 4) + 1) if heads % n == 0
        )  # rule "shared queries"
        tied = 2 * vocab_size * d_model > TIED_ABOVE * active
        embeddings = vocab_size * d_model * (1 if tied else 2) + d_model
        if embeddings > active:
            break
        slope = (
            3 * d_model * (top_k + n_shared_experts)
        )  # active parameters of one unit of d_ff, in a layer
        layer = (
            2 * d_model**2
            + 2 * d_model * kv_heads * head_dim
            + 2 * head_dim
            + d_model * n_experts
            + 2 * d_model
        )
        for n_layers in range(2, 129):
            d_ff = _round((active - embeddings - n_layers * layer) / (n_layers * slope))
            if d_ff < 16:
                break
            off = (embeddings + n_layers * (layer + d_ff * slope)) / active - 1
            width = (top_k + n_shared_experts) * d_ff / d_model
            score = abs(log(d_model / n_layers / ASPECT)) + abs(log(width / WIDTH)) + 2 * abs(off)
            if abs(off) <= TOLERANCE and score < best:
                best, found = (
                    score,
                    ModelShape(
                        d_model,
                        n_layers,
                        heads,
                        kv_heads,
                        d_ff,
                        n_experts,
                        top_k,
                        n_shared_experts,
                        vocab_size,
                        tied,
                    ),
                )
    if found is None:
        smallest = ModelShape(
            32, 2, 1, 1, 16, n_experts, top_k, n_shared_experts, vocab_size, True
        ).spec.active_params
        raise Impossible(
            f"active={active:.4g} is too little for vocab_size={vocab_size} and top_k={top_k}",
            f"active={1.05 * smallest:.3g}",
            "a smaller vocab_size",
        )
    return found


def _round(d_ff: float) -> int:
    """To what matrix units like: multiples of 64, of 16 where an expert is narrow."""
    step = 64 if d_ff >= 512 else 16
    return int(d_ff / step + 0.5) * step


def _experts_for(shape: ModelShape, budget: DesignBudget) -> int:
    """The number of experts with the nearest total: 4 to 8 times a power of two."""
    one = shape.spec.parts["experts"] // shape.n_experts
    wanted = (budget.total - (shape.spec.total_params - shape.spec.parts["experts"])) / one
    step = 2 ** (max(1, int(wanted / 4)).bit_length() - 1)
    n_experts = max(1, int(wanted / step + 0.5)) * step
    least = -(-2 * shape.top_k // step) * step
    if n_experts < least:
        needed = shape.spec.total_params + (least - shape.n_experts) * one
        raise Impossible(
            f"total={budget.total:.4g} leaves {max(0, int(wanted))} experts, of which a token "
            f"takes top_k={shape.top_k}: hardly sparse",
            f"total={needed:.4g} ({least} experts)",
            "a dense model",
        )
    return n_experts


def shape_choices(shape: ModelShape, budget: DesignBudget) -> list[Choice]:
    """What the shape rests on."""
    ridge = budget.accelerator.ridge
    d, f = shape.d_model, shape.d_ff
    reached = tokens_to_reach(ridge, d, f) < float("inf")
    cut = (
        "asked for"
        if budget.top_k
        else f"the most of {', '.join(map(str, TOP_KS))} whose experts can reach the ridge"
    )
    choices = [
        choice(
            "d_model, layers",
            f"{d}, {shape.n_layers}",
            f"{d / shape.n_layers:.0f} to 1; active MLP {shape.granularity * f / d:.2f} d_model "
            "wide",
            "shape",
        ),
        choice(
            "heads, key heads, width",
            f"{shape.n_heads}, {shape.n_kv_heads}, {shape.head_dim}",
            "they fill d_model",
            "shared queries",
        ),
        choice(
            "experts a token",
            f"{shape.top_k}"
            + (f" and {shape.n_shared_experts} shared" if shape.n_shared_experts else ""),
            (
                cut
                if reached or budget.top_k
                else "no expert of this model reaches the ridge: few and wide ones"
            ),
            "granularity" if shape.top_k > 2 else "top-2 or top-1",
        ),
        choice(
            "d_ff of an expert",
            str(f),
            f"d*f/(d+f) is {d * f / (d + f):.0f}; the ridge of {budget.accelerator.name} is "
            f"{ridge:.0f}",
            "expert width",
        ),
        choice(
            "experts",
            str(shape.n_experts),
            f"{shape.n_experts / shape.top_k:.3g} for each one a token takes"
            + (
                "; sparser is better where it fits"
                if budget.total is None
                else ": nearest to the total asked for"
            ),
            "sparsity",
        ),
    ]
    if shape.tied:
        share = 2 * shape.vocab_size * d / (shape.spec.active_params + shape.vocab_size * d)
        choices.append(
            choice(
                "head",
                "tied to the embedding",
                f"untied they would be {share:.0%} of the active parameters",
                "tied head",
            )
        )
    return choices
