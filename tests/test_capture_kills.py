"""Captures that are killed, stopped, lost or started twice: the bytes stay those of a quiet one."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from distill.cache.inspect import find_faults
from distill.cache.reader import open_cache
from distill.errors import CacheError
from tests.captures import HELD_OUT_SHARDS, TRAIN_SHARDS, Runs, capture_unbroken
from tests.processes import cached

pytestmark = pytest.mark.slow

NUM_KILLS = 50


@pytest.fixture
def runs(tiny_yaml: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_yaml, tmp_path / "run")


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, corpus: Path
) -> dict[str, bytes]:
    return capture_unbroken(tmp_path_factory.mktemp("unbroken"), tiny_teacher, corpus)


def test_fifty_kills_at_random_moments_change_no_byte(
    runs: Runs, unbroken: dict[str, bytes]
) -> None:
    moments, kills, rounds = random.Random(0), 0, 0
    begin = time.monotonic()
    runs.finish(runs.start())
    whole_seconds = time.monotonic() - begin
    while kills < NUM_KILLS:
        shutil.rmtree(runs.root)
        is_complete = False
        while not is_complete:
            process = runs.start()
            process.join(moments.uniform(0, 0.7 * whole_seconds))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), runs.log
            is_complete = process.exitcode == 0
            kills += not is_complete
            if not is_complete:
                require_nothing_wrong_is_believed(runs, unbroken)
        assert cached(runs.root) == unbroken
        rounds += 1
    assert rounds > 1


def require_nothing_wrong_is_believed(runs: Runs, unbroken: dict[str, bytes]) -> None:
    """Whatever has its final name is whole, and a cache without its index is refused as such."""
    for name, data in cached(runs.root).items():
        assert "/blocks/" in name or data == unbroken[name], name
    for split in ("train", "held_out"):
        is_complete = (runs.root / split / "index.json").exists()
        assert any(find_faults(str(runs.root / split))) != is_complete


def test_two_captures_of_the_same_share_at_once_end_with_the_same_bytes(
    runs: Runs, unbroken: dict[str, bytes]
) -> None:
    moments = random.Random(1)
    for latest_seconds in (0, 0.2, 0.5):
        first = runs.start()
        first.join(moments.uniform(0, latest_seconds))
        second = runs.start()
        for process in (first, second):
            runs.finish(process)
        assert cached(runs.root) == unbroken
        shutil.rmtree(runs.root)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*/blocks/*.parquet", TRAIN_SHARDS + HELD_OUT_SHARDS),
        ("held_out/shards/*.parquet", HELD_OUT_SHARDS // 2),
        ("train/shards/*.json", TRAIN_SHARDS - 1),
    ],
)
def test_worker_that_sleeps_while_another_finishes_does_no_harm(
    runs: Runs, unbroken: dict[str, bytes], pattern: str, count: int
) -> None:
    sleeper = sleep_through_a_capture(runs, lambda: runs.num_files(pattern) >= count)
    runs.finish(sleeper)
    assert cached(runs.root) == unbroken


def sleep_through_a_capture(runs: Runs, moment: Callable[[], bool]) -> BaseProcess:
    """Return a worker that was stopped at that moment, and woken when another had finished."""
    sleeper = runs.start()
    runs.wait(sleeper, moment)
    assert sleeper.pid is not None
    os.kill(sleeper.pid, signal.SIGSTOP)
    runs.finish(runs.start())
    assert runs.num_files("*/index.json") == 2
    os.kill(sleeper.pid, signal.SIGCONT)
    return sleeper


def test_worker_that_sleeps_while_packing_leaves_a_cache_that_the_next_start_finds_right(
    runs: Runs, unbroken: dict[str, bytes]
) -> None:
    half = TRAIN_SHARDS // 2
    sleeper = sleep_through_a_capture(
        runs, lambda: runs.num_files("train/blocks/*.parquet") >= half
    )
    # The other removed blocks/ when it was done, and with it what the sleeper was writing there.
    runs.finish(sleeper)
    assert not any(find_faults(str(runs.root / "train")))
    runs.finish(runs.start())
    assert cached(runs.root) == unbroken


def test_shards_of_a_lost_worker_are_taken_over(runs: Runs, unbroken: dict[str, bytes]) -> None:
    lost = runs.start("--worker", "0/2")
    runs.wait(lost, lambda: runs.num_files("train/shards/*.json") >= 3)
    lost.kill()
    lost.join()
    assert lost.exitcode == -signal.SIGKILL
    runs.finish(runs.start("--worker", "1/2"))
    odd = range(1, TRAIN_SHARDS, 2)
    assert all((runs.root / f"train/shards/{shard:05d}.json").exists() for shard in odd)
    with pytest.raises(CacheError, match=r"is incomplete: (9|1[01]) of 12 shards are there"):
        open_cache(str(runs.root / "train"))
    runs.finish(runs.start())
    assert cached(runs.root) == unbroken
