"""A statistic of documents, and what chance does to it: bootstrap and jackknife. No torch here.

Shape suffixes: N documents, U distinct rows among them, C columns, B draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from distill.evaluate.items import FloatArray, NotPairedError

DRAWS = 10_000

_ENDS = (0.025, 0.975)

_SEED = 0

_CHUNK_NUMBERS = 2**20
"""Counts held at a time: 8 MB, however many documents and draws there are."""

_FEW_ROWS = 100
"""Up to here a multinomial draw is the faster one; with 10,000 rows it takes 4 times as long."""

_ROUNDING = 1e-9
"""Relative; a resampled difference that is the observed one up to rounding counts as equal."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resampled:
    """A statistic of all documents, of resampled ones, and of all but one."""

    observed: float
    draws_B: FloatArray
    without_U: FloatArray
    """Without one of the documents of each distinct row."""
    counts_U: FloatArray
    """How many documents have the row."""

    def stderr(self) -> float:
        """Jackknife: sqrt((N - 1) / N * sum of squared deviations)."""
        num = self.counts_U.sum()
        return math.sqrt((num - 1) / num * float((self.counts_U * self._deviations_U() ** 2).sum()))

    def p_value(self) -> float:
        """Share of centred draws that are as far from 0 as what was observed, which counts too."""
        far = abs(self.observed) * (1 - _ROUNDING)
        num_far = int((np.abs(self.draws_B - self.observed) >= far).sum())
        return (1 + num_far) / (1 + len(self.draws_B))

    def interval(self) -> tuple[float, float]:
        """Ends of the BCa interval; infinite or NaN where too many draws are."""
        num = len(self.draws_B)
        below = (self.draws_B < self.observed).sum() + (self.draws_B == self.observed).sum() / 2
        normal = NormalDist()
        bias = normal.inv_cdf(min(max(float(below) / num, 1 / (num + 1)), num / (num + 1)))
        skew = self._acceleration()
        moved = [bias + normal.inv_cdf(end) for end in _ENDS]
        levels = [normal.cdf(bias + z / (1 - skew * z)) for z in moved]
        with np.errstate(invalid="ignore"):  # between two infinite draws lies none
            low, high = np.quantile(self.draws_B, levels)
        return float(low), float(high)

    def _acceleration(self) -> float:
        away_U = -self._deviations_U()
        squares = float((self.counts_U * away_U**2).sum())
        if squares == 0:
            return 0.0
        return float((self.counts_U * away_U**3).sum()) / (6 * math.pow(squares, 1.5))

    def _deviations_U(self) -> FloatArray:
        mean = np.average(self.without_U, weights=self.counts_U)
        deviations_U: FloatArray = self.without_U - mean
        return deviations_U


def bootstrap(
    rows_NC: FloatArray,
    statistic: Callable[[FloatArray], FloatArray],
    *,
    has_to_be_finite: bool = True,
) -> Resampled:
    """Resample documents with replacement.

    What counts is how often each distinct row comes up. That is multinomial, so documents that are
    alike (two 0/1 metrics know four kinds) cost no more than one.

    Args:
        rows_NC: What each document adds to C sums.
        statistic: Turns sums [..., C] into numbers [...].
        has_to_be_finite: Otherwise draws may be infinite, and those that are NaN are left out.

    Raises:
        NotPairedError: there is one document only, or the statistic is not finite.
    """
    num = len(rows_NC)
    if num < 2:
        raise NotPairedError("one document is too few")
    rows_UC, first_U, counts_U = np.unique(rows_NC, axis=0, return_index=True, return_counts=True)
    order_U = np.argsort(first_U)  # not by value: models that swap sides get the same draws
    rows_UC, counts_U = rows_UC[order_U], counts_U[order_U]
    random = np.random.default_rng(_SEED)
    step = max(1, _CHUNK_NUMBERS // num)
    draws_B = np.concatenate(
        [
            statistic(_draw(random, counts_U, min(step, DRAWS - start)) @ rows_UC)
            for start in range(0, DRAWS, step)
        ]
    )
    total_C = counts_U @ rows_UC
    without_U = statistic(total_C - rows_UC)
    observed = float(statistic(total_C))
    if not has_to_be_finite:
        draws_B = draws_B[~np.isnan(draws_B)]
    is_usable = not has_to_be_finite or np.isfinite(draws_B).all()
    if not (is_usable and np.isfinite(without_U).all() and math.isfinite(observed)):
        raise NotPairedError("the metric of some resamples is not finite")
    return Resampled(
        observed=observed,
        draws_B=draws_B,
        without_U=without_U,
        counts_U=counts_U.astype(np.float64),
    )


def _draw(random: np.random.Generator, counts_U: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """How often each row comes up in `size` resamples of all documents: [size, U]."""
    num, num_rows = int(counts_U.sum()), len(counts_U)
    if num_rows <= _FEW_ROWS:
        return random.multinomial(num, counts_U / num, size)
    row_N = np.repeat(np.arange(num_rows), counts_U)
    drawn_BN = row_N[random.integers(num, size=(size, num), dtype=np.int32)]
    drawn_BN += (
        num_rows * np.arange(size)[:, None]
    )  # rows of each resample get numbers of their own
    return np.bincount(drawn_BN.ravel(), minlength=size * num_rows).reshape(size, num_rows)
