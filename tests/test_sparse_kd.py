"""The reproduction of sparse logit sampling compares what it says it compares."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache.reader import open_cache
from distill.capture import capture
from distill.config import ExperimentConfig, load, to_tree
from distill.draw import draw
from distill.files import write_json_atomically
from distill.uniforms import row_uniforms
from scripts.sparse_kd.arms import ARMS, CAPTURES
from scripts.sparse_kd.jobs import Job, all_jobs, do, pending_jobs, result_file
from scripts.sparse_kd.redraw import draw_again
from scripts.sparse_kd.report import MEASURES, arms, best_rate, estimate, report
from scripts.sparse_kd.store import Store, folder_of, prepare
from scripts.sparse_kd.students import new_student, shuffled
from tests.conftest import ConfigMaker, write_tiny_yaml
from tests.tiny_models import SCRATCH

TINY = (*SCRATCH, "data.train_blocks=40", "data.block_length=16", "cache.blocks_per_shard=16")


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
    stages = all_jobs()
    total = sum(map(len, stages))
    assert sum(map(len, pending_jobs(small, stages))) == total - 7
    summary = report(small, stages, tmp_path / "out" / "kd")
    assert (summary["jobs_done"], summary["jobs"]) == (7, total)
    found = summary["arms"]
    assert found["sampled_5"]["above_dense_nats"]["mean"] == pytest.approx(
        found["sampled_5"]["ce_nats"]["mean"] - found["dense"]["ce_nats"]["mean"]
    )
    assert summary["train_tokens"] == [36 * 16]
    assert summary["data"] == Store(small).train().manifest.data
    assert set(summary["gradients"]) == {
        name for name, arm in ARMS.items() if arm.rate == 1 and name != "dense"
    }
    threshold, truncated = (
        summary["gradients"][arm]["2"]["angle_degrees"]["mean"]
        for arm in ("threshold_25", "top_k_5_none")
    )
    assert threshold < truncated
    table = (tmp_path / "out" / "kd.md").read_text()
    assert f"{found['sampled_5']['ce_nats']['mean']:.3f}" in table
    with (tmp_path / "out" / "kd.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [run["arm"] for run in runs] == [*wanted, "dense", "dense"]
    assert [run["split"] for run in runs[-2:]] == ["held_out", "train"]
    assert float(runs[0]["ce_nats"]) == pytest.approx(found["ce"]["ce_nats"]["mean"], abs=1e-6)
    for name in ("arms", "gradients", "repeated"):
        assert (tmp_path / "out" / f"kd_{name}.png").stat().st_size > 5_000


def test_named_arms_are_all_that_is_trained_and_reported(
    small: ExperimentConfig, run: Callable[[Job], None], tmp_path: Path
) -> None:
    stages = all_jobs(["ce", "threshold_5"])
    assert {job.arm for stage in stages for job in stage} == {"", "ce", "threshold_5"}
    run(Job("arm", 0, "threshold_5"))
    run(Job("arm", 0, "threshold_12"))
    summary = report(small, stages, tmp_path / "kd")
    assert "threshold_5" in summary["arms"]
    assert "threshold_12" not in summary["arms"]
    assert {path.name for path in tmp_path.iterdir()} >= {"kd.json", "kd.csv", "kd_arms.png"}
    assert not list(tmp_path.glob("kd_gradients.png"))


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
