"""How learning rate and mix of the loss change over a training."""

import math
from typing import Any

from torch.optim import Optimizer
from transformers import get_scheduler

from distill.config import TrainConfig

_WARMUP, _DECAY = 0.1, 0.2
"""Shares of the steps of a `wsd` schedule that rise (of the KL's weight) and fall."""


def learning_rate_schedule(config: TrainConfig, optimizer: Optimizer, num_steps: int) -> Any:
    """Return transformers' scheduler for `train.schedule`, which is stepped once a step."""
    low = config.min_learning_rate
    decay = {
        "num_decay_steps": math.ceil(_DECAY * num_steps),
        "min_lr_ratio": low / config.learning_rate,
    }
    shapes: dict[str, tuple[str, dict[str, float]]] = {
        "cosine": ("cosine_with_min_lr", {"min_lr": low}),
        "linear": ("polynomial", {"lr_end": low, "power": 1.0}),
        "constant": ("constant_with_warmup", {}),
        "wsd": ("warmup_stable_decay", decay),
    }
    name, options = shapes[config.schedule]
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_fraction * num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=options,
    )


def kl_weight_at(config: TrainConfig, step: int, num_steps: int) -> float:
    """Weight of the KL in one step, counted from 0; the weight of CE takes up the difference.

    Method source: Peng et al. 2024, arXiv:2410.16215 (warmup-stable-decay of the KL's weight).
    """
    high, low = config.kl_weight, config.kl_weight_end
    if config.kl_schedule == "linear":
        return high + (low - high) * step / max(1, num_steps - 1)
    if config.kl_schedule == "wsd":
        rising, falling = (math.ceil(share * num_steps) for share in (_WARMUP, _DECAY))
        share = min(1.0, (step + 1) / rising, (num_steps - 1 - step) / falling)
        return low + (high - low) * share
    return high
