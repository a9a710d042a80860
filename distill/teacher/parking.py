"""Where the hidden states of a window wait while a layer works through them.

Shape suffixes: B blocks, T positions, D hidden size.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import storage_errors

Step = Callable[[int, Tensor], Tensor]
"""From the number of a micro-batch and its hidden states [B, T, D] to new ones."""


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a further queue of work for a GPU."""
    make: Any = torch.cuda.Stream  # published without types
    stream: torch.cuda.Stream = make(device)
    return stream


class Parking:
    """Hidden states of many micro-batches: in host memory, or in one file of a folder.

    For a GPU the memory is page-locked, and the next micro-batch comes and the last one goes while
    one computes. On the CPU they are used where they are.
    """

    def __init__(self, device: torch.device, folder: str | None) -> None:
        self._device = device
        self._folder = Path(folder) if folder else None
        self._parked: list[Tensor] = []
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._incoming, self._outgoing = new_stream(device), new_stream(device)

    def fill(self, count: int, make: Callable[[int], Tensor]) -> None:
        """Park what `make` gives for the micro-batches 0 .. count - 1."""
        self._parked = []
        for place in range(count):
            hidden_BTD = make(place)
            self._parked.append(self._new_place(hidden_BTD))
            self._store(place, hidden_BTD)
        self._wait()

    def through(self, step: Step) -> None:
        """Replace each micro-batch by what `step` makes of it, in order."""
        if not self._is_cuda:
            for place, hidden_BTD in enumerate(self._parked):
                self._store(place, step(place, hidden_BTD))
            return
        coming = self._fetch(0)
        for place in range(len(self._parked)):
            hidden_BTD = self._arrived(*coming)
            if place + 1 < len(self._parked):
                coming = self._fetch(place + 1)
            self._store(place, step(place, hidden_BTD))
        self._wait()

    def take(self, place: int) -> Tensor:
        """Return one micro-batch on the device."""
        return self._parked[place].to(self._device)

    def _new_place(self, hidden_BTD: Tensor) -> Tensor:
        """A place for `hidden_BTD` on the host."""
        if self._folder is not None:
            with storage_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                # The name goes at once, the space when this process ends, however it does.
                with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                    # Space now rather than a crash when a page of the map finds none.
                    os.posix_fallocate(file.fileno(), 0, hidden_BTD.nbytes)
                    data = torch.from_file(
                        file.name, shared=True, size=hidden_BTD.numel(), dtype=hidden_BTD.dtype
                    )
            return data.view(hidden_BTD.shape)
        if self._is_cuda:
            return torch.empty_like(hidden_BTD, device="cpu", pin_memory=True)
        return hidden_BTD

    def _store(self, place: int, hidden_BTD: Tensor) -> None:
        if self._is_cuda:
            self._outgoing.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._outgoing):
                self._parked[place].copy_(hidden_BTD, non_blocking=True)
            hidden_BTD.record_stream(self._outgoing)
        elif self._folder is not None:
            self._parked[place].copy_(hidden_BTD)
        else:
            self._parked[place] = hidden_BTD

    def _fetch(self, place: int) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._incoming):
            hidden_BTD = self._parked[place].to(self._device, non_blocking=True)
            return hidden_BTD, self._incoming.record_event()

    def _arrived(self, hidden_BTD: Tensor, event: torch.cuda.Event) -> Tensor:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        hidden_BTD.record_stream(stream)
        return hidden_BTD

    def _wait(self) -> None:
        """The next layer reads what this one stored."""
        if self._is_cuda:
            self._outgoing.synchronize()
