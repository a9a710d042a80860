"""Workers on one machine: real processes, really killed; the bytes are those of a single one."""

import json
import os
import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch

from distill.capture import _open_in_worker, capture, prepare
from distill.cli import main
from distill.errors import ConfigError, MismatchError, StorageError, TeacherError, WorkerError
from distill.progress import ShardProgress
from distill.workers import run_workers
from distill.workers.gpus import share_gpus
from distill.workers.protocol import Job, Reporter, Work
from tests.captures import (
    HELD_OUT_SHARDS,
    SMALL,
    TRAIN_SHARDS,
    Runs,
    are_gone,
    at_the_moment,
    capture_unbroken,
    kill_workers,
    local_workers,
    until,
)
from tests.conftest import ConfigMaker, poison
from tests.processes import cached

NUM_SHARDS = TRAIN_SHARDS + HELD_OUT_SHARDS
RECORDS = "*/shards/*.json"
EIGHT_JOBS = [Job("train", shard, 10) for shard in range(8)]


@pytest.fixture
def runs(tiny_yaml: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_yaml, tmp_path / "run")


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, corpus: Path
) -> dict[str, bytes]:
    return capture_unbroken(tmp_path_factory.mktemp("unbroken"), tiny_teacher, corpus)


@pytest.fixture
def small_config(tiny_config: ConfigMaker) -> ConfigMaker:
    """Two workers, many small shards."""
    return lambda *overrides: tiny_config(*SMALL, "capture.workers=2", *overrides)


def test_three_workers_write_the_bytes_of_one_and_leave_no_trace_of_themselves(
    tiny_config: ConfigMaker, written_cache: Path, tmp_path: Path
) -> None:
    assert capture(tiny_config("capture.workers=3", "capture.max_restarts=0"))
    assert cached(tmp_path / "run" / "cache") == cached(written_cache)
    for manifest in (tmp_path / "run" / "cache").glob("*/manifest.json"):
        assert not {"capture", "workers", "engine"} & set(json.loads(manifest.read_text()))
    assert capture(tiny_config("capture.workers=2"))  # all is there: nobody is started


def test_killed_worker_is_replaced_and_its_shards_are_written(
    small_config: ConfigMaker,
    runs: Runs,
    unbroken: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with at_the_moment(lambda: runs.num_files(RECORDS) >= 3, lambda: kill_workers(1)):
        assert capture(small_config())
    assert cached(runs.root) == unbroken
    log = capsys.readouterr().err
    assert "died: it was killed by SIGKILL" in log
    assert "Restart 1 of 3." in log
    last = log.splitlines()[-1]
    assert last.startswith("capture: 512 of 512 tokens (100%), ")
    assert f"  {NUM_SHARDS} of {NUM_SHARDS} shards, " in last
    assert last.endswith(" of 2 workers ready")


def test_too_many_deaths_are_an_error_that_keeps_what_is_finished(
    small_config: ConfigMaker, runs: Runs, unbroken: dict[str, bytes]
) -> None:
    message = (
        r"worker \d died: it was killed by SIGKILL.*It was death 2, and capture.max_restarts is 1\."
        r"\n  Shards it held: .*run the same command again"
    )
    with (
        pytest.raises(WorkerError, match=message),
        at_the_moment(lambda: runs.num_files(RECORDS) >= 2, lambda: kill_workers(2)),
    ):
        capture(small_config("capture.max_restarts=1"))
    assert not local_workers(os.getpid())
    finished = {name: data for name, data in cached(runs.root).items() if "shards" in name}
    assert 4 <= len(finished) < 2 * NUM_SHARDS
    assert finished.items() <= unbroken.items()
    assert capture(small_config())
    assert cached(runs.root) == unbroken


@pytest.mark.slow
def test_no_worker_outlives_a_driver_that_is_killed(runs: Runs, unbroken: dict[str, bytes]) -> None:
    driver = runs.start("capture.workers=2")
    runs.wait(driver, lambda: runs.num_files(RECORDS) >= 1)
    assert driver.pid is not None
    workers = local_workers(driver.pid)
    assert len(workers) == 2
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    until(lambda: are_gone(workers), seconds=5)
    assert "Traceback" not in runs.log
    runs.finish(runs.start())
    assert cached(runs.root) == unbroken


def test_ctrl_c_ends_all_workers_and_the_same_command_goes_on(
    tiny_yaml: Path, runs: Runs, unbroken: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cache", str(tiny_yaml), *SMALL, "capture.workers=2"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with at_the_moment(
            lambda: runs.num_files(RECORDS) >= 2, lambda: os.kill(os.getpid(), signal.SIGINT)
        ):
            assert main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not local_workers(os.getpid())
    assert "stopped; run the same command again to continue." in capsys.readouterr().err
    assert main(command) == 0
    assert cached(runs.root) == unbroken


def test_error_of_the_teacher_comes_through_at_once_and_as_it_is(
    tiny_config: ConfigMaker, own_teacher: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tiny_config(f"teacher.model={own_teacher}", "capture.workers=2")
    poison(own_teacher)
    with pytest.raises(TeacherError, match=rf"{own_teacher} gave NaN or infinite logits in block"):
        capture(config)
    assert "died" not in capsys.readouterr().err
    assert not list((tmp_path / "run" / "cache").glob(RECORDS))


def test_worker_whose_machine_holds_another_teacher_refuses(
    tiny_config: ConfigMaker, own_teacher: Path
) -> None:
    config = tiny_config(f"teacher.model={own_teacher}")
    manifests = prepare(config)
    poison(own_teacher, row=0)
    with pytest.raises(MismatchError, match=r"teacher\.weights"):
        _open_in_worker(config, manifests)


@pytest.mark.parametrize("own", ["capture.workers=2", "capture.engine=ray"])
def test_independent_worker_starts_no_workers_of_its_own(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    assert main(["cache", str(tiny_yaml), "--worker", "1/4", own]) == 2
    err = capsys.readouterr().err
    assert "ConfigError: --worker 1/4 is one of several independent workers" in err
    assert own in err


# Works that know nothing of teachers, for what is hard to bring about with one.


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
