"""DispatchPlan: from a Routing to rows sorted by expert, and back. No parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from .routing import Routing


class DispatchPlan:
    """The order in which tokens visit the experts.

    Every kept slot becomes one row; rows of the same expert stand together, so that E small matmuls become one grouped one.
    Within an expert the rows keep the order of the batch.

    How many slots are kept is a value, and a GPU would have to be waited for to know it. A static plan does not ask: it has a row for
    every slot, A = T*K; those of slots that are not kept are zeros, stand at the very end, are counted to the last expert, and
    what becomes of them gets the weight 0. (So where a parameter of the last expert is not finite, their tokens are not either.)

    Args:
        routing: what any router returned.
        static: make a static plan. None: for routings that keep most of their slots, wherever reading a value is costly (on any device but
            the CPU, and under torch.compile).

    Attributes:
        slot_A: (A,) int64, the flat slot (token * K + k) of each row.
        counts_E: (E,) int64, rows per expert, in the order of the rows; their sum is A.
        n_tokens, top_k: T and K.
        bags: the rows of each token, in the order of its slots: (T, K) int64, or a flat list of them.
        starts_T: (T,) int64, where each token's bag starts in that list; None where bags is (T, K).
        real_A: (A,) bool, False for rows without a kept slot; None where there are none such.
    """

    def __init__(self, routing: Routing, static: bool | None = None):
        B, N, self.top_k = routing.expert_indices.shape
        self.n_tokens, E = B * N, routing.n_experts
        mask_S = routing.capacity_mask.flatten()
        if (
            static is None
        ):  # with a slot for every expert (expert choice, threshold, ReLU) most slots have no row
            static = self.top_k < E and (
                mask_S.device.type != "cpu" or torch.compiler.is_compiling()
            )
        # Slots that are not kept sort to the very end, behind the last expert.
        expert_S = torch.where(mask_S, routing.expert_indices.flatten(), E)
        self.slot_A = torch.argsort(expert_S, stable=True)
        self.counts_E, self.starts_T, self.real_A = routing.tokens_per_expert, None, None
        if static and not routing.dropless:
            self.real_A = mask_S[self.slot_A]
            surplus = len(mask_S) - self.counts_E.sum()
            self.counts_E = torch.cat([self.counts_E[:-1], self.counts_E[-1:] + surplus])
        elif not routing.dropless:
            self.slot_A = self.slot_A[: int(mask_S.sum())]
        row_of_slot_S = torch.empty_like(mask_S, dtype=torch.int64)
        row_of_slot_S[self.slot_A] = torch.arange(len(self.slot_A), device=mask_S.device)
        if static or routing.dropless:
            self.bags = row_of_slot_S.view(self.n_tokens, self.top_k)
        else:
            self.bags = row_of_slot_S[
                self.slot_A.sort().values
            ]  # the kept slots, token after token
            kept_T = mask_S.view(self.n_tokens, self.top_k).sum(-1)
            self.starts_T = kept_T.cumsum(0) - kept_T

    @property
    def token_A(self) -> Tensor:
        """(A,) int64, the token of each row."""
        return self.slot_A // self.top_k

    def gather(self, x: Tensor, input_weights: Tensor | None = None) -> Tensor:
        """(B, N, D) -> rows (A, D): a copy of the token for each of its kept slots, times the slot's weight (B, N, K) if given."""
        rows_AD = _Gather.apply(x.reshape(self.n_tokens, x.shape[-1]), self)
        if input_weights is None:
            return rows_AD
        return (rows_AD * input_weights.flatten().index_select(0, self.slot_A).unsqueeze(-1)).to(
            rows_AD.dtype
        )

    def combine(self, rows_AD: Tensor, expert_weights: Tensor) -> Tensor:
        r"""Rows (A, D) back to their tokens, weighted: (B, N, D).

        .. math:: y_t = \sum_k w_{t,k} \, \text{row}(t, k)

        A slot without a row adds exactly 0. The sum runs in the dtype of the weights (float32 or higher), in the order of the slots.
        """
        y_TD = _Combine.apply(rows_AD, expert_weights.reshape(self.n_tokens, self.top_k), self)
        return y_TD.view(*expert_weights.shape[:2], rows_AD.shape[-1])

    def slot_weights(self, weights_TK: Tensor) -> Tensor:
        """The weights in the order of ``bags``; 0 for a static plan's rows without a kept slot."""
        if self.starts_T is not None:
            return weights_TK.flatten()[self.slot_A[self.bags]]
        return (
            weights_TK.contiguous() if self.real_A is None else weights_TK * self.real_A[self.bags]
        )


