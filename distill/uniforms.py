"""Uniform numbers that depend on (seed, block, row) alone, whatever computes them, and where.

Method source: SplitMix64 (Steele, Lea, Flood 2014) over a counter. Shape suffixes: R rows, M draws.
"""

import numpy as np
import torch
from torch import Tensor


def row_uniforms(seed: int, block_id: int, num_rows: int) -> Tensor:
    """One uniform number in [0, 1) for each row of a block, float64 [R].

    A function of (seed, block, row) alone, so the draws do not depend on batch size, order or
    number of workers.
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed % 2**64)) ^ np.uint64(block_id))
        bits = _mix(
            key + np.arange(1, num_rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        )
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def streams(uniforms_R: Tensor, number: int) -> Tensor:
    """Turn one uniform number a row into `number` independent ones, float64 [R, M]."""
    seeds_R = (uniforms_R.cpu().numpy() * 2.0**53).astype(np.uint64)
    with np.errstate(over="ignore"):
        steps_M = np.arange(1, number + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
        bits = _mix((_mix(seeds_R)[:, None] + steps_M).reshape(-1))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53).view(len(seeds_R), number)


def _mix(
    x: "np.uint64 | np.ndarray[tuple[int], np.dtype[np.uint64]]",
) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    x = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
