"""DispatchPlan: from a Routing to rows sorted by expert, and back. No parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Routing


class DispatchPlan:
    """The order in which tokens visit the experts.

    Every kept slot becomes one row; rows of the same expert stand together, so that E small matmuls become one grouped one.
    Within an expert the rows keep the order of the batch.

    Attributes:
        slot_A: (A,) int64, the flat slot (token * K + k) of each row.
        counts_E: (E,) int64, rows per expert, in the order of the rows.
        n_tokens, top_k: T and K.
        mostly_empty: the routing has a slot for every expert and does not promise to keep them all, so that most slots have no row
            (expert choice, threshold, ReLU); read from shapes and promises, never from values.
    """

    def __init__(self, routing: Routing):
        B, N, self.top_k = routing.expert_indices.shape
        self.n_tokens = B * N
        self.mostly_empty = self.top_k == routing.n_experts and not routing.dropless
        mask = routing.capacity_mask.flatten()
        # Slots that are not kept sort to the very end, behind the last expert, and are cut off there.
        expert = torch.where(mask, routing.expert_indices.flatten(), routing.n_experts)
        order = torch.argsort(expert, stable=True)
        self.counts_E = routing.tokens_per_expert
        n_rows = len(order) if routing.dropless else int(mask.sum())  # a GPU would have to be waited for
        self.slot_A = order[:n_rows]
        # Where each slot's row is; slots without a row point behind the last one.
        self.row_of_slot = torch.full_like(order, n_rows)
        self.row_of_slot[self.slot_A] = torch.arange(n_rows, device=order.device)

    def gather(self, x: Tensor, input_weights: Tensor | None = None) -> Tensor:
        """(B, N, D) -> rows (A, D): a copy of the token for each of its kept slots, times the slot's weight (B, N, K) if given."""
        rows_AD = x.reshape(self.n_tokens, x.shape[-1]).index_select(0, self.slot_A // self.top_k)
        if input_weights is None:
            return rows_AD
        return (rows_AD * input_weights.flatten().index_select(0, self.slot_A).unsqueeze(-1)).to(rows_AD.dtype)

    def combine(self, rows_AD: Tensor, expert_weights: Tensor) -> Tensor:
        r"""Rows (A, D) back to their tokens, weighted: (B, N, D).

        .. math:: y_t = \sum_k w_{t,k} \, \text{row}(t, k)

        A slot without a row adds exactly 0. The sum runs in the dtype of the weights (float32 or higher), in the order of the slots:
        deterministic, where index_add_ on a GPU is not. Where most slots are empty, only the rows there are get read: the sum
        over K would need (T, K, D) of memory, mostly zeros.
        """
        with torch.autocast(rows_AD.device.type, enabled=False):
            sum_up = self._sum_over_rows if self.mostly_empty else self._sum_over_slots
            y_TD = sum_up(rows_AD.to(expert_weights.dtype), expert_weights.reshape(self.n_tokens, self.top_k))
        return y_TD.view(*expert_weights.shape[:2], rows_AD.shape[-1]).to(rows_AD.dtype)

    def _sum_over_slots(self, rows_AD: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, D) by way of (T, K, D): every slot fetches its row, or the row of zeros behind the last one."""
        slots_SD = torch.cat([rows_AD, rows_AD.new_zeros(1, rows_AD.shape[-1])]).index_select(0, self.row_of_slot)
        return torch.einsum("tkd,tk->td", slots_SD.view(self.n_tokens, self.top_k, rows_AD.shape[-1]), weights_TK)

    def _sum_over_rows(self, rows_AD: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, D) without (T, K, D): a token is a bag of rows, and torch sums weighted bags."""
        slots_A = self.slot_A.sort().values  # the kept slots, token after token
        kept_T = torch.zeros(self.n_tokens, dtype=torch.int64, device=slots_A.device)
        kept_T.scatter_add_(0, slots_A // self.top_k, torch.ones_like(slots_A))
        return F.embedding_bag(self.row_of_slot[slots_A], rows_AD, kept_T.cumsum(0) - kept_T, mode="sum",
                               per_sample_weights=weights_TK.flatten()[slots_A])
