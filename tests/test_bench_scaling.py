from collections.abc import Callable

from scripts import bench_scaling
from scripts.bench_scaling import Round, Run

SIZES = (10, 40, 100)


def one_round(seconds: Callable[[int], float], peak_bytes: int = 100) -> Round:
    return {rows: [Run(peak_bytes, seconds(rows))] for rows in SIZES}


def test_marginal_time_leaves_the_start_out() -> None:
    found = bench_scaling.summary([one_round(lambda rows: 7.0 + 0.5 * rows)])

    assert found["marginal_time_ratio"] == 1.0
    assert found["noise"] == 0.0


def test_time_that_grows_with_the_square_is_not_linear() -> None:
    found = bench_scaling.summary([one_round(lambda rows: rows**2)])

    assert found["marginal_time_ratio"] == 2.8


def test_a_machine_that_slows_down_steadily_does_not_look_like_growth() -> None:
    """Up and down the sizes, the small ones are met early and late."""
    order = (10, 40, 100, 40, 10)
    slow: Round = {rows: [] for rows in SIZES}
    for place, rows in enumerate(order):
        slow[rows].append(Run(100, rows * (1 + 0.1 * place)))

    found = bench_scaling.summary([slow])

    assert found["marginal_time_ratio"] == 1.0
    assert found["noise"] == 0.4


def test_means_of_the_rounds_count_and_the_rest_is_noise() -> None:
    rounds = [one_round(lambda rows: 3.0 + rows), one_round(lambda rows: 3.0 + 1.2 * rows, 150)]

    found = bench_scaling.summary(rounds)

    assert found["marginal_time_ratio"] == 1.0
    assert found["marginal_time_ratio_of_rounds"] == [1.0, 1.0]
    assert found["marginal_microseconds_per_row"] == [1.1e6, 1.1e6]
    assert found["noise"] == 0.194  # 20 of 103 seconds
    assert found["peak_ratio"] == 1.0
    assert [size["peak_bytes"] for size in found["sizes"]] == [150] * 3
