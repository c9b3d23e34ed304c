"""DispatchPlan: from a Routing to rows sorted by expert, and back. No parameters."""

import torch
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
    """

    def __init__(self, routing: Routing):
        B, N, self.top_k = routing.expert_indices.shape
        self.n_tokens = B * N
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

        A slot without a row adds exactly 0. The sum over K runs in the dtype of the weights (float32 or higher), in a fixed
        order: deterministic, where index_add_ on a GPU is not.
        """
        B, N, K = expert_weights.shape
        none_1D = rows_AD.new_zeros(1, rows_AD.shape[-1])
        slots_SD = torch.cat([rows_AD, none_1D]).index_select(0, self.row_of_slot)
        slots_TKD = slots_SD.view(B * N, K, rows_AD.shape[-1]).to(expert_weights.dtype)
        with torch.autocast(rows_AD.device.type, enabled=False):
            y_TD = torch.einsum("tkd,tk->td", slots_TKD, expert_weights.reshape(B * N, K))
        return y_TD.view(B, N, rows_AD.shape[-1]).to(rows_AD.dtype)
