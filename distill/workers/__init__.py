"""Workers that share out the shards of a capture: queue, bookkeeping and one view of progress.

Engines start the workers: `local` as processes of this machine, `ray` as actors on a cluster.
"""

import pickle
from collections import Counter, deque
from collections.abc import Sequence

from distill.config import ExperimentConfig
from distill.errors import WorkerError
from distill.progress import ShardProgress
from distill.workers.protocol import (
    Asked,
    Died,
    Engine,
    Event,
    Failed,
    Job,
    OpenWork,
    Pause,
    Published,
    Scored,
    Stop,
)

_WAIT_SECONDS = 0.5
"""After which the view of progress is refreshed although no worker said anything."""


def run_workers(
    config: ExperimentConfig, open_work: OpenWork, jobs: Sequence[Job], progress: ShardProgress
) -> None:
    """Do all jobs with `capture.workers` workers; return when the last is published.

    Args:
        config: The experiment.
        open_work: Run by each worker when it starts; must pickle.
        jobs: Handed out in this order, one at a time.
        progress: Is told the tokens and shards of all workers.

    Raises:
        ConfigError: this machine or cluster has no room for the workers.
        DistillError: what a worker raised, as it is.
        WorkerError: more workers died than `capture.max_restarts`.
    """
    settings = config.capture
    num_workers = min(settings.workers, len(jobs))
    engine = _open_engine(config, num_workers, pickle.dumps(open_work))
    try:
        _Driver(engine, jobs, progress, settings.max_restarts).run(num_workers)
    finally:
        engine.close()


def _open_engine(config: ExperimentConfig, num_workers: int, open_work: bytes) -> Engine:
    if config.capture.engine == "ray":
        from distill.workers.ray import RayEngine

        return RayEngine(config, num_workers, open_work)
    from distill.workers.local import LocalEngine

    return LocalEngine(config, num_workers, open_work)


class _Driver:
    """Knows who holds which jobs; gives those of the dead to the living."""

    def __init__(
        self, engine: Engine, jobs: Sequence[Job], progress: ShardProgress, max_restarts: int
    ) -> None:
        self._engine, self._progress, self._max_restarts = engine, progress, max_restarts
        self._queue = deque(jobs)
        self._held: dict[int, list[Job]] = {}
        self._unpublished: Counter[int] = Counter()
        """Tokens that a worker has scored and that are in no published shard yet."""
        self._waiting: set[int] = set()
        self._loading: set[int] = set()
        self._num_deaths = 0

    def run(self, num_workers: int) -> None:
        for worker in range(num_workers):
            self._start(worker)
        while self._queue or any(self._held.values()):
            for worker, event in self._engine.wait(_WAIT_SECONDS):
                self._take(worker, event)
            self._answer()
            ready = num_workers - len(self._loading)
            self._progress.tick(f"{ready} of {num_workers} workers ready")
        for worker in self._waiting:
            self._engine.reply(worker, Stop())

    def _start(self, worker: int) -> None:
        self._held[worker] = []
        self._loading.add(worker)
        self._engine.start(worker)

    def _take(self, worker: int, event: Event) -> None:
        match event:
            case Asked():
                if len(self._loading) == len(self._held):
                    self._progress.restart_clock()  # the first teacher is there
                self._loading.discard(worker)
                self._waiting.add(worker)
            case Scored(num_tokens):
                self._unpublished[worker] += num_tokens
                self._progress.scored(num_tokens)
            case Published(job):
                self._unpublished[worker] -= job.num_tokens
                self._held[worker].remove(job)
                self._progress.published(job)
            case Failed(error):
                raise error
            case Died(reason):
                self._bury(worker, reason)

    def _answer(self) -> None:
        """Give jobs to who asked; who holds none waits on, for jobs that another may leave."""
        for worker in sorted(self._waiting):
            if self._queue:
                job = self._queue.popleft()
                self._held[worker].append(job)
                self._engine.reply(worker, job)
            elif self._held[worker]:
                self._engine.reply(worker, Pause())
            else:
                continue
            self._waiting.discard(worker)

    def _bury(self, worker: int, reason: str) -> None:
        held = self._held[worker]
        self._queue.extendleft(reversed(held))
        self._progress.scored(-self._unpublished.pop(worker, 0))
        self._waiting.discard(worker)
        self._num_deaths += 1
        names = ", ".join(map(str, held)) or "none"
        if self._num_deaths > self._max_restarts:
            raise WorkerError(
                f"worker {worker} died: {reason}. It was death {self._num_deaths}, and "
                f"capture.max_restarts is {self._max_restarts}.\n"
                f"  Shards it held: {names}. Finished shards are safe: when the cause is mended, "
                "run the same command again."
            )
        self._progress.say(
            f"worker {worker} died: {reason}. Shards that others take up: {names}. "
            f"Restart {self._num_deaths} of {self._max_restarts}."
        )
        self._start(worker)
