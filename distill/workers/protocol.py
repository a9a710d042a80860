"""What driver and workers say to each other, and what a worker does. No torch here.

A worker asks for one job at a time, when it needs it. It may hold several: a streamed teacher asks
many ahead. Where no job is left, a worker that holds some is told to pause, which lets it finish
and publish them; one that holds none waits, in case another dies and leaves jobs behind.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from distill.errors import DistillError

_REPORT_SECONDS = 0.5
"""Between two messages about scored tokens."""


class Job(NamedTuple):
    """One shard that has no targets yet."""

    split: str
    shard: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.split}/{self.shard:05d}"


@dataclass(frozen=True)
class Asked:
    """The worker wants a job."""


@dataclass(frozen=True)
class Scored:
    """Tokens went through the teacher since the last message."""

    num_tokens: int


@dataclass(frozen=True)
class Published:
    """The shard of a job is in the cache."""

    job: Job


@dataclass(frozen=True)
class Failed:
    """The worker met an error that the user has to mend; another worker would meet it too."""

    error: DistillError


@dataclass(frozen=True)
class Died:
    """The worker is gone, or of no more use."""

    reason: str


Event = Asked | Scored | Published | Failed | Died


@dataclass(frozen=True)
class Pause:
    """No job is at hand: publish what you hold, then ask again."""


@dataclass(frozen=True)
class Stop:
    """All jobs are done."""


Answer = Job | Pause | Stop


class Reporter(Protocol):
    """Whom a work tells how far it is."""

    def scored(self, num_tokens: int) -> None:
        """Tokens went through the teacher."""
        ...

    def published(self, job: Job) -> None:
        """The shard of `job` is in the cache."""
        ...


Work = Callable[[Iterable[Job], Reporter], None]
"""Does jobs, pulled lazily, and has published them all when it returns."""

OpenWork = Callable[[], Work]
"""Loads what the work needs (the teacher); must pickle."""


class Channel(Protocol):
    """The worker's side of the line to the driver."""

    def send(self, event: Event) -> None:
        """Tell the driver; any thread may."""
        ...

    def receive(self) -> Answer:
        """Wait for the answer to `Asked`."""
        ...


class Engine(Protocol):
    """The driver's side: starts workers, and carries messages and bad news."""

    def start(self, worker: int) -> None:
        """Start a worker; one that had the same number is ended."""
        ...

    def reply(self, worker: int, answer: Answer) -> None:
        """Answer the question of a worker; one that has died since does not matter."""
        ...

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        """Return what workers said, as soon as one says something."""
        ...

    def close(self) -> None:
        """End all workers; those that were told to stop end by themselves."""
        ...


def serve(channel: Channel, open_work: OpenWork) -> None:
    """Be a worker: load, then do jobs until the driver says stop; a pause ends a round."""
    answer: Answer = Pause()
    num_pulled = 0

    def pull() -> Iterator[Job]:
        nonlocal answer, num_pulled
        channel.send(Asked())
        while isinstance(answer := channel.receive(), Job):
            num_pulled += 1
            yield answer
            channel.send(Asked())

    work, reporter = open_work(), _Sender(channel)
    while not isinstance(answer, Stop):
        num_pulled = 0
        work(pull(), reporter)
        assert not isinstance(answer, Job), "the work left its jobs before their end"
        assert num_pulled or isinstance(answer, Stop), "the work did not publish all its jobs"


class _Sender:
    """Reports to the driver; scored tokens only a few times a second, and with each shard."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._lock = channel, threading.Lock()
        self._num_tokens, self._last = 0, time.monotonic()

    def scored(self, num_tokens: int) -> None:
        with self._lock:
            self._num_tokens += num_tokens
            if time.monotonic() - self._last >= _REPORT_SECONDS:
                self._flush()

    def published(self, job: Job) -> None:
        with self._lock:
            self._flush()
            self._channel.send(Published(job))

    def _flush(self) -> None:
        self._channel.send(Scored(self._num_tokens))
        self._num_tokens, self._last = 0, time.monotonic()
