"""Divergences other than the forward KL, weights of rows, schedules of the mix."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.config import SampledConfig, TargetsConfig, ThresholdConfig, TopKConfig, TrainConfig
from distill.config.base import Divergence
from distill.draw import draw
from distill.errors import MismatchError
from distill.head import DistillationHead, HeadTargets
from distill.losses import LossWeights, distillation_loss
from distill.schedules import kl_weight_at
from distill.targets import SparseTargets
from distill.uniforms import row_uniforms
from tests import reference

KINDS: tuple[Divergence, ...] = get_args(Divergence)
NONLINEAR = KINDS[1:]
MIXES = [0.1, 0.5, 0.9]


def top_k(logits_RV: Tensor, k: int = 4, temperature: float = 1.0) -> SparseTargets:
    config = TopKConfig(kind="top_k", k=k, temperature=temperature)
    return draw(logits_RV, row_uniforms(0, 0, len(logits_RV)), config)


def logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    return 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def value(logits_RV: Tensor, targets: SparseTargets, weights: LossWeights) -> Tensor:
    labels_R = torch.zeros(len(logits_RV), dtype=torch.int64)
    return distillation_loss(logits_RV, labels_R, targets, weights)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_references(
    kind: Divergence, mix: float, temperature: float
) -> None:
    targets, student_RV = top_k(logits(3, 11, 0), temperature=temperature), logits(3, 11, 1)
    weights = LossWeights(1, 0, kind, mix)

    def truth(flat: list[float]) -> float:
        rows = [flat[first : first + 11] for first in range(0, 33, 11)]
        return math.fsum(
            reference.divergence(kind, mix, row, student, temperature)
            for row, student in zip(reference.rows_of(targets), rows, strict=True)
        )

    student_RV.requires_grad_()
    loss = value(student_RV, targets, weights)
    (gradient_RV,) = torch.autograd.grad(loss, student_RV)
    flat = student_RV.flatten().tolist()
    assert float(loss.detach()) == pytest.approx(truth(flat), rel=1e-5, abs=1e-6)
    assert gradient_RV.flatten().tolist() == pytest.approx(reference.slopes(truth, flat), abs=3e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_and_nothing_pulls_where_student_is_teacher(
    kind: Divergence, mix: float
) -> None:
    both_RV = logits(6, 40, 2)
    student_RV = both_RV.clone().requires_grad_()
    loss = value(student_RV, top_k(both_RV), LossWeights(1, 0, kind, mix))
    assert abs(float(loss.detach())) < 2e-6
    if kind != "total_variation":  # which has a kink there
        assert float(torch.autograd.grad(loss, student_RV)[0].abs().max()) < 1e-6


LOGITS = st.lists(st.floats(-15, 15, width=32), min_size=9, max_size=9)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(LOGITS, LOGITS, st.integers(1, 8), st.sampled_from(KINDS), st.sampled_from(MIXES))
def test_divergences_lie_between_zero_and_those_of_whole_distributions(
    teacher: list[float], student: list[float], k: int, kind: Divergence, mix: float
) -> None:
    targets, student_RV = top_k(torch.tensor([teacher]), k), torch.tensor([student])
    found = float(value(student_RV, targets, LossWeights(1, 0, kind, mix)))
    probs = reference.softmax(teacher)
    whole = reference.Row(list(range(9)), probs, 9, 0.0, reference.entropy(probs))
    most = reference.divergence(kind, mix, whole, student, 1.0)
    assert -1e-5 <= found <= most + 1e-5 * (1 + most)
    if kind == "jensen_shannon":
        bound = -mix * math.log(mix) - (1 - mix) * math.log(1 - mix)
        assert found <= bound + 1e-5
    if kind == "total_variation":
        assert found <= 1 + 1e-6


def test_jensen_shannon_at_a_half_is_symmetric() -> None:
    left_RV, right_RV = logits(5, 6, 3), logits(5, 6, 4)
    weights = LossWeights(1, 0, "jensen_shannon", 0.5)
    one = value(right_RV, top_k(left_RV, k=5), weights)
    other = value(left_RV, top_k(right_RV, k=5), weights)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("kind", "limit"), [("skewed_forward_kl", 0), ("skewed_reverse_kl", 1)])
def test_skewed_divergences_end_at_the_plain_ones(kind: Divergence, limit: int) -> None:
    targets, student_RV = top_k(logits(5, 12, 5)), logits(5, 12, 6)
    skewed = value(student_RV, targets, LossWeights(1, 0, kind, 1e-5))
    plain = value(student_RV, targets, LossWeights(1, 0, KINDS[limit]))
    torch.testing.assert_close(skewed, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("by_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_head_computes_them_all(
    kind: Divergence, temperature: float, by_entropy: bool
) -> None:
    torch.manual_seed(0)
    linear, hidden_RD = nn.Linear(8, 50), torch.randn(20, 8)
    targets = top_k(logits(20, 50, 7), temperature=temperature)
    weights = LossWeights(0.7, 0.4, kind, 0.3, by_entropy=by_entropy)
    labels_R = torch.randint(0, 50, (20,))
    inputs = [hidden_RD.requires_grad_(), *linear.parameters()]
    wanted = HeadTargets(labels_R, targets, weights, 50, chunk_rows=7)
    ours, rows = DistillationHead.adopt(linear).loss(hidden_RD, wanted)
    truth = distillation_loss(linear(hidden_RD), labels_R, targets, weights)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(rows.loss_R.sum(), truth)
    for found, expected in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    forward = LossWeights(1, 0)
    honest = distillation_loss(linear(hidden_RD), labels_R, targets, forward)
    torch.testing.assert_close(rows.kl_R.sum(), honest.detach())  # reported whatever is trained


@pytest.mark.parametrize("kind", NONLINEAR)
@pytest.mark.parametrize("config", [ThresholdConfig(tau=0.1), SampledConfig(kind="sampled")])
def test_drawn_targets_are_refused_with_the_reason(kind: Divergence, config: TargetsConfig) -> None:
    targets = draw(logits(2, 30, 8), row_uniforms(0, 0, 2), config)
    with pytest.raises(MismatchError, match=r"(?s)no estimator is\s+unbiased.*kind=top_k"):
        value(logits(2, 30, 9), targets, LossWeights(1, 0, kind))


def test_weight_by_entropy_gives_sure_rows_to_the_labels() -> None:
    sure_RV = torch.tensor([[50.0, 0, 0, 0], [0.0, 0, 0, 0]])
    targets = top_k(sure_RV, k=3)
    kl_R, ce_R = LossWeights(0.8, 0.1, by_entropy=True).of_rows(targets, 4)
    assert kl_R.tolist() == pytest.approx([0, 0.8], abs=1e-5)
    assert ce_R.tolist() == pytest.approx([0.9, 0.1], abs=1e-5)
    plain = LossWeights(0.8, 0.1).of_rows(targets, 4)
    assert [part.tolist() for part in plain] == [
        pytest.approx([0.8, 0.8]),
        pytest.approx([0.1, 0.1]),
    ]


def test_schedules_of_the_kl_weight() -> None:
    def weights(schedule: str, num_steps: int = 10) -> list[float]:
        config = TrainConfig(kl_weight=0.9, kl_weight_end=0.1, kl_schedule=schedule)  # type: ignore[arg-type]
        return [kl_weight_at(config, step, num_steps) for step in range(num_steps)]

    assert weights("constant") == [0.9] * 10
    assert weights("linear") == pytest.approx([0.9 - 0.8 * step / 9 for step in range(10)])
    wsd = weights("wsd", 20)
    assert wsd[:3] == pytest.approx([0.5, 0.9, 0.9])  # two steps of warmup
    assert wsd[3:16] == [0.9] * 13
    assert wsd[16:] == pytest.approx([0.7, 0.5, 0.3, 0.1])
    assert weights("linear", 1) == [0.9]
