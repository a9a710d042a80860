"""Whether a model is as often right as it says. Shape suffixes: R rows, N bins."""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Reliability:
    """Rows by the probability of their likeliest token, in ten equally wide bins from 0 to 1.

    Method source: Guo et al. 2017, arXiv:1706.04599, equations 2, 3 and 5.
    """

    count: tuple[int, ...]
    """Rows in each bin."""
    confidence: tuple[float | None, ...]
    """Mean of that probability in each bin; None where the bin is empty."""
    accuracy: tuple[float | None, ...]
    """Share of rows in each bin where that token is the true one."""
    ece: float
    """Expected calibration error: mean over rows of |accuracy - confidence| of their bin."""

    @classmethod
    def of(cls, sums_N3: Tensor) -> "Reliability":
        """Make it of the sums over all blocks that `bin_sums` gave."""
        counts, confidences, hits = sums_N3.double().unbind(1)
        gaps = (hits - confidences).abs().sum() / counts.sum()

        def means(sums_N: Tensor) -> tuple[float | None, ...]:
            pairs = zip(sums_N.tolist(), counts.tolist(), strict=True)
            return tuple(total / count if count else None for total, count in pairs)

        count = tuple(int(number) for number in counts.tolist())
        return cls(count, means(confidences), means(hits), float(gaps))


def bin_sums(confidence_R: Tensor, hits_R: Tensor) -> Tensor:
    """Of each bin, upper end included: rows, summed confidence, summed hits; float64 [N, 3]."""
    bins_R = (confidence_R * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    sums_N3 = torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=confidence_R.device)
    values_R3 = torch.stack(
        [torch.ones_like(confidence_R), confidence_R, hits_R.to(confidence_R)], dim=1
    )
    return sums_N3.index_add_(0, bins_R, values_R3.double()).cpu()
