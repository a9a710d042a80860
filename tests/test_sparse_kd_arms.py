"""Each arm of the reproduction learns from the targets that its name says."""

import math

import pytest
import torch
from torch import Tensor, nn

from distill.draw import draw
from distill.head import DistillationHead, HeadTargets
from distill.losses import LossWeights
from distill.targets import SparseTargets
from scripts.sparse_kd.arms import ARMS, CAPTURES, Arm, one_hot, sparse_targets, uniform_tail
from scripts.sparse_kd.dense import dense_loss
from scripts.sparse_kd.gradients import compare, mean_angle

ROWS, VOCAB = 6, 80


@pytest.fixture
def logits_RV() -> Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(ROWS, VOCAB)


@pytest.fixture
def labels_R(logits_RV: Tensor) -> Tensor:
    """The likeliest id of the first rows, the least likely of the others."""
    return torch.cat([logits_RV[:3].argmax(-1), logits_RV[3:].argmin(-1)])


def captured(logits_RV: Tensor, capture: str) -> SparseTargets:
    return draw(logits_RV, torch.rand(len(logits_RV), dtype=torch.float64), CAPTURES[capture])


def whole(targets: SparseTargets, vocab_size: int = VOCAB) -> Tensor:
    """Targets as a row over the vocabulary; an id that comes twice has both weights."""
    whole_RV = torch.zeros(targets.num_rows, vocab_size)
    return whole_RV.index_put_(
        (targets.row_of_entry(), targets.ids_N), targets.weights_N, accumulate=True
    )


def expected_tail(t_V: Tensor, kept: list[int], label: int, tail: str) -> Tensor:
    """One row of truncated targets, written out."""
    out = [float(t_V[v]) if v in kept else 0.0 for v in range(len(t_V))]
    rest = 1 - sum(out)
    if tail == "renormalised":
        out = [value / (1 - rest) for value in out]
    elif tail == "label":
        out[label] += rest
    elif tail == "uniform":
        share = rest / (len(t_V) - len(kept))
        out = [value if v in kept else share for v, value in enumerate(out)]
    return torch.tensor(out)


@pytest.mark.parametrize("tail", ["none", "renormalised", "label", "uniform"])
def test_tail_rules_are_those_of_their_names(
    logits_RV: Tensor, labels_R: Tensor, tail: str
) -> None:
    arm, targets = ARMS[f"top_k_12_{tail}"], captured(logits_RV, "top_k_12")
    if arm.is_dense:
        found_RV = uniform_tail(targets, VOCAB)
    else:
        found_RV = whole(sparse_targets(arm, targets, labels_R))
    probs_RV = logits_RV.double().softmax(-1)
    for row in range(ROWS):
        kept = probs_RV[row].topk(12).indices.tolist()
        expected_V = expected_tail(probs_RV[row], kept, int(labels_R[row]), tail)
        torch.testing.assert_close(found_RV[row], expected_V, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.tail != "bucket"])
def test_sparse_and_dense_loss_have_the_gradient_p_minus_t(
    logits_RV: Tensor, labels_R: Tensor, arm: Arm
) -> None:
    """With the weight of the head as identity, gradients in hidden states are those in logits."""
    torch.manual_seed(1)
    hidden_RV, head = torch.randn(ROWS, VOCAB, requires_grad=True), nn.Linear(VOCAB, VOCAB, False)
    head.weight.data.copy_(torch.eye(VOCAB))
    if arm.tail == "uniform":
        assert arm.capture is not None
        t_RV = uniform_tail(captured(logits_RV, arm.capture), VOCAB)
    elif arm.is_dense:
        t_RV = logits_RV.softmax(-1)
    else:
        sparse = one_hot(labels_R)
        if arm.capture is not None:
            sparse = sparse_targets(arm, captured(logits_RV, arm.capture), labels_R)
        t_RV = whole(sparse)
    if arm.is_dense:
        loss = dense_loss(hidden_RV, head.weight, lambda rows: t_RV[rows])
    else:
        targets = HeadTargets(labels_R, sparse, LossWeights(kl=1, ce=0), VOCAB)
        loss, _ = DistillationHead.adopt(head).loss(hidden_RV, targets)
    torch.autograd.backward(loss)
    expected_RV = hidden_RV.detach().softmax(-1) * t_RV.sum(-1, keepdim=True) - t_RV
    assert hidden_RV.grad is not None
    torch.testing.assert_close(hidden_RV.grad, expected_RV, atol=1e-6, rtol=1e-4)


def test_dense_loss_is_torchs_cross_entropy_with_soft_labels() -> None:
    torch.manual_seed(0)
    rows, vocab = 150, 30  # more than are done at a time
    hidden_RD, t_RV = torch.randn(rows, 8), torch.randn(rows, vocab).softmax(-1)
    ours, theirs = (
        (hidden_RD.clone().requires_grad_(), torch.linspace(-1, 1, vocab * 8).view(vocab, 8))
        for _ in range(2)
    )
    for hidden, weight in (ours, theirs):
        weight.requires_grad_()
        if hidden is ours[0]:
            loss = dense_loss(hidden, weight, lambda rows: t_RV[rows])
        else:
            loss = nn.functional.cross_entropy(hidden @ weight.T, t_RV, reduction="sum")
        torch.autograd.backward(loss / rows)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-6, rtol=1e-4)


def test_angle_and_norm_ratio_of_known_vectors() -> None:
    found = compare(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert found["angle_degrees"] == pytest.approx(45)
    assert found["norm_ratio"] == pytest.approx(math.sqrt(8))
    assert compare(torch.ones(3), torch.ones(3))["angle_degrees"] == pytest.approx(0, abs=1e-5)


def test_mean_angle_counts_rows_alike_and_leaves_out_those_of_zeros() -> None:
    reference = torch.tensor([[100.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    gradient = torch.tensor([[100.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert mean_angle(gradient, reference) == pytest.approx((0 + 90) / 2)
