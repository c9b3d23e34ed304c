"""ExpertThresholdRouter: each expert takes the tokens above its threshold. Balanced, and causal."""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from ..ranks import sum_over_ranks
from ..routing import DropReason, Routing
from ..validate import at_least, between, expansion_fits, whole
from .base import Router, RouterOptions, checked_padding_mask
from .token_shares import as_fraction, ceil_share, floor_share, take_best


@dataclass(frozen=True)
class ExpertThresholdOptions(RouterOptions, fixed=("capacity_factor", "aux_loss_weight")):
    """The arguments of ``ExpertThresholdRouter``."""

    expansion: float = 1.0
    _: KW_ONLY
    ema_decay: float = 0.99
    warmup_steps: int | None = None
    capacity_band: float | None = None

    def __post_init__(self):
        super().__post_init__()
        expansion_fits(self.expansion, self.n_experts)
        between(0.0, 1.0, ema_decay=self.ema_decay)
        if self.warmup_steps is not None:
            whole(0, warmup_steps=self.warmup_steps)
        if self.capacity_band is not None:
            at_least(0, capacity_band=self.capacity_band)


class ExpertThresholdRouter(Router):
    r"""Expert threshold: a token goes to every expert whose threshold its logit exceeds.

    .. math:: z_{t,e} = 1\{h_{t,e} > c_e\}, \quad w_{t,e} = \sigma(h_{t,e}), \quad
              c_e \leftarrow \mathrm{EMA}_\beta\big(k\text{-th largest of } \{h_{t,e}\}_t\big),
              \quad k = \lfloor T G / E \rfloor

    A batch's cutoff is where expert choice would have cut. The threshold is what the buffer
    ``cutoffs`` (E,) holds: the mean cutoff of the last 1/(1 - beta) optimiser steps. Where logits
    drift slowly against that, the load stays near 1/E each with no auxiliary loss; and in eval a
    token's route depends on that token alone. Training looks at the whole batch, in two ways:

    - *Warm-up*: for ``warmup_steps`` steps, and while there is no threshold, each expert takes its
      k best tokens: early thresholds, stale in a few steps, would starve experts.
    - *Capacity band*: an expert's number of tokens is forced into [(1 - C) k, (1 + C) k]: its best
      below the threshold are let in, or its worst above it dropped (OVER_CAPACITY).

    Args, besides ``Router``'s:
        expansion: G, the mean number of experts per token, 0 < G <= E.
        ema_decay: beta. The paper's 0.999 remembers 1000 steps; 0.99 suits runs of a few hundred.
        warmup_steps: None: four memories, 4 / (1 - beta), as in the paper. 0: none. Less than one
            memory can be worse than none (stored run expert_threshold).
        capacity_band: C, in training only; the paper's is 0.5. None: off.

    Source: Sun et al. 2026 (arXiv 2603.11535), algorithm 1; bias correction and micro-batches as in
    its official code, which averages the ranks' EMAs after warm-up where this averages their
    cutoffs in every update. The code compares with >=, the paper and this with >.
    """

    Options = ExpertThresholdOptions
    top_k_is_a_mean = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.warmup_steps is None:
            self.warmup_steps = round(4 / (1 - self.ema_decay))
        self.share = as_fraction(self.expansion) / self.n_experts  # of the tokens, for each expert

    def initial_state(self) -> dict[str, Tensor]:
        """No threshold yet; ``ema_weight`` is 1 - beta^t after t updates."""
        return {
            "cutoffs": torch.zeros(self.n_experts),
            "ema_weight": torch.zeros(()),
            "steps": torch.zeros((), dtype=torch.int64),
        }

    @property
    def thresholds(self) -> Tensor:
        return self.cutoffs.clone()  # a copy: ``update`` changes the buffer in place

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids=None) -> Routing:
        """Route tokens (B, N, D); K = E slots per token, selected where above the threshold."""
        logits_BNE = self.logits(x)
        real_BN = checked_padding_mask(padding_mask, x)
        # Batches are routed by the thresholds from before them.
        selected_BNE = kept_BNE = (logits_BNE > self.cutoffs) & real_BN.unsqueeze(-1)
        capacity = None
        if self.training:
            warming = (self.steps < self.warmup_steps) | (self.ema_weight == 0)
            k = self._k(real_BN.sum())
            count_E = selected_BNE.sum((0, 1))
            if self.capacity_band is not None:
                C = as_fraction(self.capacity_band)
                # Whole numbers inside the band; k is one of them.
                lowest = ceil_share(k, max(1 - C, Fraction(0)))
                count_E = count_E.clamp(lowest, floor_share(k, 1 + C))
                most = max(floor_share(real_BN.numel(), self.share), 1)
                capacity = floor_share(most, 1 + C)
            count_E = torch.where(warming, k, count_E)  # no if: that would synchronise
            pool_1SE, real_1S = logits_BNE.flatten(0, 1)[None], real_BN.reshape(1, -1)
            kept_BNE = take_best(pool_1SE, real_1S, count_E[None]).view(logits_BNE.shape)
            selected_BNE = kept_BNE | (selected_BNE & ~warming)
        scores_BNE = logits_BNE.sigmoid()
        choice = self.every_expert(x), scores_BNE, logits_BNE, scores_BNE, padding_mask
        routing = self.routing(*choice, selected_BNK=selected_BNE)
        if capacity is not None:  # the band, and not a rule, says who finds room
            over_BNE = selected_BNE & ~kept_BNE
            reasons = routing.drop_reason.masked_fill(over_BNE, DropReason.OVER_CAPACITY.value)
            found_room = {"drop_reason": reasons, "capacity_mask": reasons == DropReason.KEPT.value}
            routing = replace(routing, capacity=capacity, **found_room)
        return self.add_losses(routing)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        r"""One EMA step towards the mean cutoff q of these micro-batches.

        .. math:: m \leftarrow \beta m + (1-\beta) q, \quad c = m / (1 - \beta^t), \text{ kept as }
                  c \leftarrow c + \tfrac{1-\beta}{1-\beta^t} (q - c)

        If no micro-batch has a real token, only ``steps`` counts; one whose logits are not finite is
        no token. One of fewer than E/G tokens counts with k = 1, a cutoff too high: update with
        larger ones.
        """
        # The sum of cutoffs, and how many: one call to the other ranks.
        totals = self.cutoffs.new_zeros(self.n_experts + 1)
        for routing in routings:
            logits_TE = routing.logits.flatten(0, 1)
            # One NaN in the average would be there for good.
            real_T = routing.real_tokens.flatten() & logits_TE.isfinite().all(-1)
            if real_T.numel() > 0:
                n_real = real_T.sum()
                k = self._k(n_real).clamp(max=real_T.numel())
                logits_TE = logits_TE.masked_fill(~real_T.unsqueeze(-1), -torch.inf)
                sorted_TE = logits_TE.sort(dim=0, descending=True).values
                cutoff_E = sorted_TE.index_select(0, k.view(1) - 1).squeeze(0)
                found = torch.cat([cutoff_E, cutoff_E.new_ones(1)])
                totals += torch.where(n_real > 0, found, 0)
        totals = sum_over_ranks(totals)
        found = totals[-1] > 0
        # The share of the EMA that is data, 1 - beta^t: dividing by it corrects the start at 0.
        weight = self.ema_decay * self.ema_weight + (1 - self.ema_decay)
        mean_E = totals[:-1] / totals[-1].clamp(min=1)
        step_E = (1 - self.ema_decay) / weight * (mean_E - self.cutoffs)
        self.cutoffs += torch.where(found, step_E, 0)
        self.ema_weight.copy_(torch.where(found, weight, self.ema_weight))
        self.steps += 1

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor | tuple[Tensor, Tensor | None]]) -> None:
        """Set the thresholds from data: cut so that exactly k = T*G/E (rounded down) are above.

        ``batches`` are x (B, N, D), or pairs (x, padding_mask); all their logits are held in
        memory. The cutoff of all tokens pooled is exact for these, but for ties; ranks average
        theirs by tokens. Later updates continue as from a long run's thresholds; ``steps`` stays.
        Raises ValueError where there is no real token with finite logits, or a shape is wrong.
        """
        was_training, pooled = self.training, []
        self.eval()  # no jitter
        try:
            for batch in batches:
                x, padding_mask = batch if isinstance(batch, tuple | list) else (batch, None)
                logits_TE = self.logits(x)[checked_padding_mask(padding_mask, x)]
                pooled.append(logits_TE[logits_TE.isfinite().all(-1)])
        finally:
            self.train(was_training)
        none = self.cutoffs.new_zeros(0, self.n_experts)
        sorted_TE = torch.cat([none, *pooled]).sort(dim=0, descending=True).values
        T = len(sorted_TE)
        totals = self.cutoffs.new_zeros(self.n_experts + 1, dtype=torch.float64)
        if T > 0:
            k = max(floor_share(T, self.share), 1)
            kth_E, next_E = sorted_TE[k - 1], sorted_TE[min(k, T - 1)]
            # Half-way, but below the k-th in any case: also where the next is as large, or missing.
            below_E = torch.nextafter(kth_E, torch.full_like(kth_E, -torch.inf))
            cutoff_E = torch.minimum((kth_E + next_E) / 2, below_E)
            totals = torch.cat([cutoff_E, cutoff_E.new_ones(1)]).double() * T
        totals = sum_over_ranks(totals)
        if totals[-1] == 0:
            raise ValueError("calibrate: batches hold no real token")
        self.cutoffs.copy_(totals[:-1] / totals[-1])
        self.ema_weight.fill_(1)

    def _k(self, n_real: Tensor) -> Tensor:
        """How many tokens an expert is meant to take; at least 1, so that each has a cutoff."""
        return floor_share(n_real, self.share).clamp(min=1)
