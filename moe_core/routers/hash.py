"""HashRouter: which experts a token visits is looked up by its id (Roller et al. 2021)."""

import heapq
import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from ..routing import Routing
from ..validate import one_of, whole
from .base import checked_padding_mask
from .topk import SCORING, TopKOptions, TopKRouter

WEIGHTS = ("uniform", "learned")
_LEARNED = {"score_func", "norm_topk_prob", "norm_eps", "routed_scaling_factor"}
_FIXED = set(SCORING) - _LEARNED | {"aux_loss_weight", "z_loss_weight", "jitter_noise"}


@dataclass(frozen=True)
class HashOptions(TopKOptions, fixed=_FIXED):
    """The arguments of ``HashRouter``."""

    top_k: int = 1
    _: KW_ONLY
    vocab_size: int
    frequencies: Sequence[float] | None = None
    seed: int = 0
    weights: str = "uniform"
    score_func: str = "sqrt_softplus"
    norm_eps: float = 1e-20

    def __post_init__(self):
        super().__post_init__()
        one_of(WEIGHTS, weights=self.weights)
        whole(1, vocab_size=self.vocab_size)
        whole(0, seed=self.seed)
        if self.frequencies is not None:
            check_frequencies(self.frequencies, self.vocab_size)


class HashRouter(TopKRouter):
    r"""A fixed table from token id to K experts: no choice is learned, so none can collapse.

    .. math:: e_1..e_K = \mathrm{table}[\text{token id}], \quad w_k = \frac{1}{K} \quad \text{or}
              \quad w_k = \gamma \, s_{e_k} \Big/ \sum_j s_{e_j}

    Args, besides ``TopKRouter``'s, of which those that score and weigh are for learned weights:
        vocab_size: number of token ids; ``table`` (vocab_size, K) int64 is a buffer.
        frequencies: (vocab_size,) how often each id occurs; the table then balances occurrences.
        seed: of the table; the same seed gives the same table everywhere.
        weights: "uniform", 1/K, the hash layer as published: no parameter, logits of 0, scores of
            1/E. "learned": a router weighs the experts, as in DeepSeek-V4's first layers.

    Source: Roller et al. 2021 (arXiv 2106.04426), balanced hash; ``tid2eid`` of DeepSeek-V4.
    """

    Options = HashOptions

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.weights == "uniform":
            self.weight = None  # nothing to learn: it would never get a gradient

    def initial_state(self) -> dict[str, Tensor]:
        """The table."""
        sizes = self.vocab_size, self.n_experts, self.top_k
        return {"table": balanced_table(*sizes, frequencies=self.frequencies, seed=self.seed)}

    def reset_weight(self) -> None:
        """Draw the weight, if there is one."""
        if isinstance(self.weight, nn.Parameter):
            super().reset_weight()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D) by their ids (B, N); what stands at padding is not read.

        Raises ValueError where token_ids is missing or does not fit, IndexError where an id is not
        in [0, vocab_size) (on the CPU; a GPU stops with an assertion).
        """
        self.require_tokens(x)
        B, N, _D = x.shape
        self._require_ids(token_ids, x)
        if padding_mask is not None:
            token_ids = token_ids.masked_fill(~checked_padding_mask(padding_mask, x), 0)
        indices_BNK = self.table.index_select(0, token_ids.flatten()).view(B, N, self.top_k)
        uniform = self.weights == "uniform"
        if uniform:
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits_BNE = torch.zeros(B, N, self.n_experts, dtype=dtype, device=x.device)
            scores_BNE = torch.softmax(logits_BNE, dim=-1)
            weights_BNK = torch.full_like(indices_BNK, 1 / self.top_k, dtype=dtype)
        else:
            logits_BNE = self.logits(x)
            scores_BNE = self.scores_of(logits_BNE)
            weights_BNK = self.weigh(logits_BNE, scores_BNE, indices_BNK)
        choice = indices_BNK, weights_BNK, logits_BNE, scores_BNE, padding_mask
        routing = self.routing(*choice, normalized=uniform)
        return self.limit_capacity(routing)  # there is no loss: nothing here is learned but weights

    def _require_ids(self, token_ids: Tensor | None, x: Tensor) -> None:
        if token_ids is None:
            raise ValueError(
                "token_ids=None must be (B, N) int64: a HashRouter routes by token id, "
                "call router(x, padding_mask, token_ids)"
            )
        if token_ids.shape != x.shape[:2] or token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"token_ids must be int64 of shape {tuple(x.shape[:2])}, "
                f"this one is {token_ids.dtype} of shape {tuple(token_ids.shape)}"
            )


def check_frequencies(frequencies: Sequence[float], vocab_size: int) -> None:
    """Raise ValueError unless these are vocab_size finite numbers from 0 on."""
    if len(frequencies) != vocab_size:
        found = len(frequencies)
        raise ValueError(f"frequencies has {found} entries, must have vocab_size={vocab_size}")
    values = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
    wrong = ~values.isfinite() | (values < 0)
    if bool(wrong.any()):
        value = frequencies[int(wrong.int().argmax())]
        raise ValueError(f"frequencies={value!r} must be at least 0 and finite")


def balanced_table(
    vocab_size: int,
    n_experts: int,
    top_k: int,
    *,
    frequencies: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """(vocab_size, K) int64: the most frequent id first, each to the K experts with least to do.

    ``frequencies`` None: equally often. ``seed`` decides between ids equally frequent and experts
    equally busy. Raises ValueError where an argument is out of range.
    Source: Roller et al. 2021 (arXiv 2106.04426), the balanced assignment.
    """
    HashOptions(1, n_experts, top_k, vocab_size=vocab_size, frequencies=frequencies, seed=seed)
    often = [1] * vocab_size if frequencies is None else list(frequencies)
    lot = random.Random(seed)  # not torch's: the table is the same on every device and version
    ids = sorted(range(vocab_size), key=lambda token: (-often[token], lot.random()))
    busy = [(0, lot.random(), expert) for expert in range(n_experts)]
    heapq.heapify(busy)
    table = [[]] * vocab_size
    for token in ids:
        least = [heapq.heappop(busy) for _ in range(top_k)]
        table[token] = [expert for _, _, expert in least]
        for occurrences, _, expert in least:
            heapq.heappush(busy, (occurrences + often[token], lot.random(), expert))
    return torch.tensor(table, dtype=torch.int64)
