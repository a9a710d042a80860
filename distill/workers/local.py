"""Workers as processes of this machine, each with its own GPUs and its share of the CPU threads.

A fork server starts them, which holds nothing of ours: the threads of torch and a device in use do
not survive a fork of the driver. Each worker leads a process group, so that Ctrl-C reaches the
driver alone and a worker's helpers end with it; and it watches the driver, which it never outlives.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NoReturn

from distill.config import ExperimentConfig
from distill.errors import DistillError
from distill.workers.gpus import require_unpinned, share_gpus
from distill.workers.protocol import Answer, Died, Event, Failed, Stop, serve

_PROCESSES = multiprocessing.get_context("forkserver")
_LAST_SECONDS = 10.0
"""That a worker has to end by itself, once told to stop or once its line is closed."""


class LocalEngine:
    """Starts workers and talks with them over pipes."""

    def __init__(self, config: ExperimentConfig, num_workers: int, open_work: bytes) -> None:
        import torch

        require_unpinned(config)
        self._environments = share_gpus(config, num_workers)
        threads = config.capture.cpus_per_worker
        self._num_threads = threads or max(1, torch.get_num_threads() // num_workers)
        self._open_work = open_work
        self._processes: dict[int, BaseProcess] = {}
        self._lines: dict[int, Connection] = {}
        self._stopped: set[int] = set()

    def start(self, worker: int) -> None:
        """See `Engine`."""
        ours, theirs = _PROCESSES.Pipe()
        process = _PROCESSES.Process(
            target=_main,
            args=(theirs, self._environments[worker], self._num_threads, self._open_work),
            name=f"distill worker {worker}",
        )
        with _sigint_blocked():
            process.start()
        theirs.close()
        self._processes[worker], self._lines[worker] = process, ours

    def reply(self, worker: int, answer: Answer) -> None:
        """See `Engine`."""
        if isinstance(answer, Stop):
            self._stopped.add(worker)
        with suppress(BrokenPipeError, ConnectionResetError):  # wait() will tell that it died
            self._lines[worker].send(answer)

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        """See `Engine`."""
        ready = wait(self._lines.values(), seconds)
        return [
            (worker, self._receive(worker))
            for worker, line in list(self._lines.items())
            if line in ready
        ]

    def close(self) -> None:
        """See `Engine`."""
        deadline = time.monotonic() + _LAST_SECONDS
        for worker in list(self._processes):
            is_ending = worker in self._stopped
            self._bury(worker, max(0.0, deadline - time.monotonic()) if is_ending else 0.0)

    def _receive(self, worker: int) -> Event:
        try:
            event: Event = self._lines[worker].recv()
        except (EOFError, ConnectionResetError):
            return Died(_explain_exit(self._bury(worker)))
        if isinstance(event, Died):
            self._bury(worker)
        return event

    def _bury(self, worker: int, last_seconds: float = _LAST_SECONDS) -> int | None:
        """End a worker with all its helpers; return its exit code."""
        process, line = self._processes.pop(worker), self._lines.pop(worker)
        wait([process.sentinel], last_seconds)  # it may be ending by itself, with a code that tells
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        code = process.exitcode
        process.close()
        line.close()
        return code


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Children inherit the mask: Ctrl-C must not reach one before it has its own group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _explain_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with exit code {code} in the middle of its work"
    name = signal.Signals(-code).name
    hint = " (for lack of memory, perhaps)" if name == "SIGKILL" else ""
    return f"it was killed by {name}{hint}"


class _Line:
    """The worker's end of its pipe. Where nobody is at the other, the worker has to go, too."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, event: Event) -> None:
        try:
            with self._lock:
                self._connection.send(event)
        except (BrokenPipeError, ConnectionResetError):
            _end_group()

    def receive(self) -> Answer:
        try:
            answer: Answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            _end_group()
        return answer


def _main(
    connection: Connection, environment: dict[str, str], num_threads: int, open_work: bytes
) -> None:
    """In the new process: become a worker. What may import torch comes after the environment."""
    os.setpgid(0, 0)
    threading.Thread(target=_die_with_driver, daemon=True).start()
    os.environ.update(environment, OMP_NUM_THREADS=str(num_threads))
    import torch

    torch.set_num_threads(num_threads)
    line = _Line(connection)
    try:
        serve(line, pickle.loads(open_work))
    except DistillError as error:
        line.send(Failed(error))
    except Exception as error:
        line.send(Died(f"{type(error).__name__}: {error}"))
        raise


def _die_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    _end_group()


def _end_group() -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("a process survived SIGKILL")
