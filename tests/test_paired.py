"""Paired statistics against scipy, statsmodels and lm-eval, in simulations, and by identities."""

import math
import tracemalloc

import numpy as np
import pytest
from lm_eval.api import metrics as lm_eval_metrics
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import (
    mcnemar as statsmodels_mcnemar,
)
from statsmodels.stats.multitest import multipletests

from distill.evaluate.items import Items, NotPairedError
from distill.evaluate.paired import (
    Comparison,
    compare_items,
    corrected,
    gap_recovered,
    group_score,
    holm,
    mcnemar,
)
from tests.item_makers import answers, items, rolling


def compare(model: Items, baseline: Items) -> Comparison:
    return compare_items(model, baseline, task="t", metric="acc", names=("model", "baseline"))


@pytest.mark.parametrize("table", [(5, 0, 0, 5), (3, 1, 0, 2), (9, 3, 12, 4), (0, 24, 0, 1)])
def test_few_flips_get_the_exact_binomial_test(table: tuple[int, int, int, int]) -> None:
    _, gained, lost, _ = table
    p_value, test = mcnemar(gained, lost)
    assert test == "mcnemar_exact"
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert p_value == pytest.approx(expected, rel=1e-12)
    square = [[table[0], table[1]], [table[2], table[3]]]
    if gained + lost:
        assert p_value == pytest.approx(statsmodels_mcnemar(square, exact=True).pvalue)


@pytest.mark.parametrize("table", [(5, 13, 12, 5), (300, 60, 25, 115), (0, 1000, 700, 0)])
def test_many_flips_get_chi_square_with_continuity_correction(
    table: tuple[int, int, int, int],
) -> None:
    p_value, test = mcnemar(table[1], table[2])
    assert test == "mcnemar"
    square = [[table[0], table[1]], [table[2], table[3]]]
    expected = statsmodels_mcnemar(square, exact=False, correction=True)
    assert p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_both_forms_of_mcnemar_agree_where_one_takes_over() -> None:
    for gained in range(26):
        p_value, test = mcnemar(gained, 25 - gained)
        assert test == "mcnemar"
        assert p_value == pytest.approx(stats.binomtest(gained, 25).pvalue, abs=0.012)
    assert mcnemar(20, 20) == (1.0, "mcnemar")


def test_holm_equals_statsmodels() -> None:
    random = np.random.default_rng(0)
    for num in (1, 2, 7, 40):
        p_values = random.beta(0.3, 2.0, num)
        p_values[:: max(2, num // 3)] = p_values[0]  # ties
        expected = multipletests(p_values, method="holm")[1]
        np.testing.assert_allclose(holm(p_values.tolist()), expected)
    assert holm([]) == []


def test_corrected_comparisons_judge_by_the_corrected_p_value() -> None:
    single = compare(*answers((20, 12, 3, 20)))
    assert single.p_value == pytest.approx(0.03515625)
    assert corrected([single])[0].is_significant
    several = corrected([single] * 2)
    assert several[0].p_holm == pytest.approx(2 * single.p_value)
    assert not any(comparison.is_significant for comparison in several)


def test_flips_count_items_that_only_one_model_solves() -> None:
    found = compare(*answers((20, 12, 3, 15)))
    assert (found.gained, found.lost, found.num_items) == (12, 3, 50)
    assert found.difference == pytest.approx(9 / 50)
    assert found.test == "mcnemar_exact"


@pytest.mark.parametrize("model", [answers((4, 3, 2, 1))[0], rolling(1, 0.0)])
def test_a_model_does_not_differ_from_itself(model: Items) -> None:
    found = compare(model, model)
    assert (found.difference, found.stderr, found.low, found.high) == (0, 0, 0, 0)
    assert found.p_value == 1
    assert not found.is_significant


@pytest.mark.parametrize(
    "sides",
    [
        answers((30, 14, 5, 20)),
        answers((30, 40, 20, 20)),
        (rolling(1, 0.05), rolling(2, 0.0)),
        (items([0.1, 0.5, 0.9, 0.3]), items([0.2, 0.4, 0.1, 0.3])),
    ],
)
def test_swapped_sides_negate_the_difference(sides: tuple[Items, Items]) -> None:
    forth, back = compare(*sides), compare(*reversed(sides))
    assert back.difference == -forth.difference
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))
    assert (back.gained, back.lost) == (forth.lost, forth.gained)
    assert back.stderr == pytest.approx(forth.stderr)
    assert back.p_value == pytest.approx(forth.p_value, abs=2e-4)


def test_stderr_of_a_mean_is_the_textbook_one_of_paired_differences() -> None:
    random = np.random.default_rng(3)
    left, right = random.random(50), random.random(50)
    expected = np.std(left - right, ddof=1) / math.sqrt(50)
    assert compare(items(left), items(right)).stderr == pytest.approx(expected)


def test_interval_equals_that_of_scipy_up_to_its_draws() -> None:
    random = np.random.default_rng(4)
    skewed = random.lognormal(0, 1.5, 60)
    found = compare(items(skewed), items(np.zeros(60)))
    theirs = stats.bootstrap((skewed,), np.mean, n_resamples=20_000, method="BCa", rng=random)
    width = found.high - found.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    assert found.high - found.difference > 1.2 * (found.difference - found.low)  # skewed as it is


