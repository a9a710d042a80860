"""Everything that distill raises for its users.

    DistillError
    +-- ConfigError(ValueError)            a setting is wrong, or several are
    +-- CacheError(ValueError)             a cache is damaged, incomplete or not a cache
    +-- MismatchError(ValueError)          two things do not belong together
    +-- TeacherError(RuntimeError)         the teacher cannot be loaded, or gives no finite logits
    +-- WorkerError(RuntimeError)          workers of a capture died, more than may be restarted
    +-- CheckpointError(RuntimeError)      a run folder or checkpoint cannot be used
    +-- TrainingError(RuntimeError)        a step gave no usable result, or did not fit the memory
    +-- EvalError(RuntimeError)            a benchmark could not be run or compared
    +-- StorageError(OSError)              the disk or object store refused (full, read-only, gone)

Each message says what happened (found against expected), where, and what to do.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class DistillError(Exception):
    """Root of all errors that a user can cause; the command line prints them and exits 2."""


class ConfigError(DistillError, ValueError):
    """A setting is unknown, missing or out of range."""


class CacheError(DistillError, ValueError):
    """A cache is damaged, incomplete, or not a cache at all."""


class MismatchError(DistillError, ValueError):
    """Two things that were made for other partners were put together."""


class TeacherError(DistillError, RuntimeError):
    """The teacher cannot be loaded, or what it computes is unusable."""


class WorkerError(DistillError, RuntimeError):
    """Workers of a capture died, more of them than may be restarted."""


class CheckpointError(DistillError, RuntimeError):
    """A run folder or a checkpoint is in the way, incomplete, or of another run."""


class TrainingError(DistillError, RuntimeError):
    """A training step gave no finite loss or gradient, or the device's memory was used up."""


class EvalError(DistillError, RuntimeError):
    """A benchmark could not be run, or results cannot be compared."""


class StorageError(DistillError, OSError):
    """The disk or the object store refused a read or a write."""


_REFUSALS = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EFBIG: "the file would exceed the largest allowed size",
}


@contextmanager
def storage_errors(target: object) -> Iterator[None]:
    """Turn the refusals of a disk into a `StorageError` that names `target`.

    Other `OSError`s pass unchanged: they are bugs, or have a better message of their own.
    """
    try:
        yield
    except OSError as error:
        code = errno.EACCES if isinstance(error, PermissionError) else error.errno or 0
        reason = _REFUSALS.get(code)
        if reason is None or isinstance(error, DistillError):
            raise
        raise StorageError(
            f"cannot write {target}: {reason}.\n"
            "  Finished parts are safe. Make space (or choose another folder), then run the same "
            "command again: it continues where it stopped."
        ) from error


def explain_difference(
    what: str, left: tuple[str, Mapping[str, object]], right: tuple[str, Mapping[str, object]]
) -> str:
    """Show both sides of every key that differs, one line a side.

    Args:
        what: The sentence that opens the message.
        left: Name of one side, and its (possibly nested) settings.
        right: The same for the other side.
    """
    flat_left, flat_right = dict(flatten(left[1])), dict(flatten(right[1]))
    width = max(len(left[0]), len(right[0]))
    lines = [what]
    for key in sorted(flat_left.keys() | flat_right.keys()):
        ours, theirs = flat_left.get(key, "(absent)"), flat_right.get(key, "(absent)")
        if ours != theirs:
            lines += [
                f"  {key}",
                f"    {left[0]:<{width}}  {ours}",
                f"    {right[0]:<{width}}  {theirs}",
            ]
    return "\n".join(lines)


def flatten(tree: Mapping[str, object], joint: str = ".") -> Iterator[tuple[str, object]]:
    """Yield the values of nested settings, each with its keys joined; tuples become lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            for name, inner in flatten(value, joint):
                yield f"{key}{joint}{name}", inner
        else:
            yield key, list(value) if isinstance(value, tuple) else value
