import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scripts import bench_losses
from scripts.bench_losses import OURS, Expected, exact, gradients, inputs, measure, over
from scripts.peer_losses import KINDS, SMALL_CHUNK, WAYS, Case, Step, Way, reference
from scripts.step_bytes import peak_bytes, saved_bytes
from tests import reference as slow

SMALL = Case(vocab_size=96, hidden_size=8, rows=5, dtype=torch.float32)
INSTALLED = [name for name, way in WAYS.items() if way.path.startswith(("distill.", "torch."))]
"""Ways that this environment has; the others live in .venv-peers."""
ROOT = Path(__file__).parent.parent


@pytest.fixture
def step() -> Step:
    return Step(SMALL)


def logits_of(step: Step) -> list[list[float]]:
    logits: list[list[float]] = (
        step.hidden_RD.detach().double() @ step.weight_VD.detach().double().T
    ).tolist()
    return logits


def teacher_probs(step: Step) -> list[list[float]]:
    return [slow.softmax(row) for row in step.teacher_logits_RV.double().tolist()]


# What a step holds


def test_peak_is_what_exists_at_a_time_not_the_sum() -> None:
    given = torch.ones(1000)

    def two_at_a_time() -> Tensor:
        doubled = given * 2  # 4,000 bytes
        doubled = doubled * 2  # beside them as many
        return doubled * 2

    assert peak_bytes(two_at_a_time) == pytest.approx(8000, abs=16)  # with the factor, a scalar
    assert peak_bytes(lambda: given.mul_(2)) < 16


def test_chunks_of_fewer_rows_hold_less() -> None:
    step = Step(Case(vocab_size=2000, hidden_size=8, rows=1024, dtype=torch.float32))
    _ = step.sparse  # drawing the targets is no part of a step
    whole, chunks = (
        peak_bytes(partial(gradients, WAYS[name].load(), step))
        for name in (OURS, "distill_small_chunks")
    )

    row_bytes = 4 * 2000
    assert row_bytes * 1024 < whole < 3 * row_bytes * 1024
    assert whole - chunks > 0.9 * row_bytes * (1024 - SMALL_CHUNK)


# What a graph keeps


def test_exp_is_counted_with_its_result() -> None:
    leaf = torch.randn(6, 7, requires_grad=True)

    assert saved_bytes(lambda: leaf.exp().sum(), [leaf]) == {"": 6 * 7 * 4, "_gradient": 6 * 7 * 4}


def test_what_was_given_is_not_counted_even_through_a_view() -> None:
    left, right = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)

    assert saved_bytes(lambda: (left @ right.T).sum(), [left, right])[""] == 0
    assert saved_bytes(lambda: (left @ right.T).sum(), [left])[""] == 5 * 4 * 4


def test_one_tensor_that_two_operations_save_counts_once() -> None:
    leaf = torch.randn(10, 1, requires_grad=True)

    def compute() -> Tensor:
        result = leaf.exp()
        return (result * result).sum()

    assert saved_bytes(compute, [leaf])[""] == 10 * 4


def test_what_a_checkpoint_drops_is_not_counted() -> None:
    leaf = torch.randn(10, 3, requires_grad=True)

    def compute() -> Tensor:
        total: Tensor = checkpoint(lambda x: x.exp().exp().sum(), leaf, use_reentrant=False)
        return total

    assert saved_bytes(compute, [leaf])[""] == 0


def test_a_function_cannot_hide_tensors_beside_its_saved_ones(step: Step) -> None:
    """Our head keeps its gradients as attributes, which no hook sees."""
    counted = saved_bytes(lambda: WAYS[OURS].load()(step), inputs(step))

    expected = 4 * (step.hidden_RD.numel() + step.weight_VD.numel())
    assert counted == {"": expected, "_gradient": expected}


def test_a_dense_divergence_saves_two_floats_a_logit(step: Step) -> None:
    counted = saved_bytes(lambda: WAYS["naive_kl_div"].load()(step), inputs(step))

    assert counted == {"": 8 * SMALL.rows * SMALL.vocab_size, "_gradient": 0}


# Values


