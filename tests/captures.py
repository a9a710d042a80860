"""Captures in small shards and processes of their own, to be killed in the middle."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread

import psutil

from tests.conftest import folder_bytes, write_tiny_yaml
from tests.processes import start

TRAIN_SHARDS, HELD_OUT_SHARDS = 12, 4
SMALL = [
    f"data.train_blocks={TRAIN_SHARDS}",
    f"data.held_out_blocks={HELD_OUT_SHARDS}",
    "cache.blocks_per_shard=1",
    "teacher.head_chunk_tokens=1",
]


@dataclass(frozen=True)
class Runs:
    """Starts captures of one experiment in small shards; all write to the same folder."""

    yaml: Path
    run_folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The caches."""
        return self.run_folder / "cache"

    @property
    def log(self) -> str:
        """What the last capture said."""
        return self.yaml.with_name("log").read_text()

    def start(self, *arguments: str) -> BaseProcess:
        """Start a capture and return as soon as it has read its settings."""
        (self.run_folder / "config.json").unlink(missing_ok=True)
        command = ["cache", str(self.yaml), f"run_folder={self.run_folder}", *SMALL, *arguments]
        log = self.yaml.with_name("log")
        process = start(command, log, environment=self.environment)
        self.wait(process, lambda: (self.run_folder / "config.json").exists())
        return process

    def wait(self, process: BaseProcess, holds: Callable[[], bool]) -> None:
        while process.is_alive() and not holds():
            time.sleep(0.0005)

    def finish(self, process: BaseProcess) -> None:
        process.join()
        assert process.exitcode == 0, self.log

    def num_files(self, pattern: str) -> int:
        return sum(1 for _ in self.root.glob(pattern))


def capture_unbroken(folder: Path, teacher: Path, corpus: Path) -> dict[str, bytes]:
    """Return what a capture that nobody disturbs leaves."""
    quiet = Runs(write_tiny_yaml(folder, teacher, corpus), folder / "run")
    quiet.finish(quiet.start())
    return dict(folder_bytes(quiet.root))


def local_workers(driver_pid: int) -> list[psutil.Process]:
    """Workers of a driver: below its fork server, each at the head of a process group."""
    below = psutil.Process(driver_pid).children(recursive=True)
    return [process for process in below if _group(process.pid) == process.pid]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@contextmanager
def at_the_moment(moment: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Let a thread act while the body runs; the moment has to come before the body ends."""
    has_ended = Event()

    def wait() -> None:
        while not moment():
            if has_ended.wait(0.0005):
                return
        act()

    thread = Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def kill_workers(count: int) -> None:
    """Kill so many workers of this process."""
    for worker in local_workers(os.getpid())[:count]:
        worker.kill()


def are_gone(processes: list[psutil.Process]) -> bool:
    """Whether all have ended, be it that nobody has asked for their exit code yet."""
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what must come."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
