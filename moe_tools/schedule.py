"""The learning rate of the book's and the benches' runs."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def warmup_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Up to the optimiser's rate in a twentieth of the steps, then a cosine to a tenth.

    ``pretrain`` has the same in closed form (``trainer.learning_rate``), which a run that goes on
    from a checkpoint needs; its warm-up counts from 1, torch's from 0, so the rates are not equal.
    """
    warmup, peak = max(1, steps // 20), optimizer.param_groups[0]["lr"]
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup), eta_min=peak / 10)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])
