"""How the mix of the loss changes over a training. Plain arithmetic."""

import math

from distill.config import TrainConfig

_WARMUP, _DECAY = 0.1, 0.2
"""Shares of the steps of a `wsd` schedule that rise and fall."""


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
