"""Keep the terminal to ourselves while lm-eval works: no bars, no prints, only errors logged."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Silence all tqdm bars, all prints, and what lm-eval logs below an error, inside the block.

    Errors of lm-eval, warnings of other libraries and every exception still come through.

    Yields:
        A list that receives the text of each warning of lm-eval.
    """
    with contextlib.ExitStack() as stack:
        # lm-eval prints a line for every bootstrap; nothing of ours prints inside the block.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(_without_bars())
        stack.enter_context(_without_bootstrap_processes())
        yield stack.enter_context(_collected_warnings(logging.getLogger("lm_eval")))


class _Collector(logging.Handler):
    """Keeps warnings and passes errors on to the handlers of the program."""

    def __init__(self, warnings: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            logging.getLogger().handle(record)
        else:
            self._warnings.append(record.getMessage())


@contextlib.contextmanager
def _collected_warnings(logger: logging.Logger) -> Iterator[list[str]]:
    warnings: list[str] = []
    before = logger.level, logger.handlers, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [_Collector(warnings)], False
    try:
        yield warnings
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1:]


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    # lm-eval passes `disable` itself, and TQDM_DISABLE is read once, at tqdm's import: too early.
    # The bars of datasets and transformers are subclasses, so this is all of them.
    original = tqdm.__init__

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def _without_bootstrap_processes() -> Iterator[None]:
    # lm-eval forks a process per core for each metric, from a process with a model in it, to share
    # batches of 1,000 draws. We ask for one batch: the same numbers without a fork.
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
