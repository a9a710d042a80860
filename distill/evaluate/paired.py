"""Two models on the same documents: how far apart, and could chance explain it? No torch here.

Documents are hard or easy for all models alike, so the difference of two models is known far better
than their standard errors suggest (Miller 2024, arXiv:2411.00640). Everything here works
on the documents that both answered, `distill.evaluate.items.align`.

Interval: paired bootstrap of the documents, ends by BCa (Efron 1987, J. Am. Stat. Assoc. 82:171;
Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 14.3). We prefer it to plain
percentiles because differences of perplexities and ratios of differences are skewed, and because
its error falls with 1 / N instead of 1 / sqrt(N); the price is one leave-one-out pass.

Test of 0/1 metrics: McNemar's, which looks only at documents that one model alone solves. Below 25
of them exact binomial, else chi-square with continuity correction (McNemar 1947, Psychometrika
12:153; Edwards 1948, Psychometrika 13:185). The correction makes it agree with the exact test where
one takes over from the other. Mid-p would find a little more (Fagerland et al. 2013, BMC Med. Res.
Methodol. 13:91), but may exceed the nominal level. Test of other metrics: the bootstrap, moved to a
difference of 0 (Davison and Hinkley 1997, Bootstrap Methods, section 4.4).

Shape suffixes: N documents, C columns (two sums a model).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from distill.evaluate.items import FloatArray, Items, NotPairedError, aggregate
from distill.evaluate.resample import bootstrap

Test = Literal["mcnemar_exact", "mcnemar", "bootstrap"]

SIGNIFICANCE = 0.05
"""Chance of a false alarm that we accept."""

_FEW = 25
"""Documents that one model alone solves; from here on chi-square is close enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of one task: a model against the baseline, on the same documents."""

    task: str
    metric: str
    model: str
    baseline: str
    num_items: int
    difference: float
    """Model minus baseline, in the metric's unit."""
    stderr: float
    """Of the difference, by the jackknife; for a mean it is sd / sqrt(N) of the differences."""
    low: float
    high: float
    """Ends of the 95% interval of this one difference; Holm's correction does not widen it."""
    p_value: float
    """Two-sided, against a difference of 0."""
    p_holm: float
    """Corrected for all comparisons that are made together."""
    gained: int | None
    """Documents that only the model solves; None for a metric that is not 0/1."""
    lost: int | None
    """Documents that only the baseline solves."""
    test: Test

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p-value is below 5%."""
        return self.p_holm < SIGNIFICANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Share of the distance from the untrained student (0) to the teacher (1) on one task."""

    task: str
    metric: str
    model: str
    baseline: str
    teacher: str
    num_items: int
    value: float
    low: float | None
    high: float | None
    """95% interval; None where it has no end, as the distance might be next to nothing."""


def compare_items(
    model: Items, baseline: Items, *, task: str, metric: str, names: tuple[str, str]
) -> Comparison:
    """Compare two models that were brought to the same documents; `p_holm` is still `p_value`.

    Args:
        model: Its items, from `align`.
        baseline: The same documents.
        task: Name of the task.
        metric: Name of the metric.
        names: Of model and baseline.

    Raises:
        NotPairedError: there is one document only, or resamples have no finite metric.
    """
    aggregation = model.aggregation

    def difference(sums: FloatArray) -> FloatArray:
        own, other = sums[..., :2], sums[..., 2:]
        return aggregate(own, aggregation) - aggregate(other, aggregation)

    resampled = bootstrap(np.hstack([model.sums_N2, baseline.sums_N2]), difference)
    gained = lost = None
    test: Test = "bootstrap"
    if model.is_binary and baseline.is_binary:
        solved_N, other_N = model.sums_N2[:, 0] == 1, baseline.sums_N2[:, 0] == 1
        gained, lost = int((solved_N & ~other_N).sum()), int((other_N & ~solved_N).sum())
        p_value, test = mcnemar(gained, lost)
    else:
        p_value = resampled.p_value()
    low, high = resampled.interval()
    return Comparison(
        task=task,
        metric=metric,
        model=names[0],
        baseline=names[1],
        num_items=len(model.doc_ids_N),
        difference=resampled.observed,
        stderr=resampled.stderr(),
        low=low,
        high=high,
        p_value=p_value,
        p_holm=p_value,
        gained=gained,
        lost=lost,
        test=test,
    )