def test_interval_of_perplexities_equals_that_of_scipy() -> None:
    model, baseline = rolling(1, 0.05), rolling(2, 0.0)
    found = compare(model, baseline)

    def difference(at: NDArray[np.int64]) -> float:
        ours, theirs = (side.sums_N2[at].sum(axis=0) for side in (model, baseline))
        return math.exp(-ours[0] / ours[1]) - math.exp(-theirs[0] / theirs[1])

    theirs = stats.bootstrap(
        (np.arange(40),), difference, vectorized=False, n_resamples=5000, method="BCa", rng=0
    )
    assert found.difference == pytest.approx(difference(np.arange(40)))
    assert found.stderr == pytest.approx(theirs.standard_error, rel=0.1)
    width = found.high - found.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_bootstrap_p_value_is_near_that_of_the_paired_t_test() -> None:
    random = np.random.default_rng(5)
    for shift in (0.0, 0.1, 0.25):
        left, right = random.random(200), random.random(200) - shift
        found = compare(items(left), items(right))
        assert found.test == "bootstrap"
        assert found.gained is found.lost is None
        assert found.p_value == pytest.approx(stats.ttest_rel(left, right).pvalue, abs=0.02)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(6)
    num, covered = 300, 0
    for _ in range(num):
        hard = random.random(150)  # documents are hard for both models
        ours, theirs = (random.random(150) < share * hard for share in (0.9, 0.7))
        found = compare(items(ours), items(theirs))
        covered += found.low <= 0.1 <= found.high
    assert covered / num == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / num))


def test_false_alarms_are_as_rare_as_promised() -> None:
    random = np.random.default_rng(7)
    num, alarms = 200, 0
    for _ in range(num):
        hard = random.random(80)
        ours, theirs = (random.binomial(2, hard) / 2 for _ in range(2))
        found = compare(items(ours), items(theirs))
        assert found.test == "bootstrap"
        alarms += found.is_significant
    assert alarms / num == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / num))


def test_equal_results_are_equal_to_the_last_digit() -> None:
    sides = rolling(1, 0.05, 500), rolling(2, 0.0, 500)
    assert compare(*sides) == compare(*sides)


def test_gap_of_the_teacher_is_one_and_of_the_start_is_zero() -> None:
    teacher, base = answers((20, 60, 5, 15))
    names = ("student", "initial", "teacher")
    for student, expected in ((teacher, 1.0), (base, 0.0)):
        gap = gap_recovered(student, base, teacher, task="t", metric="acc", names=names)
        assert gap is not None
        assert gap.value == pytest.approx(expected)
        assert (gap.low, gap.high) == pytest.approx((expected, expected))


def test_gap_is_the_share_of_the_distance_with_an_interval_around_it() -> None:
    teacher, base = answers((20, 60, 5, 15))
    half = base.sums_N2[:, 0].copy()
    half[20:47] = 1  # the first 27 of 60 questions that the teacher alone solves
    names = ("student", "initial", "teacher")
    gap = gap_recovered(items(half), base, teacher, task="t", metric="acc", names=names)
    assert gap is not None
    assert gap.value == pytest.approx(27 / 55)
    assert gap.low is not None
    assert gap.high is not None
    assert 0.3 < gap.low < 27 / 55 < gap.high < 0.75


def test_no_gap_is_claimed_where_teacher_and_start_may_be_alike() -> None:
    teacher, base = answers((20, 12, 9, 15))
    assert gap_recovered(base, base, teacher, task="t", metric="acc", names=("s", "b", "t")) is None


def test_gap_with_few_decisive_documents_still_has_a_value() -> None:
    teacher, base = answers((20, 7, 0, 20))  # some resamples hold none of the seven
    gap = gap_recovered(teacher, base, teacher, task="t", metric="acc", names=("s", "b", "t"))
    assert gap is not None
    assert gap.value == 1


@pytest.mark.parametrize("weight_by_size", [True, False])
def test_group_scores_equal_those_of_lm_eval(weight_by_size: bool) -> None:
    values, stderrs, sizes = [0.31, 0.52, 0.44], [0.02, 0.05, 0.011], [500, 93, 1172]
    value, stderr = group_score(values, stderrs, sizes, weight_by_size)
    theirs = lm_eval_metrics.aggregate_subtask_metrics(values, sizes, weight_by_size)
    assert value == pytest.approx(theirs, rel=1e-12)
    error = (
        lm_eval_metrics.pooled_sample_stderr(stderrs, sizes)
        if weight_by_size
        else lm_eval_metrics.unweighted_mean_stderr(stderrs)
    )
    assert stderr == pytest.approx(error, rel=1e-12)
    assert group_score(values, [0.02, None, 0.011], sizes, weight_by_size) == (value, None)


def test_one_document_is_too_few_to_compare() -> None:
    with pytest.raises(NotPairedError, match="one document"):
        compare(items([1]), items([0]))


def test_memory_stays_flat_however_many_documents_differ() -> None:
    sides = rolling(1, 0.05, 5000), rolling(2, 0.0, 5000)
    tracemalloc.start()
    compare(*sides)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 * 2**20  # all draws at once would take 400 MB


@pytest.mark.parametrize("num", [50, 500])
def test_resamples_are_drawn_evenly_by_either_method(num: int) -> None:
    values = np.random.default_rng(8).random(num)
    found = compare(items(values), items(np.zeros(num)))
    half_width = stats.norm.ppf(0.975) * values.std() / math.sqrt(num)
    assert found.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert found.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
