"""The driver of workers, with works that know nothing of teachers: what is hard to bring about."""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch

from distill.capture import capture
from distill.errors import ConfigError, StorageError, WorkerError
from distill.progress import ShardProgress
from distill.workers import run_workers
from distill.workers.gpus import share_gpus
from distill.workers.protocol import Job, Reporter, Work
from tests.captures import until
from tests.conftest import ConfigMaker

EIGHT_JOBS = [Job("train", shard, 10) for shard in range(8)]


def mark(folder: Path, job: Job) -> None:
    (folder / f"{job.shard}").write_text(f"{os.getpid()} {torch.get_num_threads()}")


def marks(folder: Path) -> dict[int, list[int]]:
    """Shard -> process and number of threads."""
    return {
        int(path.name): [int(word) for word in path.read_text().split()]
        for path in folder.iterdir()
        if path.name.isdigit()
    }


def open_plain(folder: Path) -> Work:
    def work(jobs: Iterable[Job], reporter: Reporter) -> None:
        for job in jobs:
            reporter.scored(job.num_tokens)
            mark(folder, job)
            reporter.published(job)

    return work


def open_far_sighted(folder: Path) -> Work:
    """Takes all jobs that it gets before it does one; the first to hold three dies of it."""

    def work(jobs: Iterable[Job], reporter: Reporter) -> None:
        held = []
        for job in jobs:
            held.append(job)
            reporter.scored(job.num_tokens // 2)
            if len(held) == 3 and not (folder / "died").exists():
                (folder / "died").write_text("")
                os._exit(7)
        for job in held:
            reporter.scored(job.num_tokens - job.num_tokens // 2)
            mark(folder, job)
            reporter.published(job)

    return work


def open_last_breath(folder: Path) -> Work:
    """The first to take shard 0 holds it until the other has done the rest, and dies."""

    def work(jobs: Iterable[Job], reporter: Reporter) -> None:
        for job in jobs:
            if job.shard == 0 and not (folder / "died").exists():
                until(lambda: len(marks(folder)) == len(EIGHT_JOBS) - 1)
                (folder / "died").write_text("")
                os._exit(7)
            mark(folder, job)
            reporter.published(job)

    return work


def open_forgetful() -> Work:
    return lambda jobs, _: list(jobs).clear()


def open_failing(error: Exception) -> Work:
    raise error


class Counted(ShardProgress):
    """Eight jobs of ten tokens."""

    def __init__(self) -> None:
        super().__init__("t", total_tokens=80, done_tokens=0, total_shards=8, done_shards=0)

    @property
    def counts(self) -> tuple[int, int]:
        return self._count, self._done_shards


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_every_job_is_done_once_with_an_equal_share_of_the_threads(
    tiny_config: ConfigMaker, tmp_path: Path, workers: int
) -> None:
    config = tiny_config(f"capture.workers={workers}", "capture.cpus_per_worker=2")
    (folder := tmp_path / "marks").mkdir()
    run_workers(config, partial(open_plain, folder), EIGHT_JOBS, progress := Counted())
    assert sorted(marks(folder)) == list(range(8))
    assert {threads for _, threads in marks(folder).values()} == {2}
    assert progress.counts == (80, 8)


def test_jobs_of_a_worker_that_took_many_ahead_are_done_and_counted_once(
    tiny_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "marks").mkdir()
    config = tiny_config("capture.workers=2")
    run_workers(config, partial(open_far_sighted, folder), EIGHT_JOBS, progress := Counted())
    assert sorted(marks(folder)) == list(range(8))
    assert progress.counts == (80, 8)
    assert "died: it ended with exit code 7 in the middle of its work" in capsys.readouterr().err


def test_idle_worker_takes_up_what_a_dead_one_leaves(
    tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    (folder := tmp_path / "marks").mkdir()
    config = tiny_config("capture.workers=2")
    run_workers(config, partial(open_last_breath, folder), EIGHT_JOBS, Counted())
    assert len({process for process, _ in marks(folder).values()}) == 1


def test_broken_program_of_a_worker_is_named_when_restarts_do_not_help(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config("capture.max_restarts=2", "capture.workers=2")
    message = r"worker \d died: KeyError: 'where'. It was death 3, and capture.max_restarts is 2.\n"
    with pytest.raises(WorkerError, match=message):
        run_workers(config, partial(open_failing, KeyError("where")), EIGHT_JOBS, Counted())


def test_work_that_loses_a_job_is_found_out(tiny_config: ConfigMaker) -> None:
    with pytest.raises(WorkerError, match="AssertionError: the work did not publish all its jobs"):
        run_workers(tiny_config("capture.max_restarts=0"), open_forgetful, EIGHT_JOBS, Counted())


def test_full_disk_of_a_worker_is_not_met_with_restarts(
    tiny_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    full = StorageError("cannot write x: no space is left on the device.")
    with pytest.raises(StorageError, match=r"^cannot write x: no space is left on the device\.$"):
        run_workers(tiny_config(), partial(open_failing, full), EIGHT_JOBS, Counted())
    assert "died" not in capsys.readouterr().err


def test_gpus_are_dealt_out_of_those_that_are_visible(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")

    def shares(num_workers: int, *overrides: str) -> list[str | None]:
        config = tiny_config("teacher.device=null", *overrides)
        return [e.get("CUDA_VISIBLE_DEVICES") for e in share_gpus(config, num_workers)]

    assert shares(3) == ["4", "5", "6"]
    assert shares(2, "capture.gpus_per_worker=2") == ["4,5", "6,7"]
    assert shares(9, "capture.gpus_per_worker=0") == shares(9, "teacher.device=cpu") == [None] * 9
    vllm = "teacher={kind: vllm, model: m, tensor_parallel_size: 2, pipeline_parallel_size: 2}"
    config = tiny_config(vllm)
    assert share_gpus(config, 1) == [{"CUDA_VISIBLE_DEVICES": "4,5,6,7"}]
    with pytest.raises(ConfigError, match="is 2 with 4 GPUs each, but this machine shows 4"):
        share_gpus(config, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert shares(2) == ["0", "1"]


def test_teacher_bound_to_one_gpu_is_not_shared_out(tiny_config: ConfigMaker) -> None:
    config = tiny_config("capture.workers=2", "teacher.device=cuda:1")
    with pytest.raises(ConfigError, match=r"teacher\.device is cuda:1, but capture gives each"):
        capture(config)


def test_gpus_that_are_not_there_are_refused(tiny_config: ConfigMaker) -> None:
    config = tiny_config("capture.workers=2", "capture.gpus_per_worker=64")
    with pytest.raises(ConfigError, match="with 64 GPUs each, but this machine shows"):
        capture(config)
