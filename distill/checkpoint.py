"""Save and restore a training run: whole or not at all, and only into the run that it came from."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from distill.errors import (
    CheckpointError,
    MismatchError,
    StorageError,
    explain_difference,
    storage_errors,
)
from distill.files import publish_folder, write_json_atomically

_NAME = re.compile(r"step-(\d{6,})")
_STATE = "run.json"


class Checkpoints:
    """The checkpoints of one run, `step-NNNNNN` folders that Accelerate writes and reads."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        self._folder, self._identity, self._keep = folder, identity, keep

    def begin(self, *, resume: bool) -> None:
        """Claim the folder for this run.

        Raises:
            CheckpointError: an unfinished run is there and `resume` is false.
            MismatchError: it is a run of other settings; both sides are shown.
        """
        state = self._folder / _STATE
        if state.exists():
            found = json.loads(state.read_text())
            require_identity(found, self._identity, self._folder.parent)
            if not resume:
                done = self.latest()
                last = f"last checkpoint: step {done}" if done else "before its first checkpoint"
                raise CheckpointError(
                    f"the training in {self._folder.parent} was interrupted ({last}).\n"
                    "  Continue it with --resume, or remove that folder to start anew."
                )
        write_json_atomically(state, dict(self._identity))

    def latest(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        return max(self._steps(), default=0)

    def save(self, accelerator: Accelerator, step: int, also_keep: int | None = None) -> None:
        """Publish the state after `step` steps, then drop all but the newest checkpoints.

        All processes write into one folder, which gets its name when all are done.

        Args:
            accelerator: Holds model, optimiser and what else was registered with it.
            step: How many steps were taken.
            also_keep: A step whose checkpoint stays however old it gets.

        Raises:
            StorageError: no space; older checkpoints are untouched.
        """
        target = self.path(step)
        temporary = target.with_name(f".{target.name}.tmp")
        with plain_storage_errors(target):
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            try:
                accelerator.save_state(str(temporary))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                publish_folder(temporary, target)
                for old in sorted(self._steps())[: -self._keep]:
                    if old != also_keep:
                        shutil.rmtree(self.path(old))
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator) -> int:
        """Restore the newest checkpoint; return its step, 0 if there is none."""
        step = self.latest()
        if step:
            accelerator.load_state(str(self.path(step)))
        return step

    def path(self, step: int) -> Path:
        """Folder of one checkpoint."""
        return self._folder / f"step-{step:06d}"

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        return [int(match[1]) for match in matches if match]


def require_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse the output of a run with other settings.

    Raises:
        MismatchError: each setting that differs is shown with both sides.
    """
    if dict(found) != dict(wanted):
        raise MismatchError(
            explain_difference(
                f"{folder} belongs to a training with other settings.",
                ("there", found),
                ("config", wanted),
            )
            + f"\n  Use another run_folder, or remove {folder} to train anew."
        )


@contextmanager
def plain_storage_errors(target: Path) -> Iterator[None]:
    """Turn the full-disk errors of safetensors and torch.save, which are no OSErrors, into one."""
    try:
        with storage_errors(target):
            yield
    except (SafetensorError, RuntimeError) as error:
        if shutil.disk_usage(target.parent).free > _HEADROOM_BYTES and "No space" not in str(error):
            raise
        raise StorageError(
            f"cannot write {target}: no space is left on the device.\n"
            "  Older checkpoints are safe. Make space, then run again with --resume."
        ) from error


_HEADROOM_BYTES = 1 << 22
"""With less than this free, a failed write is taken for a full disk."""
