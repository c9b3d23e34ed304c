"""DispatchPlan: from a Routing to rows sorted by expert, and back. No parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Routing


class DispatchPlan:
    """The order in which tokens visit the experts: every kept slot becomes one row.

    Rows of an expert stand together, in the order of the batch, so that E small matmuls become one
    grouped one. How many slots are kept is a value, which a GPU must be synchronised with to know.
    A static plan does not ask: it has a row for every slot, A = T*K. Rows of slots that are not
    kept are zeros, stand at the end, count to the last expert, and have weight 0. (Where a
    parameter of the last expert is not finite, those tokens are not either.)

    Args:
        routing: what any router returned.
        n_experts: only the first so many experts have rows; None for all of them.
        static: None: where most slots are kept, on any device but the CPU or under torch.compile.

    Attributes:
        slot_A: (A,) int64, the flat slot (token * K + k) of each row.
        counts_E: (E,) int64, rows per expert; their sum is A.
        kept_E: (E,) int64, those with a kept slot; counts_E unless the plan is static.
        n_tokens, top_k: T and K.
        bags: the rows of each token, in the order of its slots: (T, K) int64, or a flat list.
        starts_T: (T,) int64, where each token starts in that list; None where bags is (T, K).
        real_A: (A,) bool, False for rows without a kept slot; None where there are none such.
    """

    def __init__(
        self, routing: Routing, n_experts: int | None = None, *, static: bool | None = None
    ):
        B, N, self.top_k = routing.expert_indices.shape
        self.n_tokens, E = B * N, routing.scores.shape[-1]
        mask_S, expert_S = routing.capacity_mask.flatten(), routing.expert_indices.flatten()
        everything = routing.dropless
        if n_experts is not None and n_experts < E:  # the others compute without rows
            mask_S, E, everything = mask_S & (expert_S < n_experts), n_experts, False
            static = False if static is None else static  # perhaps most slots go elsewhere
        if static is None:  # with a slot for every expert (expert choice, ...) most have no row
            asking_costs = mask_S.device.type != "cpu" or torch.compiler.is_compiling()
            static = self.top_k < E and asking_costs
        # Slots that are not kept sort to the very end, behind the last expert.
        expert_S = torch.where(mask_S, expert_S, E)
        self.slot_A = torch.argsort(expert_S, stable=True)  # stable: the batch's order in an expert
        counts = expert_S.new_zeros(E + 1).scatter_add_(0, expert_S, torch.ones_like(expert_S))
        self.counts_E = self.kept_E = counts[:E]
        self.starts_T = self.real_A = None
        if static and not everything:
            self.real_A = mask_S[self.slot_A]
            # The counts must add up to A: the rows at the end go to the last expert.
            self.counts_E = torch.cat([counts[: E - 1], counts[E - 1 :].sum(0, keepdim=True)])
        elif not everything:
            self.slot_A = self.slot_A[: int(mask_S.sum())]  # synchronises with a GPU
        row_of_slot_S = torch.empty_like(expert_S)
        row_of_slot_S[self.slot_A] = torch.arange(self.slot_A.shape[0], device=mask_S.device)
        if static or everything:
            self.bags = row_of_slot_S.view(self.n_tokens, self.top_k)
        else:
            self.bags = row_of_slot_S[self.slot_A.sort().values]  # kept slots, token after token
            kept_T = mask_S.view(self.n_tokens, self.top_k).sum(-1)
            self.starts_T = kept_T.cumsum(0) - kept_T

    @property
    def token_A(self) -> Tensor:
        """(A,) int64, the token of each row."""
        return self.slot_A // self.top_k

    def gather(self, x: Tensor, input_weights: Tensor | None = None) -> Tensor:
        """(B, N, D) -> rows (A, D): each kept slot's token, times ``input_weights`` (B, N, K)."""
        rows_AD = _Gather.apply(x.reshape(self.n_tokens, x.shape[-1]), self)
        if input_weights is None:
            return rows_AD
        weights_A1 = input_weights.flatten().index_select(0, self.slot_A).unsqueeze(-1)
        return (rows_AD * weights_A1).to(rows_AD.dtype)

    def combine(self, rows_AD: Tensor, expert_weights: Tensor) -> Tensor:
        r"""Rows (A, D) back to their tokens, weighted: (B, N, D).

        .. math:: y_t = \sum_k w_{t,k} \, \text{row}(t, k)

        A slot without a row adds exactly 0. Sums in the weights' dtype, in the order of the slots.
        """
        weights_TK = expert_weights.reshape(self.n_tokens, self.top_k)
        y_TD = _Combine.apply(rows_AD, weights_TK, self)
        return y_TD.view(*expert_weights.shape[:2], rows_AD.shape[-1])

    def bag_weights(self, weights_TK: Tensor) -> Tensor:
        """The weights in the order of ``bags``; 0 for a static plan's rows without a kept slot."""
        if self.starts_T is not None:
            return weights_TK.flatten()[self.slot_A[self.bags]]
        if self.real_A is None:
            return weights_TK.contiguous()
        return weights_TK * self.real_A[self.bags]


# Gathering copies a token to its rows, so its backward adds the rows up; combining adds rows up, so
# its backward copies. Each is the other's transpose, and both sum in a fixed order: torch's own
# backward of index_select adds in any order on a GPU.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        rows_AD = x_TD.index_select(0, plan.token_A)
        return rows_AD if plan.real_A is None else rows_AD.masked_fill_(~plan.real_A[:, None], 0)

    @staticmethod
    def backward(ctx, grad_AD: Tensor):
        # Adding K rows up in bfloat16 would round K times.
        wide = torch.promote_types(grad_AD.dtype, torch.float32)
        return _AddUp.apply(grad_AD.to(wide), ctx.plan).to(grad_AD.dtype), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_AD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _sum_bags(rows_AD, plan, None)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        return _Gather.apply(grad_TD, ctx.plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_AD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.save_for_backward(rows_AD, weights_TK)
        ctx.plan = plan
        wide_AD = rows_AD.to(weights_TK.dtype)
        return _sum_bags(wide_AD, plan, plan.bag_weights(weights_TK)).to(rows_AD.dtype)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        (rows_AD, weights_TK), plan = ctx.saved_tensors, ctx.plan
        weights_A = weights_TK.flatten().index_select(0, plan.slot_A)
        grad_AD = _Gather.apply(grad_TD, plan).to(weights_A.dtype)
        # A weight's gradient is its token's gradient times the row; a row's is the weight times it.
        grad_A = torch.linalg.vecdot(rows_AD.to(weights_A.dtype), grad_AD)
        grad_S = torch.zeros_like(weights_TK).flatten().index_copy(0, plan.slot_A, grad_A)
        grad_rows_AD = (grad_AD * weights_A.unsqueeze(-1)).to(rows_AD.dtype)
        return grad_rows_AD, grad_S.view_as(weights_TK), None


def _sum_bags(rows_AD: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
    bags, starts_T = plan.bags, plan.starts_T
    n_bags = bags.shape[0] if starts_T is None else starts_T.shape[0]
    if rows_AD.shape[0] == 0 or n_bags == 0:
        return rows_AD.new_zeros(n_bags, rows_AD.shape[-1])
    # A bag's weighted sum in one operation, which never makes the table (T, K, D).
    rows_AD = rows_AD.contiguous()
    return F.embedding_bag(bags, rows_AD, starts_T, mode="sum", per_sample_weights=weights)
