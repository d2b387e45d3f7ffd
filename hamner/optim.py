"""Optimizers, parameter groups, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from hamner.recipe import OptimizerPart, SchedulePart


def learning_rate(step: int, steps: int, peak: float, schedule: SchedulePart) -> float:
    """Learning rate of a step (0-based) out of `steps`.

    Linear warm-up from peak / warmup, then from the peak towards `floor * peak`:
    `linear` and `cosine` decay over all that is left; `wsd` (warm-up, stable, decay,
    arXiv 2404.06395) stays at the peak and decays linearly over the last `decay` steps.
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    decay = steps - schedule.warmup
    if schedule.kind == "wsd":
        decay = min(decay, schedule.decay)
    if decay <= 0:
        return peak
    progress = min(1.0, max(0.0, (step - (steps - decay)) / decay))
    if schedule.kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak * (1 - progress * (1 - schedule.floor))


def make_optimizer(model: nn.Module, settings: OptimizerPart) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (embedding included) and none on norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
