"""Workers as actors of a Ray cluster: Ray places them, gives them GPUs, and tells when one dies.

Messages go through one more actor beside the driver, the mailbox, so that a worker can do its work
in its main thread, as engines with processes of their own want it.
"""

import asyncio
import os
import pickle
import platform
import re
import socket
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.config import ExperimentConfig
from distill.errors import ConfigError, DistillError, WorkerError
from distill.workers.gpus import require_unpinned, teacher_gpus
from distill.workers.protocol import Answer, Died, Event, Failed, Stop, serve

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise ConfigError(
        "capture.engine: ray needs the package ray: pip install 'distill-llm[ray]'\n"
        "  Without it, capture.engine=local and distill cache --worker I/N spread the work."
    ) from None

_LAST_SECONDS = 10.0
"""That workers have to end by themselves, once told to stop."""


class RayEngine:
    """Starts actors and talks with them through the mailbox."""

    def __init__(self, config: ExperimentConfig, num_workers: int, open_work: bytes) -> None:
        require_unpinned(config)
        self._owns_connection = not ray.is_initialized()
        if self._owns_connection:
            _connect(config.capture.ray_address)
        self._num_cpus = config.capture.cpus_per_worker or 1
        self._num_gpus = teacher_gpus(config)
        if config.capture.gpus_per_worker is None and not ray.cluster_resources().get("GPU"):
            self._num_gpus = 0
        try:
            self._require_room(num_workers)
        except ConfigError:
            self._disconnect()
            raise
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here)
        self._mailbox = mailbox.remote()
        self._open_work = ray.put(open_work)
        self._actors: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}
        """What `_Worker.run` will return, and of which worker."""
        self._addresses: dict[int, int] = {}
        """In the mailbox; of each start, so that nobody reads the post of the dead."""
        self._num_starts = 0
        self._post = self._mailbox.collect.remote()
        self._stopped: set[int] = set()

    def start(self, worker: int) -> None:
        """See `Engine`."""
        actor = ray.remote(_Worker).options(
            num_cpus=self._num_cpus, num_gpus=self._num_gpus, max_restarts=0
        )
        self._num_starts += 1
        address = self._addresses[worker] = self._num_starts
        self._actors[worker] = actor.remote()
        line = _Line(self._mailbox, address)
        run = self._actors[worker].run.remote(
            line, str(Path.cwd()), self._num_cpus, self._open_work
        )
        self._runs[run] = worker

    def reply(self, worker: int, answer: Answer) -> None:
        """See `Engine`."""
        if isinstance(answer, Stop):
            self._stopped.add(worker)
        self._mailbox.reply.remote(self._addresses[worker], answer)

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        """See `Engine`."""
        ready, _ = ray.wait([self._post, *self._runs], num_returns=1, timeout=seconds)
        events: list[tuple[int, Event]] = []
        if self._post in ready:
            workers = {address: worker for worker, address in self._addresses.items()}
            events = [(workers[at], event) for at, event in self._collect() if at in workers]
        for run in ready:
            if run in self._runs:
                worker = self._runs.pop(run)
                del self._addresses[worker]
                events.append((worker, _explain_end(run)))
        return events

    def close(self) -> None:
        """See `Engine`."""
        ending = [run for run, worker in self._runs.items() if worker in self._stopped]
        with suppress(RayError):
            if ending:
                ray.wait(ending, num_returns=len(ending), timeout=_LAST_SECONDS)
        for actor in [*self._actors.values(), self._mailbox]:
            ray.kill(actor)
        self._disconnect()

    def _collect(self) -> list[tuple[int, Event]]:
        try:
            post: list[tuple[int, Event]] = ray.get(self._post)
        except RayError as error:
            raise WorkerError(
                f"the Ray actor beside the driver died: {_first_line(error)}\n"
                "  Finished shards are safe: run the same command again."
            ) from None
        self._post = self._mailbox.collect.remote()
        return post

    def _require_room(self, num_workers: int) -> None:
        """Refuse what Ray would wait for without end.

        Raises:
            ConfigError: the nodes hold fewer workers than asked for.
        """
        room, found = 0, []
        for node in ray.nodes():
            if node["Alive"]:
                cpus, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
                found.append(f"{cpus} CPUs and {gpus} GPUs")
                places = [cpus // self._num_cpus]
                places += [gpus // self._num_gpus] if self._num_gpus else []
                room += min(places)
        if room < num_workers:
            raise ConfigError(
                f"capture.workers is {num_workers}, each with {self._num_cpus} CPUs and "
                f"{self._num_gpus} GPUs, but the Ray cluster has room for {room}.\n"
                f"  Its nodes have {'; '.join(found)}. Add nodes, or change capture.workers, "
                "capture.cpus_per_worker or capture.gpus_per_worker."
            )

    def _disconnect(self) -> None:
        if self._owns_connection:
            ray.shutdown()


def _connect(address: str | None) -> None:
    """Join a cluster, or start one of this machine; Ray's own messages stay in its log files.

    Raises:
        ConfigError: there is no cluster.
    """
    if address == "local":
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a capture tells nobody that it runs
        ray.init("local", include_dashboard=False, logging_level="error", log_to_driver=False)
        return
    if address is not None:
        _require_listener(address)
    try:
        ray.init(address or "auto", logging_level="error", log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(
            f"capture.ray_address: there is no Ray cluster at {address or 'hand'}: "
            f"{_first_line(error)}\n  Start one (ray start --head), name another, or let "
            "capture.ray_address=local start one for this capture."
        ) from None


def _require_listener(address: str) -> None:
    """Refuse an address where nobody listens; Ray would try for two minutes."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise ConfigError(
            f"capture.ray_address: expected HOST:PORT (as ray start shows it) or local, "
            f"found {address!r}."
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"capture.ray_address: nothing answers at {address}: {error}.\n  Is the head node of "
            "the Ray cluster up (ray status)?"
        ) from None


def _explain_end(run: Any) -> Event:
    try:
        ray.get(run)
    except RayTaskError as error:
        if isinstance(error.cause, DistillError):
            return Failed(error.cause)
        return Died(f"{type(error.cause).__name__}: {error.cause}")
    except RayError as error:
        return Died(_explain_death(error))
    return Died("it ended in the middle of its work")


def _explain_death(error: RayError) -> str:
    """What happened to the process, of the many lines in which Ray says it."""
    told = re.search(r"Worker exit type: (.*?)(?: Some common causes|\n|$)", str(error))
    return f"its process is gone ({told[1].rstrip('.')})" if told else _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class _Mailbox:
    """Keeps messages until they are fetched; every wait is without end."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._answers: defaultdict[int, asyncio.Queue[Answer]] = defaultdict(asyncio.Queue)

    async def post(self, address: int, event: Event) -> None:
        self._events.put_nowait((address, event))

    async def collect(self) -> list[tuple[int, Event]]:
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events

    async def reply(self, address: int, answer: Answer) -> None:
        self._answers[address].put_nowait(answer)

    async def receive(self, address: int) -> Answer:
        return await self._answers[address].get()


class _Line:
    """The worker's way to the mailbox."""

    def __init__(self, mailbox: Any, address: int) -> None:
        self._mailbox, self._address = mailbox, address

    def send(self, event: Event) -> None:
        ray.get(self._mailbox.post.remote(self._address, event))  # waits, to keep the order

    def receive(self) -> Answer:
        answer: Answer = ray.get(self._mailbox.receive.remote(self._address))
        return answer


class _Worker:
    """The actor."""

    def run(self, line: _Line, folder: str, num_threads: int, open_work: bytes) -> None:
        if not Path(folder).is_dir():
            raise ConfigError(
                f"the node {platform.node()} of the Ray cluster does not see the folder {folder}.\n"
                "  Start the capture in a folder that all nodes share: relative names in the "
                "config are meant from there."
            )
        os.chdir(folder)
        import torch

        torch.set_num_threads(num_threads)
        serve(line, pickle.loads(open_work))
