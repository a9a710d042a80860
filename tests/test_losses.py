import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.config import TargetsConfig, ThresholdConfig, TopKConfig
from distill.draw import draw
from distill.losses import LossWeights, distillation_loss, forward_kl
from distill.targets import SparseTargets
from distill.uniforms import row_uniforms
from tests import reference

ONLY_KL, ONLY_CE, MIX = LossWeights(1, 0), LossWeights(0, 1), LossWeights(0.7, 0.4)


def targets_config(kind: str, temperature: float = 1.0, k: int = 4) -> TargetsConfig:
    if kind == "top_k":
        return TopKConfig(kind="top_k", k=k, temperature=temperature)
    return ThresholdConfig(tau=0.1, temperature=temperature)


def random_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    return 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def drawn(logits_RV: Tensor, config: TargetsConfig) -> SparseTargets:
    return draw(logits_RV.clone(), row_uniforms(0, 0, len(logits_RV)), config)


def labels_of(num_rows: int, vocab_size: int) -> Tensor:
    return torch.arange(num_rows) * 7 % vocab_size


def value_and_gradient(
    logits_RV: Tensor, targets: SparseTargets, weights: LossWeights = ONLY_KL
) -> tuple[float, Tensor]:
    logits_RV = logits_RV.clone().requires_grad_()
    loss = distillation_loss(logits_RV, labels_of(*logits_RV.shape), targets, weights)
    assert loss.dtype == torch.float32
    (gradient_RV,) = torch.autograd.grad(loss, logits_RV)
    return float(loss.detach()), gradient_RV


@pytest.mark.parametrize("weights", [ONLY_KL, ONLY_CE, MIX], ids=["kl", "ce", "mix"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_value_and_gradient_are_the_references(
    kind: str, temperature: float, weights: LossWeights
) -> None:
    num_rows, vocab_size = 4, 17
    targets = drawn(random_logits(num_rows, vocab_size, 0), targets_config(kind, temperature))
    logits_RV, labels = random_logits(num_rows, vocab_size, 1), labels_of(num_rows, vocab_size)

    def truth(flat: list[float]) -> float:
        logits = [flat[r * vocab_size : (r + 1) * vocab_size] for r in range(num_rows)]
        return reference.loss(logits, labels.tolist(), targets, weights.kl, weights.ce)

    value, gradient_RV = value_and_gradient(logits_RV, targets, weights)
    flat = logits_RV.flatten().tolist()
    assert value == pytest.approx(truth(flat), rel=1e-6, abs=1e-5)
    assert gradient_RV.flatten().tolist() == pytest.approx(reference.slopes(truth, flat), abs=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_but_one_id_make_the_dense_kl(temperature: float) -> None:
    teacher_RV, student_RV = random_logits(6, 30, 2), random_logits(6, 30, 3)
    targets = drawn(teacher_RV, targets_config("top_k", temperature, k=29))
    dense = math.fsum(
        reference.dense_kl(reference.softmax(teacher, temperature), student, temperature)
        for teacher, student in zip(teacher_RV.tolist(), student_RV.tolist(), strict=True)
    )
    value, gradient_RV = value_and_gradient(student_RV, targets)
    assert value == pytest.approx(dense, rel=1e-5)
    p_RV, t_RV = (student_RV / temperature).softmax(-1), (teacher_RV / temperature).softmax(-1)
    torch.testing.assert_close(gradient_RV, (p_RV - t_RV) / temperature, rtol=0, atol=1e-6)


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=9, max_size=9)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(LOGITS, LOGITS, st.integers(1, 8))
def test_bucket_kl_lies_between_zero_and_the_dense_kl(
    teacher: list[float], student: list[float], k: int
) -> None:
    targets = drawn(torch.tensor([teacher]), targets_config("top_k", k=k))
    value, _ = value_and_gradient(torch.tensor([student]), targets)
    dense = reference.dense_kl(reference.softmax(teacher), student)
    assert -5e-6 <= value <= dense + 5e-6 * (1 + dense)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 8, 63])
