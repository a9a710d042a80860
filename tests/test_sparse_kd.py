"""The reproduction of sparse logit sampling compares what it says it compares."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.cache.reader import open_cache
from distill.capture import capture
from distill.config import ExperimentConfig, load, to_tree
from distill.draw import draw
from distill.files import write_json_atomically
from distill.head import DistillationHead, HeadTargets
from distill.losses import LossWeights
from distill.targets import SparseTargets
from distill.uniforms import row_uniforms
from scripts.sparse_kd.arms import ARMS, CAPTURES, Arm, one_hot, sparse_targets, uniform_tail
from scripts.sparse_kd.dense import dense_loss
from scripts.sparse_kd.gradients import compare, mean_angle
from scripts.sparse_kd.jobs import Job, all_jobs, do, pending_jobs, result_file
from scripts.sparse_kd.redraw import draw_again
from scripts.sparse_kd.report import MEASURES, arms, best_rate, estimate, report
from scripts.sparse_kd.store import Store, folder_of, prepare
from scripts.sparse_kd.students import new_student, shuffled
from tests.conftest import ConfigMaker, write_tiny_yaml
from tests.tiny_models import SCRATCH

ROWS, VOCAB = 6, 80
TINY = (*SCRATCH, "data.train_blocks=40", "data.block_length=16", "cache.blocks_per_shard=16")


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


def test_each_epoch_reads_every_block_once_in_an_order_of_its_own(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config("train.blocks_per_step=4")
    batches = shuffled(config, range(8, 20), seed=3, epochs=2)
    order = [block for batch in batches for block in batch]
    assert [len(batch) for batch in batches] == [4] * 6
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(8, 20))
    assert order[:12] != order[12:]
    assert shuffled(config, range(8, 20), seed=4) != batches[:3]


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, corpus: Path
) -> ExperimentConfig:
    """A filled store of 40 blocks; tests share it and what its jobs leave."""
    folder = tmp_path_factory.mktemp("sparse-kd")
    config = load(write_tiny_yaml(folder, tiny_teacher, corpus), TINY)
    prepare(config)
    return config


@pytest.mark.parametrize("kind", ["threshold_12", "sampled_5", "top_k_12"])
def test_caches_of_the_store_are_those_of_an_ordinary_capture(
    small: ExperimentConfig, tiny_config: ConfigMaker, tmp_path: Path, kind: str
) -> None:
    settings = [f"targets.{name}={value}" for name, value in to_tree(CAPTURES[kind]).items()]
    settings = [item for item in settings if item.rpartition("=")[2] not in ("None", "()", "[]")]
    kind_first = sorted(settings, key=lambda item: not item.startswith("targets.kind"))
    ordinary = tiny_config(*TINY, *kind_first, f"run_folder={tmp_path / 'ordinary'}")
    assert capture(ordinary)
    ours = open_cache(str(folder_of(small, kind, "train")))
    theirs = open_cache(ordinary.cache_folder("train"))
    assert len(ours) == len(theirs) == 40
    for block_id in range(40):
        mine, its = (cache.batch([block_id]) for cache in (ours, theirs))
        assert torch.equal(mine.input_ids_BT, its.input_ids_BT)
        assert torch.equal(mine.targets.ids_N, its.targets.ids_N)
        torch.testing.assert_close(mine.targets.weights_N, its.targets.weights_N)


def test_kept_hidden_states_give_the_teachers_distributions_again(
    small: ExperimentConfig,
) -> None:
    store = Store(small)
    for block_id in (0, 17, 39):
        targets = store.train("top_k_12").batch([block_id]).targets
        t_RV = store.teacher_logits(store.hidden("train", [block_id])).softmax(-1)
        assert t_RV.shape == (targets.num_rows, store.vocab_size)
        kept_N = t_RV[targets.row_of_entry(), targets.ids_N]
        torch.testing.assert_close(kept_N, targets.weights_N, atol=1e-3, rtol=0.04)  # 8-bit codes
        entropy_R = torch.special.entr(t_RV).sum(-1)
        torch.testing.assert_close(entropy_R, targets.entropy_R, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", ["threshold_12", "sampled_5"])
def test_draws_of_another_seed_are_those_of_a_capture_with_that_seed(
    small: ExperimentConfig, kind: str
) -> None:
    """The blocks are the same, so only uniform numbers differ."""
    store = Store(small)
    draw_again(store, 1)
    first, second = store.train(kind), store.train(kind, 1)
    assert (first.manifest.seed, second.manifest.seed) == (small.seed, small.seed + 1)
    assert store.train("top_k_5", 1).url == store.train("top_k_5").url
    drawn = 0
    for block_id in range(len(first)):
        block, _ = first.block(block_id)
        mask = torch.from_numpy(block.row_mask())
        logits_RV = store.teacher_logits(store.hidden("train", [block_id]))
        uniforms_R = row_uniforms(small.seed + 1, block_id, len(mask))[mask]
        expected = draw(logits_RV, uniforms_R, CAPTURES[kind])
        found, before = (cache.batch([block_id]).targets for cache in (second, first))
        assert torch.equal(found.ids_N, expected.ids_N)
        drawn += not torch.equal(found.ids_N, before.ids_N)
    assert drawn > len(first) // 2


def test_students_are_pretrained_on_blocks_that_no_teacher_and_no_other_seed_reads(
    small: ExperimentConfig,
) -> None:
    store = Store(small)
    taught = {bytes(store.train().block(n)[0].input_ids_T.tobytes()) for n in range(40)}
    rest = [store.rest([n]) for n in range(store.num_rest_blocks)]
    assert rest
    assert taught.isdisjoint(batch.input_ids_BT.int().numpy().tobytes() for batch in rest)
    for batch in rest:
        assert len(batch.labels_R) == int(batch.row_mask_BT.sum())


@pytest.fixture
def run(small: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[[Job], None]:
    """Does one job, in this process."""
    monkeypatch.setattr("scripts.sparse_kd.jobs.REPEATED_BLOCKS", 4)
    monkeypatch.setattr("scripts.sparse_kd.gradients.BATCH_BLOCKS", (1, 2))
    store = Store(small)

    def run_one(job: Job) -> None:
        write_json_atomically(result_file(small, job), do(store, job))

    return run_one


def test_jobs_fill_a_report_that_says_what_is_missing(
    small: ExperimentConfig, run: Callable[[Job], None], tmp_path: Path
) -> None:
    wanted = ["ce", "dense", "top_k_5_bucket", "top_k_12_uniform", "sampled_5"]
    for arm in wanted:
        run(Job("arm", 0, arm))
    run(Job("gradients", 0))
    run(Job("repeated", 0, "dense", 4))
    total = sum(map(len, all_jobs()))
    assert sum(map(len, pending_jobs(small))) == total - 7
    summary = report(small, tmp_path / "out")
    assert (summary["jobs_done"], summary["jobs"]) == (7, total)
    found = summary["arms"]
    assert found["sampled_5"]["above_dense_nats"]["mean"] == pytest.approx(
        found["sampled_5"]["ce_nats"]["mean"] - found["dense"]["ce_nats"]["mean"]
    )
    assert summary["train_tokens"] == [36 * 16]
    assert set(summary["gradients"]) == {
        name for name, arm in ARMS.items() if arm.rate == 1 and name != "dense"
    }
    threshold, truncated = (
        summary["gradients"][arm]["2"]["angle_degrees"]["mean"]
        for arm in ("threshold_25", "top_k_5_none")
    )
    assert threshold < truncated
    table = (tmp_path / "out" / "sparse_kd.md").read_text()
    assert f"{found['sampled_5']['ce_nats']['mean']:.3f}" in table
    with (tmp_path / "out" / "sparse_kd.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [run["arm"] for run in runs] == [*wanted, "dense", "dense"]
    assert [run["split"] for run in runs[-2:]] == ["held_out", "train"]
    assert float(runs[0]["ce_nats"]) == pytest.approx(found["ce"]["ce_nats"]["mean"], abs=1e-6)
    for name in ("loss", "angle", "repeated"):
        assert (tmp_path / "out" / f"sparse_kd_{name}.png").stat().st_size > 5_000


def test_the_gap_is_between_the_best_learning_rates() -> None:
    def run(*ce_nats: float) -> dict[int, dict[str, Any]]:
        values = dict.fromkeys(MEASURES, 0.5)
        return {
            seed: values | {"ce_nats": value, "ce_nats_by_block": [value - 0.1, value + 0.1]}
            for seed, value in enumerate(ce_nats)
        }

    runs = {
        "ce": run(5.0, 5.2),
        "ce_tenth_rate": run(4.0, 4.2),
        "dense": run(3.0, 3.2),
        "dense_third_rate": run(3.5, 3.6),
        "sampled_5": run(3.5, 3.7),
    }
    assert (best_rate(runs, "ce"), best_rate(runs, "dense")) == ("ce_tenth_rate", "dense")
    found = arms(runs)
    assert found["sampled_5"]["share_of_gap"]["mean"] == pytest.approx(0.5)
    assert found["ce"]["share_of_gap"]["mean"] == pytest.approx(-1)
    assert found["sampled_5"]["above_dense_nats"]["mean"] == pytest.approx(0.5)
    assert found["sampled_5"]["above_dense_nats"]["stderr_of_blocks"] == pytest.approx(0, abs=1e-9)
    assert "share_of_gap" not in found["ce_tenth_rate"]


def test_all_arms_begin_with_the_same_student_and_other_seeds_with_another(
    small: ExperimentConfig,
) -> None:
    store = Store(small)
    first, again, other = (new_student(store, seed).state_dict() for seed in (0, 0, 1))
    weight = "student.lm_head.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[weight], other[weight])


def test_estimate_is_mean_and_its_standard_error() -> None:
    assert estimate([1.0, 2.0, 3.0]) == {"mean": 2.0, "stderr": pytest.approx(3**-0.5), "n": 3}
    assert estimate([5.0]) == {"mean": 5.0, "stderr": None, "n": 1}
    assert estimate([]) == {"mean": None, "stderr": None, "n": 0}
