import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.cache.reader import Cache, open_cache
from distill.capture import capture
from distill.distillation_model import DistillationModel
from distill.evaluate.calibration import Reliability, bin_sums
from distill.evaluate.dense import Exact, compare, measure_exactly
from distill.evaluate.fidelity import (
    Estimate,
    Fidelity,
    by_document,
    clustered_mean,
    measure,
    sums_by_segment,
)
from tests import reference
from tests.conftest import ConfigMaker

CPU = torch.device("cpu")


def mean_of(clusters: list[Tensor]) -> Estimate:
    """The estimate from the values themselves."""
    sums_C = torch.stack([cluster.double().sum() for cluster in clusters])
    return clustered_mean(sums_C, torch.tensor([len(cluster) for cluster in clusters]))


def random_clusters(num_clusters: int, seed: int, spread: float = 0.5) -> list[Tensor]:
    """Clusters of 1 to 30 rows around levels of their own; the true mean is 2."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 31, (num_clusters,), generator=generator).tolist()
    levels = (2 + spread * torch.randn(num_clusters, generator=generator)).tolist()
    return [
        level + torch.randn(size, generator=generator)
        for level, size in zip(levels, sizes, strict=True)
    ]


@pytest.mark.parametrize("num_clusters", [2, 3, 40])
def test_clustered_mean_is_the_references(num_clusters: int) -> None:
    clusters = random_clusters(num_clusters, seed=num_clusters)
    found = mean_of(clusters)
    mean, stderr = reference.clustered_mean([cluster.tolist() for cluster in clusters])
    assert found.value == pytest.approx(mean, rel=1e-12)
    assert found.stderr == pytest.approx(stderr, rel=1e-9)


def test_mean_is_over_rows_not_over_clusters() -> None:
    found = mean_of([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0])])
    assert found.value == 2.0


def test_stderr_of_equal_clusters_is_the_textbook_one_of_their_means() -> None:
    clusters = list(torch.randn(25, 8, generator=torch.Generator().manual_seed(0)).double())
    means = torch.stack([cluster.mean() for cluster in clusters])
    assert mean_of(clusters).stderr == pytest.approx(float(means.std()) / 5, rel=1e-9)


def test_stderr_is_the_spread_over_many_data_sets() -> None:
    found = [mean_of(random_clusters(30, seed)) for seed in range(1000)]
    values = torch.tensor([estimate.value for estimate in found], dtype=torch.float64)
    variances = torch.tensor([estimate.stderr**2 for estimate in found], dtype=torch.float64)
    assert float(variances.mean().sqrt()) == pytest.approx(float(values.std()), rel=0.12)
    assert float(values.mean()) == pytest.approx(2, abs=4 * float(values.std()) / math.sqrt(1000))


def test_rows_that_hang_together_widen_the_stderr() -> None:
    clusters = random_clusters(40, seed=1, spread=3)
    rows = list(torch.cat(clusters)[:, None])
    assert mean_of(rows).value == pytest.approx(mean_of(clusters).value)
    assert mean_of(clusters).stderr > 2 * mean_of(rows).stderr


def test_order_of_clusters_does_not_matter() -> None:
    clusters = random_clusters(12, seed=2)
    assert mean_of(clusters[::-1]).stderr == pytest.approx(mean_of(clusters).stderr, rel=1e-12)


def test_sums_are_double_whatever_the_rows_are() -> None:
    clusters = [torch.full([100_000], 0.1), torch.full([100_000], 0.1)]
    found = mean_of(clusters)
    assert found.value == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
    assert found.stderr < 1e-12
    agrees = mean_of([torch.tensor([True, False]), torch.tensor([True, True])])
    assert agrees.value == 0.75


def test_a_single_cluster_has_no_stderr() -> None:
    found = mean_of([torch.tensor([1.0, 2.0, 6.0])])
    assert found.value == 3.0
    assert math.isnan(found.stderr)


def test_clusters_without_rows_do_not_count() -> None:
    sums, counts = torch.tensor([3.0, 0.0, 5.0]), torch.tensor([3, 0, 1])
    assert clustered_mean(sums, counts) == clustered_mean(sums[[0, 2]], counts[[0, 2]])


def test_documents_that_go_on_in_the_next_block_are_one_cluster() -> None:
    blocks = [
        torch.tensor([[3.0, 30.0], [2.0, 20.0]]),
        torch.tensor([[4.0, 40.0]]),  # the second document goes right through
        torch.tensor([[1.0, 10.0], [5.0, 50.0]]),
    ]
    sums_CM, counts_C = by_document([block.double() for block in blocks])
    assert counts_C.tolist() == [3, 7, 5]
    assert sums_CM[:, 0].tolist() == [30, 70, 50]


def test_rows_are_summed_by_segment(cache_copy: Path) -> None:
    cache = open_cache(str(cache_copy / "held_out"))
    batch = cache.batch([1])
    sums_SM = sums_by_segment(batch, batch.labels_R.double()[:, None])
    segments = cache.block(1)[0].segment_lengths.tolist()
    assert len(sums_SM) == len(segments)
    assert sums_SM[:, 0].tolist() == [length - 1 for length in segments]
    assert sums_SM[:, 1].sum() == batch.labels_R.sum()


# Calibration


def test_reliability_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence_R = torch.rand(500, generator=generator)
    hits_R = torch.rand(500, generator=generator) < confidence_R**2
    found = Reliability.of(
        bin_sums(confidence_R[:200], hits_R[:200]) + bin_sums(confidence_R[200:], hits_R[200:])
    )
    assert found.ece == pytest.approx(
        reference.calibration_error(confidence_R.tolist(), hits_R.tolist()), rel=1e-6
    )
    assert sum(found.count) == 500


def test_model_that_is_as_often_right_as_it_says_has_no_calibration_error() -> None:
    found = Reliability.of(bin_sums(torch.full([4], 0.75), torch.tensor([1, 1, 1, 0]).bool()))
    assert found.ece == 0
    assert found.count == (0, 0, 0, 0, 0, 0, 0, 4, 0, 0)
    assert found.accuracy[7] == found.confidence[7] == 0.75
    assert found.accuracy[0] is None


def test_certain_and_hopeless_rows_have_a_bin() -> None:
    found = Reliability.of(bin_sums(torch.tensor([1.0, 0.0]), torch.tensor([True, False])))
    assert found.count == (1, *[0] * 8, 1)


# Estimators of the sparse cache against whole distributions


@pytest.fixture(params=["threshold", "top_k", "sampled"])
def held_out(request: pytest.FixtureRequest, tiny_config: ConfigMaker, tmp_path: Path) -> Cache:
    """The held-out blocks with targets of each kind."""
    more = {"sampled": ("targets.draws=32",), "top_k": ("targets.k=8",)}
    config = tiny_config(
        f"targets.kind={request.param}",
        *more.get(request.param, ()),
        "data.held_out_blocks=12",
        f"cache.folder={tmp_path / request.param}",
    )
    capture(config)
    return open_cache(config.cache_folder("held_out"))


def both(tiny_teacher: Path, cache: Cache) -> tuple[Fidelity, Exact]:
    """A disturbed copy of the teacher by the cache, and by the teacher itself."""
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.get_decoder().layers.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    exact = measure_exactly(model, teacher, cache, device=CPU)
    return measure(DistillationModel(model), cache, device=CPU), exact


def test_sparse_estimates_are_those_of_whole_distributions_within_their_error(
    tiny_teacher: Path, held_out: Cache
) -> None:
    sparse, exact = both(tiny_teacher, held_out)
    assert exact.kl_nats.value > 0.05
    assert sparse.agreement == pytest.approx(exact.agreement)
    difference = sparse.kl_nats.value - exact.kl_nats.value
    if held_out.manifest.has_bucket:
        assert -0.5 * exact.kl_nats.value < difference < 1e-4  # of k + 1 outcomes: never above
    else:
        assert abs(difference) < 3 * sparse.kl_nats.stderr
    if sparse.acceptance is None:
        assert held_out.manifest.targets["kind"] == "sampled"
    else:
        least, most = sparse.acceptance
        assert least.value <= exact.acceptance.value <= most.value + 1e-3
        assert most.value - least.value < 0.5


def test_means_and_their_errors_are_those_of_the_documents(
    tiny_teacher: Path, held_out: Cache
) -> None:
    sparse, _ = both(tiny_teacher, held_out)
    counts_C = torch.tensor(sparse.documents.num_rows)
    assert len(counts_C) == sparse.num_documents
    assert int(counts_C.sum()) == held_out.num_rows
    for measured in ("ce_nats", "kl_nats", "agreement"):
        sums_C = torch.tensor(getattr(sparse.documents, measured), dtype=torch.float64)
        found = clustered_mean(sums_C, counts_C)
        expected = getattr(sparse, measured)
        assert found.value == pytest.approx(expected.value, rel=1e-12)
        assert found.stderr == pytest.approx(expected.stderr, rel=1e-9)


def test_teacher_is_as_calibrated_by_its_cache_as_by_itself(
    tiny_teacher: Path, held_out: Cache
) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    found = measure(DistillationModel(teacher), held_out, device=CPU)
    assert found.agreement.value > 0.999
    if held_out.manifest.targets["kind"] == "sampled":
        assert found.teacher_reliability is None
    else:
        assert found.teacher_reliability is not None
        assert found.teacher_reliability.ece == pytest.approx(found.reliability.ece, abs=0.01)


def test_whole_distributions_are_compared_as_the_reference_does() -> None:
    generator = torch.Generator().manual_seed(0)
    q_RV, t_RV = torch.randn(2, 6, 11, generator=generator)
    found_R3 = compare(q_RV, t_RV)
    for row, (q_V, t_V) in enumerate(zip(q_RV.softmax(-1), t_RV.softmax(-1), strict=True)):
        kl = sum(t * math.log(t / q) for q, t in zip(q_V.tolist(), t_V.tolist(), strict=True))
        accepted = sum(min(q, t) for q, t in zip(q_V.tolist(), t_V.tolist(), strict=True))
        assert found_R3[row].tolist() == pytest.approx(
            [kl, float(q_V.argmax() == t_V.argmax()), accepted], rel=1e-5
        )
    same_R3 = compare(t_RV, t_RV)
    assert same_R3[:, 0].abs().max() < 1e-6
    torch.testing.assert_close(same_R3[:, 2], torch.ones(6, dtype=torch.float64))
