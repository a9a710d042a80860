from scripts import bench_scaling


def test_marginal_time_leaves_the_start_out() -> None:
    runs = {rows: [bench_scaling.Run(100, 7.0 + 0.5 * rows)] for rows in (10, 40, 100)}

    found = bench_scaling.summary(runs)

    assert found["marginal_time_ratio"] == 1.0
    assert found["noise"] == 0.0


def test_time_that_grows_with_the_square_is_not_linear() -> None:
    runs = {rows: [bench_scaling.Run(100, rows**2)] for rows in (10, 40, 100)}

    assert bench_scaling.summary(runs)["marginal_time_ratio"] == 2.8


def test_the_least_of_the_rounds_counts_and_the_rest_is_noise() -> None:
    runs = {
        rows: [bench_scaling.Run(100, 3.0 + rows), bench_scaling.Run(110 + rows, 3.0 + 1.1 * rows)]
        for rows in (10, 40, 100)
    }

    found = bench_scaling.summary(runs)

    assert found["marginal_time_ratio"] == 1.0
    assert found["marginal_time_ratio_of_rounds"] == [1.0, 1.0]
    assert found["noise"] == 0.097  # 10 of 103 seconds
    assert found["peak_ratio"] == 1.75  # 210 over 120 bytes, the most of a size