# Gathering copies a token to its rows, so its backward adds the rows up; combining adds rows up, so its backward copies. Each is the
# other's transpose, and both sum in a fixed order: torch's own backward of index_select adds in any order on a GPU.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _copy(x_TD, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AD: Tensor):
        wide = torch.promote_types(grad_AD.dtype, torch.float32)
        return _sum_bags(grad_AD.to(wide), ctx.plan.bags, ctx.plan.starts_T, None).to(
            grad_AD.dtype
        ), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_AD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.save_for_backward(rows_AD, weights_TK)
        ctx.plan = plan
        return _combine(
            rows_AD.to(weights_TK.dtype), plan.bags, plan.starts_T, plan.slot_weights(weights_TK)
        ).to(rows_AD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        (rows_AD, weights_TK), plan = ctx.saved_tensors, ctx.plan
        weights_A = weights_TK.flatten().index_select(0, plan.slot_A)
        grad_AD, grad_weights_A = _combine_backward(
            _copy(grad_TD, plan).to(weights_A.dtype), rows_AD.to(weights_A.dtype), weights_A
        )
        grad_weights = (
            torch.zeros_like(weights_TK)
            .flatten()
            .index_copy(0, plan.slot_A, grad_weights_A)
            .view_as(weights_TK)
        )
        return grad_AD.to(rows_AD.dtype), grad_weights, None


def _copy(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    rows_AD = x_TD.index_select(0, plan.token_A)
    return rows_AD if plan.real_A is None else rows_AD.masked_fill_(~plan.real_A.unsqueeze(-1), 0)


def _sum_bags(
    rows_AD: Tensor, bags: Tensor, starts_T: Tensor | None, weights: Tensor | None
) -> Tensor:
    """(T, D): the rows of each bag, weighted, added up in the order of the bag, without making (T, K, D)."""
    n_bags = len(bags) if starts_T is None else len(starts_T)
    if len(rows_AD) == 0 or n_bags == 0:
        return rows_AD.new_zeros(n_bags, rows_AD.shape[-1])
    return F.embedding_bag(
        bags, rows_AD.contiguous(), starts_T, mode="sum", per_sample_weights=weights
    )


# Operations of their own, so that torch's FlopCounterMode counts the weighting: 2 * A * D forward, twice that backward.


@torch.library.custom_op("moe_core::combine", mutates_args=())
def _combine(rows_AD: Tensor, bags: Tensor, starts_T: Tensor | None, weights: Tensor) -> Tensor:
    return _sum_bags(rows_AD, bags, starts_T, weights)


@_combine.register_fake
def _(rows_AD, bags, starts_T, weights):
    return rows_AD.new_empty(len(bags) if starts_T is None else len(starts_T), rows_AD.shape[-1])


@torch.library.custom_op("moe_core::combine_backward", mutates_args=())
def _combine_backward(grad_AD: Tensor, rows_AD: Tensor, weights_A: Tensor) -> tuple[Tensor, Tensor]:
    """A row's gradient is its weight times its token's gradient; a weight's is that gradient times the row."""
    return grad_AD * weights_A.unsqueeze(-1), torch.linalg.vecdot(rows_AD, grad_AD)


@_combine_backward.register_fake
def _(grad_AD, rows_AD, weights_A):
    return torch.empty_like(grad_AD), torch.empty_like(weights_A)


@register_flop_formula(torch.ops.moe_core.combine)
def _(rows, bags, starts, weights, out_shape=None, **kwargs) -> int:
    return 2 * rows[0] * rows[1]


@register_flop_formula(torch.ops.moe_core.combine_backward)
def _(grad, rows, weights, out_shape=None, **kwargs) -> int:
    return 4 * rows[0] * rows[1]