def test_bucket_is_at_rest_when_student_is_teacher(k: int, temperature: float) -> None:
    logits_RV = random_logits(10, 64, 4)
    targets = drawn(logits_RV, targets_config("top_k", temperature, k))
    value, gradient_RV = value_and_gradient(logits_RV, targets)
    assert abs(value) < 1e-5
    assert float(gradient_RV.abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_threshold_is_at_rest_on_average_when_student_is_teacher(temperature: float) -> None:
    number, logits_V = 4096, random_logits(1, 60, 5)[0]
    config = targets_config("threshold", temperature)
    uniforms_S = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    targets = draw(logits_V.repeat(number, 1), uniforms_S, config)
    assert int(targets.counts_R[0]) > int(targets.num_head_R[0])
    value, gradient_SV = value_and_gradient(logits_V.expand(number, -1), targets)
    assert abs(value / number) < 1e-3
    # Every id is drawn on one arc of the uniforms, so counting is off by at most one draw's weight.
    share = float(targets.tail_mass_R[0] / (targets.counts_R[0] - targets.num_head_R[0]))
    assert float(gradient_SV.mean(0).abs().max()) <= share / number + 1e-6
    assert float(gradient_SV.abs().max()) > 0.01  # a single draw is not at rest


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_adding_a_constant_to_a_row_changes_nothing(kind: str) -> None:
    logits_RV = random_logits(5, 40, 6)
    targets = drawn(random_logits(5, 40, 7), targets_config(kind, 2.0))
    shifts_R1 = torch.tensor([[-50.0], [0.0], [3.0], [40.0], [100.0]])
    value, gradient_RV = value_and_gradient(logits_RV, targets, MIX)
    shifted, shifted_gradient_RV = value_and_gradient(logits_RV + shifts_R1, targets, MIX)
    assert shifted == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(shifted_gradient_RV, gradient_RV, rtol=0, atol=1e-5)
    # Invariance in other words: the gradient of a row sums to zero.
    assert float(gradient_RV.sum(-1).abs().max()) < 2e-6


def test_honest_kl_is_unbiased_and_the_plug_in_entropy_is_not() -> None:
    number, vocab_size = 4000, 200
    teacher_V, student_V = random_logits(2, vocab_size, 8) / 2
    targets = draw(
        teacher_V.repeat(number, 1), row_uniforms(1, 2, number), targets_config("threshold")
    )
    rows_N = targets.row_of_entry()
    logq_N = student_V.log_softmax(-1)[targets.ids_N]
    honest_S = forward_kl(targets, rows_N, logq_N, None).double()
    weights_N = targets.weights_N
    surplus_N = torch.xlogy(weights_N, weights_N) - weights_N * logq_N
    plug_in_S = torch.zeros(number, dtype=torch.float64).index_add(0, rows_N, surplus_N.double())

    dense = reference.dense_kl(reference.softmax(teacher_V.tolist()), student_V.tolist())
    stderr = float(honest_S.std()) / math.sqrt(number)
    assert abs(float(honest_S.mean()) - dense) < 4 * stderr < 0.03 * dense
    assert abs(float(plug_in_S.mean()) - dense) > 20 * stderr


def test_mean_gradient_is_the_dense_gradient_within_its_standard_error() -> None:
    number, vocab_size = 4000, 150
    teacher_V, student_V = random_logits(2, vocab_size, 9) / 2
    targets = draw(
        teacher_V.repeat(number, 1), row_uniforms(3, 4, number), targets_config("threshold")
    )
    _, gradient_SV = value_and_gradient(student_V.expand(number, -1), targets)
    probs = reference.softmax(teacher_V.tolist())
    plan = reference.threshold(probs, 0.1)
    dense_V = student_V.double().softmax(-1) - torch.tensor(probs, dtype=torch.float64)
    error_V = gradient_SV.double().mean(0) - dense_V
    variance_V = torch.tensor([p * max(plan.share - p, 0) for p in probs], dtype=torch.float64)
    variance_V[plan.head] = 0
    assert bool((error_V.abs() <= 4.5 * (variance_V / number).sqrt() + 1e-6).all())


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_confident_student_stays_finite(kind: str) -> None:
    targets = drawn(random_logits(3, 50, 10), targets_config(kind))
    first_R = targets.counts_R.cumsum(0) - targets.counts_R
    likeliest_R = targets.ids_N[first_R]
    logits_RV = torch.zeros(3, 50).scatter(1, likeliest_R[:, None], 1e4)
    # The obvious formula for the tail is infinite here.
    kept_mass_R = logits_RV.softmax(-1).gather(1, likeliest_R[:, None])
    assert torch.log1p(-kept_mass_R).tolist() == [[-math.inf]] * 3
    value, gradient_RV = value_and_gradient(logits_RV, targets)
    truth = reference.loss(logits_RV.tolist(), [0] * 3, targets, 1, 0)
    assert value == pytest.approx(truth, rel=1e-6)
    assert bool(torch.isfinite(gradient_RV).all())
    p_RV = torch.zeros(3, 50).scatter(1, likeliest_R[:, None], 1.0)
    mass_moved_R = (gradient_RV - p_RV).clamp(max=0).sum(-1)
    torch.testing.assert_close(mass_moved_R, -torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_two_half_batches_sum_to_the_whole(kind: str) -> None:
    logits_RV, labels_R = random_logits(9, 40, 11), labels_of(9, 40)
    targets = drawn(random_logits(9, 40, 12), targets_config(kind))
    first_R = torch.arange(9) < 4
    halves = [
        distillation_loss(logits_RV[mask_R], labels_R[mask_R], targets.keep_rows(mask_R), MIX)
        for mask_R in (first_R, ~first_R)
    ]
    whole = distillation_loss(logits_RV, labels_R, targets, MIX)
    assert float(halves[0] + halves[1]) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_no_rows_cost_nothing(kind: str) -> None:
    targets = drawn(random_logits(2, 40, 13), targets_config(kind))
    value, gradient_RV = value_and_gradient(
        torch.zeros(0, 40), targets.keep_rows(torch.zeros(2, dtype=torch.bool)), MIX
    )
    assert value == 0
    assert gradient_RV.shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_error_is_no_worse_than_that_of_the_naive_loss_in_the_same_dtype(
    kind: str, dtype: torch.dtype
) -> None:
    logits_RV, labels_R = random_logits(20, 60, 14).to(dtype), labels_of(20, 60)
    targets = drawn(random_logits(20, 60, 15), targets_config(kind))
    truth = reference.loss(logits_RV.tolist(), labels_R.tolist(), targets, 0.7, 0.4)
    ours = float(distillation_loss(logits_RV, labels_R, targets, MIX))
    logp_RV, rows_N = logits_RV.log_softmax(-1), targets.row_of_entry()
    logq_N = logp_RV[rows_N, targets.ids_N].float()
    rest_RV = logp_RV.index_put((rows_N, targets.ids_N), torch.tensor(-math.inf, dtype=dtype))
    kl = forward_kl(targets, rows_N, logq_N, rest_RV.logsumexp(-1).float()).sum()
    naive = float(0.7 * kl - 0.4 * logp_RV.gather(1, labels_R[:, None]).sum())
    assert abs(ours - truth) <= abs(naive - truth) + 1e-6 * abs(truth)


def test_rows_that_are_not_equally_many_are_refused() -> None:
    logits_RV, labels_R = random_logits(4, 30, 16), labels_of(4, 30)
    targets = drawn(random_logits(4, 30, 17), targets_config("threshold"))
    message = "3 rows of logits, 4 labels and 4 rows of targets must be equally many"
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits_RV[:3], labels_R, targets, MIX)
    with pytest.raises(ValueError, match="4 rows of logits, 5 labels and 4 rows of targets"):
        distillation_loss(logits_RV, labels_of(5, 30), targets, MIX)


def test_target_ids_outside_the_student_are_refused() -> None:
    targets = drawn(random_logits(2, 30, 18), targets_config("top_k"))
    targets = replace(targets, ids_N=torch.full_like(targets.ids_N, 29))
    labels_R = labels_of(2, 29)
    with pytest.raises(ValueError, match="target id 29 is outside the student's 29 logits"):
        distillation_loss(torch.zeros(2, 29), labels_R, targets, MIX)
    assert math.isfinite(float(distillation_loss(torch.zeros(2, 30), labels_R, targets, MIX)))
