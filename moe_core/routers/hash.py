"""HashRouter: which experts a token visits is looked up by its id (Roller et al. 2021)."""

import heapq
import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..capacity import CapacityRule
from ..routing import Routing
from ..validate import at_least, one_of, top_k_fits, whole
from .base import require_padding_mask
from .topk import SCORE_FUNCS, TopKRouter

WEIGHTS = ("uniform", "learned")


class HashRouter(TopKRouter):
    r"""A fixed table from token id to K experts; nothing about the choice is learned, so nothing can collapse.

    .. math:: e_1..e_K = \mathrm{table}[\text{token id}], \quad w_k = \frac{1}{K} \quad \text{or} \quad
              w_k = \gamma \, s_{e_k} \Big/ \sum_j s_{e_j}

    Args:
        d_model, n_experts, top_k: D, E and K.
        vocab_size: number of token ids.
        frequencies: how often each id occurs, (vocab_size,) numbers; the table then balances occurrences instead of ids.
        seed: of the table; the same seed gives the same table everywhere.
        weights: "uniform", 1/K, the hash layer as published: the router has no parameter, logits of 0 and scores of 1/E.
            "learned": a router chooses nothing but weighs the looked-up experts, as in the first layers of DeepSeek-V4.
        score_func, norm_topk_prob, norm_eps, routed_scaling_factor: of learned weights, see ``TopKRouter``; DeepSeek-V4 has
            "sqrt_softplus", True and 1.5.
        capacity_factor: see ``Router``.

    Attributes:
        table: (vocab_size, K) int64, a buffer.

    Raises:
        ValueError: an argument is out of range.

    Source: Roller et al. 2021 (arXiv 2106.04426), balanced hash; DeepSeek-V4's table ``tid2eid`` in transformers.
    """

    needs_token_ids = True

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 1,
        *,
        vocab_size: int,
        frequencies: Sequence[float] | None = None,
        seed: int = 0,
        weights: str = "uniform",
        score_func: str = "sqrt_softplus",
        norm_topk_prob: bool = True,
        norm_eps: float = 1e-20,
        routed_scaling_factor: float = 1.0,
        capacity_factor: float | CapacityRule | None = None,
    ):
        one_of(WEIGHTS, weights=weights)
        frequencies = None if frequencies is None else list(frequencies)
        make_table = partial(
            balanced_table, vocab_size, n_experts, top_k, frequencies=frequencies, seed=seed
        )
        table_VK = make_table()
        super().__init__(
            d_model,
            n_experts,
            top_k,
            score_func=score_func,
            norm_topk_prob=norm_topk_prob,
            norm_eps=norm_eps,
            routed_scaling_factor=routed_scaling_factor,
            capacity_factor=capacity_factor,
        )
        self.vocab_size, self.weights, self._make_table = vocab_size, weights, make_table
        self.register_buffer("table", table_VK)
        if weights == "uniform":
            self.weight = None

    def reset_parameters(self) -> None:
        """Draw the weight anew, if there is one, and write the table again (a module made on the meta device has none)."""
        super().reset_parameters()
        if "table" in self._buffers:  # not yet when the base class calls this first
            self.table.copy_(self._make_table())

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Routing:
        """Route tokens (B, N, D) by their ids (B, N), of an integer dtype; what stands at padding is not read.

        Raises:
            ValueError: token_ids is missing, x, padding_mask or token_ids has the wrong shape, or token_ids the wrong dtype.
            IndexError: an id is not in [0, vocab_size) (on the CPU; a GPU stops with an assertion of its own).
        """
        if token_ids is None:
            raise ValueError(
                "token_ids=None: a HashRouter routes by token id, call router(x, padding_mask, token_ids)"
            )
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, must be (B, N, d_model={self.d_model})"
            )
        if token_ids.shape != x.shape[:2] or token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"token_ids must be int64 of shape {tuple(x.shape[:2])}, "
                f"this one is {token_ids.dtype} of shape {tuple(token_ids.shape)}"
            )
        if padding_mask is not None:
            require_padding_mask(padding_mask, token_ids.shape)
            token_ids = token_ids.masked_fill(~padding_mask, 0)
        indices_BNK = self.table.index_select(0, token_ids.flatten()).view(*x.shape[:2], self.top_k)
        if self.weights == "uniform":
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits_BNE = torch.zeros(*x.shape[:2], self.n_experts, dtype=dtype, device=x.device)
            weights_BNK = torch.full_like(indices_BNK, 1 / self.top_k, dtype=dtype)
            return self.route(
                indices_BNK,
                weights_BNK,
                logits_BNE,
                torch.softmax(logits_BNE, dim=-1),
                padding_mask=padding_mask,
                normalized=True,
            )
        logits_BNE = self.logits(x)
        scores_BNE = SCORE_FUNCS[self.score_func](logits_BNE)
        return self.route(
            indices_BNK,
            self.weigh(logits_BNE, scores_BNE, indices_BNK),
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
        )


def balanced_table(
    vocab_size: int,
    n_experts: int,
    top_k: int,
    *,
    frequencies: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """(vocab_size, K) int64: from the most frequent id to the rarest, each goes to the K experts with the least to do so far.

    Args:
        frequencies: how often each id occurs; None: equally often, and the numbers of ids per expert then differ by 1 at most.
        seed: decides between ids equally frequent and experts equally busy.

    Raises:
        ValueError: a size is out of range, frequencies are not vocab_size finite numbers from 0 on.

    Source: Roller et al. 2021 (arXiv 2106.04426), the balanced assignment.
    """
    whole(1, vocab_size=vocab_size)
    whole(0, seed=seed)
    top_k_fits(top_k, n_experts)
    frequencies = [1] * vocab_size if frequencies is None else list(frequencies)
    if len(frequencies) != vocab_size:
        raise ValueError(
            f"frequencies has {len(frequencies)} entries, must have vocab_size={vocab_size}"
        )
    for frequency in frequencies:
        at_least(0, frequencies=frequency)
    lot = random.Random(
        seed
    )  # not torch's: the table is the same on every device and in every version
    ids = sorted(range(vocab_size), key=lambda token: (-frequencies[token], lot.random()))
    busy = [(0, lot.random(), expert) for expert in range(n_experts)]
    heapq.heapify(busy)
    table = [[]] * vocab_size
    for token in ids:
        least = [heapq.heappop(busy) for _ in range(top_k)]
        table[token] = [expert for _, _, expert in least]
        for load, _, expert in least:
            heapq.heappush(busy, (load + frequencies[token], lot.random(), expert))
    return torch.tensor(table, dtype=torch.int64)