def test_the_reference_is_the_dense_divergence_and_entropy(step: Step) -> None:
    kl, entropy, grad_RD = reference(step)

    pairs = list(zip(teacher_probs(step), logits_of(step), strict=True))
    rows = SMALL.rows
    assert float(kl) == pytest.approx(math.fsum(slow.dense_kl(*pair) for pair in pairs) / rows)
    assert float(entropy) == pytest.approx(math.fsum(slow.entropy(p) for p, _ in pairs) / rows)
    weight = step.weight_VD.detach().double().tolist()
    hidden = step.hidden_RD.detach().double()[0].tolist()
    slopes = slow.slopes(
        lambda x: slow.dense_kl(pairs[0][0], slow.linear(x, weight, [0.0] * len(weight))), hidden
    )
    assert (rows * grad_RD[0]).tolist() == pytest.approx(slopes, abs=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_reference_of_sparse_targets_is_that_of_plain_loops(step: Step, kind: str) -> None:
    targets = step.sparse[kind]
    of_row = slow.bucket_kl if targets.has_bucket else slow.sparse_kl

    kl, _, _ = reference(step, targets)

    rows = zip(slow.rows_of(targets), logits_of(step), strict=True)
    assert float(kl) == pytest.approx(
        math.fsum(of_row(*row) for row in rows) / SMALL.rows, rel=1e-6
    )


@pytest.mark.parametrize("name", INSTALLED)
def test_a_way_agrees_with_float64_on_its_own_targets(step: Step, name: str) -> None:
    errors = Expected(step).errors_of(WAYS[name], WAYS[name].load())

    assert errors["value_error"] < 1e-5
    assert errors["gradient_error"] < 1e-5


def test_sixty_four_ids_and_a_tail_are_less_than_the_whole(step: Step) -> None:
    whole, _, _ = reference(step)

    assert float(WAYS["distill_top_64"].load()(step).detach()) < float(whole)


def test_a_value_that_includes_the_entropy_is_compared_without_it(step: Step) -> None:
    def cross_entropy(_: object, step: Step) -> Tensor:
        logq_RV = (step.hidden_RD @ step.weight_VD.T).log_softmax(-1)
        return -(step.teacher_logits_RV.softmax(-1) * logq_RV).sum(-1).mean()

    way = Way("logits", "torch:Tensor", cross_entropy, "kl_plus_entropy")
    errors = Expected(step).errors_of(way, way.load())

    assert errors["value_error"] < 1e-5
    assert errors["gradient_error"] < 1e-5


def test_our_head_on_every_id_is_the_dense_divergence() -> None:
    found = exact(512, rows=4)

    assert found["value_error"] < 1e-6
    assert found["gradient_error"] < 1e-6


@pytest.mark.parametrize("name", INSTALLED)
def test_every_step_computes_the_weights_gradient(step: Step, name: str) -> None:
    for other in INSTALLED:  # that ours made its head must not change the leaf of the others
        gradients(WAYS[other].load(), step)

    _, _, grad_VD = gradients(WAYS[name].load(), step)

    assert grad_VD.shape == step.weight_VD.shape
    assert bool((grad_VD.abs().sum(1) > 0).all())


# Reports


def test_a_peer_that_is_missing_is_reported_with_the_reason() -> None:
    ways = {
        OURS: WAYS[OURS],
        "absent": Way("logits", "no_such_package:loss", lambda loss, step: loss(step)),
        "moved": Way("logits", "torch.nn.functional:no_such_loss", lambda loss, step: loss(step)),
        "broken": Way("logits", "torch:Tensor", lambda _, step: step.hidden_RD @ step.hidden_RD),
    }

    found = measure(SMALL, ways, rounds=1)["ways"]

    assert found["absent"] == {"error": "ModuleNotFoundError: No module named 'no_such_package'"}
    assert found["moved"]["error"].startswith("AttributeError: ")
    assert "no_such_loss" in found["moved"]["error"]
    assert found["broken"]["error"].startswith("RuntimeError: mat1 and mat2")
    assert found[OURS]["cpu_over_ours"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert bench_losses.version_of("no-such-package") is None


def test_ratios_are_of_the_same_round() -> None:
    found = over([(2.0, 3.0), (8.0, 8.0), (5.0, 1.0)], [(1.0, 1.0), (2.0, 2.0), (5.0, 4.0)])

    assert found["cpu_over_ours"] == {"median": 2.0, "least": 1.0, "most": 4.0}
    assert found["wall_over_ours"] == {"median": 3.0, "least": 0.25, "most": 4.0}


def test_a_teacher_costs_what_a_step_is_given_of_it(step: Step) -> None:
    dtype_bytes, rows = 4, SMALL.rows

    assert step.teacher_bytes("logits") == dtype_bytes * rows * SMALL.vocab_size
    assert step.teacher_bytes("head") == dtype_bytes * rows * SMALL.hidden_size
    # An id and a weight for each of 64, and of a row two numbers and two counts.
    assert step.teacher_bytes("top_k") == rows * (64 * (8 + 4) + 2 * 4 + 2 * 8)


def test_the_head_is_over_the_very_weight_of_the_step(step: Step) -> None:
    assert step.head.weight is step.weight_VD
    assert isinstance(step.weight_VD, nn.Parameter)


def test_every_published_path_of_peers_is_pinned() -> None:
    pinned = {
        line.partition("==")[0].replace("-", "_")
        for line in (ROOT / "requirements-peers.txt").read_text().splitlines()
        if "==" in line
    }
    packages = {WAYS[name].path.partition(".")[0] for name in WAYS if name not in INSTALLED}

    assert packages == {"trl", "torchtune", "liger_kernel"}
    assert packages <= pinned
