"""Progress of long jobs, rate and time left: a rich bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0
"""Between two plain lines."""


class ProgressBar:
    """Counts tokens towards a total and shows tokens per second and time left.

    Used as a context manager; `advance` is cheap. What earlier runs had done is given as `done`
    and does not count towards the rate.
    """

    def __init__(self, name: str, total_tokens: int, *, done: int = 0) -> None:
        self._name, self._total, self._count, self._first = name, total_tokens, done, done
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                name, total=total_tokens, completed=done, rate="", note=""
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None or self._count != self._first:
            self._print_line()

    def restart_clock(self) -> None:
        """Let the rate count from now on: what came before was loading."""
        self._start, self._first = time.monotonic(), self._count

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(f"{self._name}: {text}", highlight=False, soft_wrap=True, markup=False)

    @property
    def tokens_per_second(self) -> float:
        """Mean rate since the bar was made."""
        return (self._count - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, num_tokens: int, note: str = "") -> None:
        """Add `num_tokens`; `note` is shown at the end of the line."""
        self._count += num_tokens
        self._note = note or self._note
        if self._bar is not None:
            rate = f"{self.tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, completed=self._count, rate=rate, note=self._note)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        rate = self.tokens_per_second
        left = f", {(self._total - self._count) / rate:,.0f} s left" if rate else ""
        share = self._count / max(self._total, 1)
        self._console.print(
            f"{self._name}: {self._count:,} of {self._total:,} tokens ({share:.0%}), "
            f"{rate:,.0f} tokens/s{left}  {self._note}".rstrip(),
            highlight=False,
            soft_wrap=True,
        )


class ShardProgress(ProgressBar):
    """Progress of a capture: tokens through the teacher, and shards in the cache."""

    def __init__(
        self,
        name: str,
        *,
        total_tokens: int,
        done_tokens: int,
        total_shards: int,
        done_shards: int,
    ) -> None:
        super().__init__(name, total_tokens, done=done_tokens)
        self._total_shards, self._done_shards = total_shards, done_shards
        self._workers = ""
        self.tick()

    def scored(self, num_tokens: int) -> None:
        """Count tokens; a negative number takes those back that a dead worker did not publish."""
        shards = f"{self._done_shards} of {self._total_shards} shards"
        self.advance(num_tokens, shards + self._workers)

    def published(self, job: object) -> None:
        """Count a shard."""
        del job
        self._done_shards += 1
        self.tick()

    def tick(self, workers: str = "") -> None:
        """Refresh the view; `workers` says how many there are."""
        self._workers = f", {workers}" if workers else self._workers
        self.scored(0)
