"""The command line in processes of its own, forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from distill.cli import main
from tests.conftest import folder_bytes

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["datasets", "distill.cli", "distill.capture", "distill.train", "students", "tests.conftest"]
)


class ShardingAccelerator(Accelerator):  # type: ignore[misc]
    """FSDP2 on a CPU, where Accelerate leaves it out without a word and replicates."""

    def __init__(self, **options: Any) -> None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="SHARDED_STATE_DICT",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=True,
        )
        super().__init__(fsdp_plugin=plugin, **options)
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin


def run_verb(
    arguments: list[str],
    log: Path,
    largest_file_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """In a process of its own: the command line, with its messages in a file."""
    os.environ.update(environment or {})
    if os.environ.get("SHARDED_BY_TESTS"):
        sys.modules["distill.launch"].Accelerator = ShardingAccelerator  # type: ignore[attr-defined]
    if largest_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    with log.open("w") as file, contextlib.redirect_stderr(file):
        code = main(arguments)
    raise SystemExit(code)


def start(
    arguments: list[str],
    log: Path,
    largest_file_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a command; the fork server knows no environment but the one it was started in."""
    process = PROCESSES.Process(
        target=run_verb, args=(arguments, log, largest_file_bytes, environment)
    )
    process.start()
    return process


class Ranks:
    """One command by several processes that know of each other, as torchrun starts them."""

    def __init__(
        self, arguments: list[str], log: Path, num_processes: int, *, sharded: bool = False
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SHARDED_BY_TESTS": "1" if sharded else "",
        }
        alone = {"SHARDED_BY_TESTS": ""}
        self.logs = [log.with_suffix(f".{rank}.log") for rank in range(num_processes)]
        self.processes = [
            start(
                arguments,
                file,
                environment=alone
                if num_processes == 1
                else shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, file in enumerate(self.logs)
        ]

    @property
    def are_running(self) -> bool:
        """Whether none has ended."""
        return all(process.is_alive() for process in self.processes)

    def finish(self) -> None:
        """Wait until all are done, and well."""
        for process in self.processes:
            process.join()
        codes = [process.exitcode for process in self.processes]
        assert set(codes) == {0}, f"{codes}\n" + "\n".join(log.read_text() for log in self.logs)

    def kill(self) -> None:
        """End all of them at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def cached(root: Path) -> dict[str, bytes]:
    """Every file of both caches; what a killed process left unfinished does not count."""
    return {name: data for name, data in folder_bytes(root) if not name.endswith(".tmp")}
