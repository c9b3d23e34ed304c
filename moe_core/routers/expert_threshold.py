"""ExpertThresholdRouter: each expert takes the tokens above its own slowly moving threshold. Balanced, and causal."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from ..ranks import sum_over_ranks
from ..routing import DropReason, Routing
from ..validate import at_least, between, expansion_fits, whole
from .base import Router
from .expert_choice import as_fraction, ceil_share, count_real, take_best


class ExpertThresholdRouter(Router):
    r"""Expert threshold: a token goes to every expert whose threshold its logit exceeds.

    .. math:: z_{t,e} = 1\{h_{t,e} > c_e\}, \quad w_{t,e} = \sigma(h_{t,e}), \quad
              c_e \leftarrow \mathrm{EMA}_\beta\big(k\text{-th largest of } \{h_{t,e}\}_t\big), \quad k = \lfloor T G / E \rfloor

    The threshold estimates where expert choice would have cut, the (1 - G/E)-quantile of the expert's raw logits, over the last
    1/(1 - beta) optimiser steps. Where logits drift slowly against that, load stays near 1/E each with no auxiliary loss; and a token's route depends on that token
    alone. Weights are not normalised; a shared expert (``MoEConfig.n_shared_experts``) comes on top with weight 1.

    Eval is always the pure threshold. Training differs in two ways, for which it looks at the whole batch:
    - *Warm-up*: for the first ``warmup_steps`` optimiser steps, and as long as there is no threshold at all, each expert takes its
      k best tokens (expert choice), or early thresholds, stale within a few steps, would leave experts without any token.
    - *Capacity band*: the number of tokens of each expert is forced into [(1 - C) k, (1 + C) k]: its best tokens below the
      threshold are let in, or its worst above it dropped (OVER_CAPACITY).

    ``update(routings)`` makes one EMA step per optimiser step, whatever the number of micro-batches: it takes the mean of their
    cutoffs, over ranks too. The batch in hand is always routed by the thresholds from before. A batch of fewer than E/G tokens
    still counts with k = 1, a cutoff too high: update with larger ones.

    Args:
        d_model, n_experts: D and E.
        expansion: G, the mean number of experts per token, a fraction if you like. 0 < G <= E.
        ema_decay: beta. The paper's 0.999 remembers 1000 steps; the default suits runs of a few hundred.
        warmup_steps: None: four memories, 4 / (1 - beta), as in the paper. 0: none. Less than one memory can be worse than none: in
            three runs, 80 steps at beta 0.99 left 3 of 16 experts starved, and no warm-up 0 or 1 (stored run expert_threshold).
        capacity_band: C, in training only; the paper's is 0.5. None: off.
        z_loss_weight, jitter_noise: see ``Router``.

    Attributes (state_dict buffers, changed by ``update`` and ``calibrate`` only):
        cutoffs: (E,) float32, the thresholds. ema_weight: 1 - beta^t after t updates. steps: optimiser steps so far.

    Raises:
        ValueError: an argument is out of range.

    Source: Sun et al. 2026 (arXiv 2603.11535), algorithm 1; bias correction and micro-batches as in its official code. The code
    averages the ranks' EMAs after warm-up, this their cutoffs in every update. The code compares with >=, the paper with >; this is >.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expansion: float = 1.0,
        *,
        ema_decay: float = 0.99,
        warmup_steps: int | None = None,
        capacity_band: float | None = None,
        z_loss_weight: float = 0.0,
        jitter_noise: float = 0.0,
    ):
        expansion_fits(expansion, n_experts)
        between(0.0, 1.0, ema_decay=ema_decay)
        if warmup_steps is None:
            warmup_steps = round(4 / (1 - ema_decay))
        whole(0, warmup_steps=warmup_steps)
        if capacity_band is not None:
            at_least(0, capacity_band=capacity_band)
        super().__init__(d_model, n_experts, z_loss_weight=z_loss_weight, jitter_noise=jitter_noise)
        self.expansion, self.ema_decay, self.warmup_steps, self.capacity_band = (
            expansion,
            ema_decay,
            warmup_steps,
            capacity_band,
        )
        self.share = as_fraction(expansion) / n_experts  # of the tokens, for each expert
        self.register_buffer("cutoffs", torch.zeros(n_experts))
        self.register_buffer("ema_weight", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Draw the weight anew and forget the thresholds."""
        super().reset_parameters()
        for buffer in self.buffers():  # none yet when the base class calls this first
            buffer.zero_()

    @property
    def thresholds(self) -> Tensor:
        """(E,) float32, a copy: what eval compares the logits with. Zeros, so a gate above 1/2, before any update or calibration."""
        return self.cutoffs.clone()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route tokens (B, N, D); K = E slots per token, ``selected_mask`` says where it is above the threshold.

        Raises:
            ValueError: x or padding_mask has the wrong shape.
        """
        logits_BNE = self.logits(x)
        real_BN = count_real(x, padding_mask)
        selected_BNE = kept_BNE = (logits_BNE > self.cutoffs) & real_BN.unsqueeze(-1)
        capacity = None
        if self.training:
            warming = (self.steps < self.warmup_steps) | (self.ema_weight == 0)
            k = self._k(real_BN.sum())
            count_E = selected_BNE.sum((0, 1))
            if self.capacity_band is not None:
                C = as_fraction(self.capacity_band)
                # Whole numbers inside the band; k is one of them.
                count_E = count_E.clamp(
                    ceil_share(k, max(1 - C, Fraction(0))), floor_share(k, 1 + C)
                )
                capacity = floor_share(max(floor_share(real_BN.numel(), self.share), 1), 1 + C)
            count_E = torch.where(warming, k, count_E)
            kept_BNE = take_best(
                logits_BNE.flatten(0, 1)[None], real_BN.view(1, -1), count_E[None]
            ).view(logits_BNE.shape)
            selected_BNE = kept_BNE | (selected_BNE & ~warming)
        scores_BNE = logits_BNE.sigmoid()
        routing = self.route(
            self.every_expert(x),
            scores_BNE,
            logits_BNE,
            scores_BNE,
            padding_mask=padding_mask,
            selected_BNK=selected_BNE,
            apply_capacity=False,
        )
        if capacity is None:
            return routing
        reason_BNE = routing.drop_reason.masked_fill(
            selected_BNE & ~kept_BNE, DropReason.OVER_CAPACITY.value
        )
        return replace(
            routing,
            capacity=capacity,
            drop_reason=reason_BNE,
            capacity_mask=reason_BNE == DropReason.KEPT.value,
        )

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        r"""One EMA step towards the mean cutoff of these micro-batches; call it on every rank, once per optimiser step.

        .. math:: m \leftarrow \beta m + (1-\beta) q, \quad c = m / (1 - \beta^t), \text{ kept as }
                  c \leftarrow c + \tfrac{1-\beta}{1-\beta^t} (q - c)

        A micro-batch without a real token has no cutoff; if none has one, thresholds stay and only ``steps`` counts.
        """
        totals = self.cutoffs.new_zeros(
            self.n_experts + 1
        )  # sum of cutoffs, and how many there are
        for routing in routings:
            real_T = routing.real_tokens.flatten()
            if real_T.numel() > 0:
                n_real = real_T.sum()
                k = self._k(n_real).clamp(max=real_T.numel())
                logits_TE = routing.logits.flatten(0, 1).masked_fill(
                    ~real_T.unsqueeze(-1), -torch.inf
                )
                sorted_TE = logits_TE.sort(dim=0, descending=True).values
                cutoff = torch.cat(
                    [sorted_TE.index_select(0, k.view(1) - 1).squeeze(0), sorted_TE.new_ones(1)]
                )
                totals += torch.where(n_real > 0, cutoff, 0)
        totals = sum_over_ranks(totals)
        found = totals[-1] > 0
        weight = self.ema_decay * self.ema_weight + (1 - self.ema_decay)
        step_E = (
            (1 - self.ema_decay) / weight * (totals[:-1] / totals[-1].clamp(min=1) - self.cutoffs)
        )
        self.cutoffs += torch.where(found, step_E, 0)
        self.ema_weight.copy_(torch.where(found, weight, self.ema_weight))
        self.steps += 1

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor | tuple[Tensor, Tensor | None]]) -> None:
        """Set the thresholds from data: pool all tokens, and cut so that exactly k = T*G/E of them (rounded down) are above.

        The pooled quantile, not the mean of the batches' cutoffs: exact for these tokens, but for ties. The cut is half-way between
        the k-th and the next logit. Several ranks average their quantiles by their numbers of tokens. Later updates
        continue from here as from a long run's thresholds; ``steps``, and with it the warm-up, is left as it is.

        Args:
            batches: what forward would get: x (B, N, D), or pairs (x, padding_mask). Their logits are all held in memory.

        Raises:
            ValueError: there is no real token, or a shape is wrong.
        """
        was_training, pooled = self.training, []
        self.eval()  # no jitter
        try:
            for batch in batches:
                x, padding_mask = batch if isinstance(batch, (tuple, list)) else (batch, None)
                pooled.append(self.logits(x)[count_real(x, padding_mask)])
        finally:
            self.train(was_training)
        none = self.cutoffs.new_zeros(0, self.n_experts)
        sorted_TE = torch.cat([none, *pooled]).sort(dim=0, descending=True).values
        T = len(sorted_TE)
        totals = torch.zeros(self.n_experts + 1, dtype=torch.float64, device=self.cutoffs.device)
        if T > 0:
            k = max(floor_share(T, self.share), 1)
            kth_E, next_E = sorted_TE[k - 1], sorted_TE[min(k, T - 1)]
            # Below the k-th in any case: also where the next is as large, or there is none.
            cutoff_E = torch.minimum(
                (kth_E + next_E) / 2, torch.nextafter(kth_E, torch.full_like(kth_E, -torch.inf))
            )
            totals = torch.cat([cutoff_E, cutoff_E.new_ones(1)]).double() * T
        totals = sum_over_ranks(totals)
        if totals[-1] == 0:
            raise ValueError("calibrate: batches hold no real token")
        self.cutoffs.copy_(totals[:-1] / totals[-1])
        self.ema_weight.fill_(1)

    def _k(self, n_real: Tensor) -> Tensor:
        """How many tokens each expert is meant to take; at least 1, so that every expert has a cutoff."""
        return floor_share(n_real, self.share).clamp(min=1)


def floor_share(count, share: Fraction):
    """floor(count * share), exactly, for an int or an int64 tensor."""
    return count * share.numerator // share.denominator
