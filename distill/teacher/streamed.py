"""A teacher of any size on one device: its layers pass by a window of tokens, one at a time.

Capture needs one forward pass over known tokens, so weights need not stay: a layer is read from the
checkpoint, a whole window of tokens goes through it in micro-batches, and the next layer takes its
place, which a thread has read meanwhile. From some thousand tokens a window on, computing takes
longer than reading, and a device works as fast as if it held the whole model.

Shape suffixes: B blocks, T positions, D hidden size.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, tee

import torch
from torch import Tensor

from distill.config import StreamedTeacherConfig
from distill.data import Block
from distill.models import load_config, local_folder, pick_device, refuse_logit_transforms
from distill.targets import SparseTargets
from distill.teacher.memory import out_of_memory_named, require_streamed
from distill.teacher.parking import Parking, new_stream
from distill.teacher.selection import (
    OnTokens,
    Selection,
    micro_batches,
    stack_inputs,
    tell_nobody,
)
from distill.teacher.skeleton import Skeleton, Stage
from distill.teacher.weights import Checkpoint

_Loaded = tuple[dict[str, Tensor], "torch.cuda.Event | None"]


class StreamedTeacher:
    """Scores windows of blocks; holds one stage of the model, and those that are being read.

    At equal micro-batches its results are those of `ResidentTeacher`, bit for bit.
    """

    def __init__(self, config: StreamedTeacherConfig, selection: Selection) -> None:
        model_config = load_config(config.model, "teacher.model", config.revision)
        refuse_logit_transforms(model_config, f"teacher.model ({config.model})")
        self._config, self._selection = config, selection
        self._device = pick_device(config.device)
        folder = local_folder(config.model, "teacher.model", config.revision)
        dtype = getattr(torch, config.dtype)
        self._skeleton = Skeleton(
            model_config, Checkpoint(folder), dtype, config.attention, self._device
        )
        require_streamed(
            config.model,
            [self._skeleton.num_bytes(stage) for stage in self._skeleton.stages],
            config.layers_ahead + 1,
            self._device,
        )
        self._parking = Parking(self._device, config.parking_folder)
        self._is_cuda = self._device.type == "cuda"
        self._copies = new_stream(self._device) if self._is_cuda else None
        self.seconds_waiting = 0.0
        """Time in which weights were waited for, so far."""

    @torch.inference_mode()
    def score(
        self, groups: Iterable[Sequence[Block]], on_tokens: OnTokens = tell_nobody
    ) -> Iterator[SparseTargets]:
        """Yield the targets of each block in order, a window at a time; see `Teacher`."""
        windows, upcoming = tee(self._windows(groups))
        stages = self._skeleton.stages
        to_read = (stage for _ in upcoming for stage in stages)
        coming: deque[Future[_Loaded]] = deque()
        named = out_of_memory_named(self._config.micro_batch_tokens, self._config.head_chunk_tokens)
        with named, ThreadPoolExecutor(1) as reader:
            for window in windows:
                positions = [stack_inputs(batch, self._device)[1] for batch in window]
                num_tokens = sum(len(block.input_ids_T) for batch in window for block in batch)
                for number, stage in enumerate(stages, start=-1):
                    missing = self._config.layers_ahead + 1 - len(coming)
                    coming += [reader.submit(self._load, s) for s in islice(to_read, missing)]
                    self._skeleton.fill(stage, self._receive(coming.popleft()))
                    yield from self._pass(number, window, positions)
                    self._skeleton.clear(stage)
                    done = number + 2  # stages of this window, counted from 1
                    share = [num_tokens * n // len(stages) for n in (done - 1, done)]
                    on_tokens(share[1] - share[0])

    def close(self) -> None:
        """Nothing outlives the object."""

    def _windows(self, groups: Iterable[Sequence[Block]]) -> Iterator[list[Sequence[Block]]]:
        """Collect micro-batches of whole groups until they have `window_tokens` tokens."""
        window: list[Sequence[Block]] = []
        num_tokens = 0
        for blocks in groups:
            window += micro_batches(blocks, self._config.micro_batch_tokens)
            num_tokens += sum(len(block.input_ids_T) for block in blocks)
            if num_tokens >= self._config.window_tokens:
                yield window
                window, num_tokens = [], 0
        if window:
            yield window

    def _pass(
        self, number: int, window: list[Sequence[Block]], positions: list[Tensor]
    ) -> Iterator[SparseTargets]:
        """Take the window through the embedding (-1), a layer, or norm and head (num_layers)."""
        skeleton = self._skeleton
        if number < 0:

            def embed(place: int) -> Tensor:
                input_ids_BT, position_ids_BT = stack_inputs(window[place], self._device)
                return skeleton.embed(input_ids_BT, position_ids_BT)

            self._parking.fill(len(window), embed)
        elif number < skeleton.num_layers:
            self._parking.through(lambda place, h: skeleton.layer(number, h, positions[place]))
        else:
            head = skeleton.model.get_output_embeddings()
            for place, batch in enumerate(window):
                hidden_BTD = skeleton.finish(self._parking.take(place), positions[place])
                yield from self._selection.select(hidden_BTD, batch, head)

    def _load(self, stage: Stage) -> _Loaded:
        """Read a stage, and start its copy to the GPU; runs in the reading thread."""
        tensors = self._skeleton.read(stage, pin=self._is_cuda and stage.is_direct)
        if self._copies is None or not stage.is_direct:
            return tensors, None
        with torch.cuda.stream(self._copies):
            there = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()
            }
            return there, self._copies.record_event()

    def _receive(self, future: Future[_Loaded]) -> dict[str, Tensor]:
        """Wait until a stage has been read, and let the GPU wait for its copy."""
        started = time.perf_counter()
        tensors, event = future.result()
        self.seconds_waiting += time.perf_counter() - started
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for tensor in tensors.values():
                tensor.record_stream(stream)
        return tensors
