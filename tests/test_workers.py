"""Workers on one machine: real processes, really killed; the bytes are those of a single one."""

import json
import os
import signal
from pathlib import Path

import pytest

from distill.capture import _open_in_worker, capture, prepare
from distill.cli import main
from distill.errors import MismatchError, TeacherError, WorkerError
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