def corrected(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Set `p_holm` of comparisons that are made together."""
    p_values = holm([comparison.p_value for comparison in comparisons])
    return tuple(
        replace(comparison, p_holm=p_value)
        for comparison, p_value in zip(comparisons, p_values, strict=True)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values so that 5% is the chance of any false alarm among all of them.

    The k-th smallest of m is multiplied by m - k + 1, and none may be below a smaller one's.
    Method source: Holm 1979, Scand. J. Stat. 6:65.
    """
    found = [0.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        found[at] = largest
    return found


def mcnemar(gained: int, lost: int) -> tuple[float, Test]:
    """Return the two-sided p-value of McNemar's test, and which form of it was used.

    Args:
        gained: Documents that only one of two models solves.
        lost: Documents that only the other solves.
    """
    discordant = gained + lost
    if discordant < _FEW:
        tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
        return min(1.0, 2 * tail / 2**discordant), "mcnemar_exact"
    chi_square = max(abs(gained - lost) - 1, 0) ** 2 / discordant
    return math.erfc(math.sqrt(chi_square / 2)), "mcnemar"  # chi-square of one degree of freedom


def gap_recovered(
    student: Items,
    base: Items,
    teacher: Items,
    *,
    task: str,
    metric: str,
    names: tuple[str, str, str],
) -> Gap | None:
    """Return (student - base) / (teacher - base), all three resampled together.

    Values below 0 and above 1 are possible. A difference of two scores has the same meaning here
    as in `compare_items`, so a perplexity's gap is one of perplexities, not of nats.

    Args:
        student: Items of the trained student, from `align`.
        base: Of the student before training, on the same documents.
        teacher: Of the teacher, on the same documents.
        task: Name of the task.
        metric: Name of the metric.
        names: Of student, base and teacher.

    Returns:
        None where teacher and base do not differ significantly (uncorrected p below 5%): a share of
        a distance that may be nothing means nothing. None too where resamples have no metric.
    """
    try:
        ends = compare_items(teacher, base, task=task, metric=metric, names=(names[2], names[1]))
        if ends.p_value >= SIGNIFICANCE:
            return None
        rows_NC = np.hstack([student.sums_N2, base.sums_N2, teacher.sums_N2])
        resampled = bootstrap(rows_NC, _share(student), has_to_be_finite=False)
    except NotPairedError:
        return None
    low, high = resampled.interval()
    return Gap(
        task=task,
        metric=metric,
        model=names[0],
        baseline=names[1],
        teacher=names[2],
        num_items=ends.num_items,
        value=resampled.observed,
        low=low if math.isfinite(low) else None,
        high=high if math.isfinite(high) else None,
    )


def group_score(
    values: Sequence[float],
    stderrs: Sequence[float | None],
    sizes: Sequence[int],
    weight_by_size: bool,
) -> tuple[float, float | None]:
    """Average the tasks of a group as lm-eval does; return the score and its standard error.

    With weights n_i: sum n_i x_i / n and, with the variances of all documents pooled,
    sqrt(sum (n_i - 1) n_i s_i^2 / (n - k) / n). Without: the plain mean and sqrt(sum s_i^2) / k.
    Method source: lm-eval 0.4.13, lm_eval/api/metrics.py and api/group.py.

    Args:
        values: Score of each of the k tasks.
        stderrs: Their standard errors; one that is None leaves the group's None.
        sizes: Documents of each task, n_i; n together.
        weight_by_size: Whether every document counts the same, rather than every task.
    """
    known = [stderr for stderr in stderrs if stderr is not None]
    has_error = len(known) == len(values)
    if not weight_by_size:
        mean = sum(values) / len(values)
        return mean, math.hypot(*known) / len(values) if has_error else None
    total = sum(sizes)
    mean = sum(value * size for value, size in zip(values, sizes, strict=True)) / total
    if not has_error or total == len(sizes):
        return mean, None
    pooled = sum(s**2 * n * (n - 1) for s, n in zip(known, sizes, strict=True))
    return mean, math.sqrt(pooled / (total - len(sizes)) / total)


def _share(student: Items) -> Callable[[FloatArray], FloatArray]:
    def share(sums: FloatArray) -> FloatArray:
        own, base, goal = (
            aggregate(sums[..., at : at + 2], student.aggregation) for at in (0, 2, 4)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((own - base) / (goal - base))

    return share
