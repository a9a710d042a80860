"""A teacher of transformers, whole in memory: on one device, or spread over several.

Shape suffixes: B blocks, T positions, D hidden size.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.config import ResidentTeacherConfig
from distill.data import Block
from distill.errors import ConfigError
from distill.models import load_causal_lm, load_config, local_folder, pick_device
from distill.targets import SparseTargets
from distill.teacher.memory import (
    free_bytes,
    out_of_memory_named,
    require_resident,
    resident_bytes,
)
from distill.teacher.parking import new_stream
from distill.teacher.selection import (
    OnTokens,
    Selection,
    micro_batches,
    stack_inputs,
    tell_nobody,
)
from distill.teacher.weights import Checkpoint

_Computed = tuple[Sequence[Block], Tensor, "torch.cuda.Event | None"]


class ResidentTeacher:
    """Runs micro-batches of whole blocks; the head sees only rows that count, a chunk at a time.

    On a GPU the targets of one micro-batch are drawn while the next is computed.
    """

    def __init__(self, config: ResidentTeacherConfig, selection: Selection) -> None:
        self._config, self._selection = config, selection
        self._model = _load(config)
        self._device: torch.device = self._model.get_input_embeddings().weight.device
        head_device = self._model.get_output_embeddings().weight.device
        self._drawing = new_stream(head_device) if head_device.type == "cuda" else None

    @torch.inference_mode()
    def score(
        self, groups: Iterable[Sequence[Block]], on_tokens: OnTokens = tell_nobody
    ) -> Iterator[SparseTargets]:
        """Yield the targets of each block in order; see `Teacher`."""
        settings = self._config
        if settings.tensor_parallel:
            groups = _shared(groups)
        computed: deque[_Computed] = deque()
        with out_of_memory_named(settings.micro_batch_tokens, settings.head_chunk_tokens):
            for blocks in groups:
                for batch in micro_batches(blocks, settings.micro_batch_tokens):
                    # A GPU gets its next work before the host waits for results of the last.
                    computed.append(self._compute(batch))
                    on_tokens(sum(len(block.input_ids_T) for block in batch))
                    if len(computed) > (self._drawing is not None):
                        yield from self._draw(*computed.popleft())
            while computed:
                yield from self._draw(*computed.popleft())

    def close(self) -> None:
        """Let the processes go that share this teacher's layers."""
        if self._config.tensor_parallel and dist.get_rank() == 0:
            dist.broadcast_object_list([None])

    def _compute(self, blocks: Sequence[Block]) -> _Computed:
        input_ids_BT, position_ids_BT = stack_inputs(blocks, self._device)
        # Restarting positions keep documents apart only without cache and attention mask.
        output = self._model.get_decoder()(
            input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
        )
        hidden_BTD: Tensor = output.last_hidden_state
        event = None
        if self._drawing is not None:
            event = torch.cuda.current_stream(hidden_BTD.device).record_event()
        return blocks, hidden_BTD, event

    def _draw(
        self, blocks: Sequence[Block], hidden_BTD: Tensor, event: "torch.cuda.Event | None"
    ) -> Iterator[SparseTargets]:
        head = self._model.get_output_embeddings()
        if self._drawing is None or event is None:
            yield from self._selection.select(hidden_BTD, blocks, head)
            return
        with torch.cuda.stream(self._drawing):
            self._drawing.wait_event(event)
            hidden_BTD.record_stream(self._drawing)
            targets = list(self._selection.select(hidden_BTD, blocks, head))
        yield from targets


def _load(config: ResidentTeacherConfig) -> Any:
    """Load the model where the config wants it, or say why not."""
    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {}
    if config.device_map:
        options["device_map"] = config.device_map
    if config.tensor_parallel:
        options["distributed_config"] = _over_all_processes(config)
    device = pick_device(config.device)
    if not options and not config.model.endswith(".gguf"):
        checkpoint = Checkpoint.of(local_folder(config.model, "teacher.model", config.revision))
        if checkpoint is not None:
            needed = resident_bytes(checkpoint, dtype, device)
            require_resident(config.model, needed, free_bytes(device), device)
    with out_of_memory_named(config.micro_batch_tokens, config.head_chunk_tokens):
        model = load_causal_lm(
            config.model,
            "teacher.model",
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attention,
            **options,
        )
        if not config.device_map and not config.tensor_parallel:
            model = model.to(device)
    _refuse_offload(model, config)
    return model.eval()


def _refuse_offload(model: Any, config: ResidentTeacherConfig) -> None:
    """Accelerate puts what does not fit on the CPU or the disk, and a capture would crawl."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if torch.accelerator.is_available() and places & {"cpu", "disk"}:
        raise ConfigError(
            f"teacher.model: {config.model} does not fit the devices at hand: teacher.device_map="
            f"{config.device_map} puts parts of it on {', '.join(sorted(places))}."
            "\n  Give more devices, or use teacher.kind=streamed, which is made for this."
        )


def _over_all_processes(config: ResidentTeacherConfig) -> Any:
    from transformers.distributed import DistributedConfig

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        raise ConfigError(
            "teacher.tensor_parallel needs a process for each GPU:\n"
            "  torchrun --nproc-per-node N -m distill.cli cache CONFIG"
        )
    model = load_config(config.model, "teacher.model", config.revision).get_text_config()
    names = ("num_attention_heads", "num_key_value_heads")
    heads = {name: int(getattr(model, name, None) or size) for name in names}
    if any(number % size for number in heads.values()):
        raise ConfigError(
            f"teacher.tensor_parallel: {size} processes cannot share the heads of {config.model} "
            f"evenly: {', '.join(f'{name} {number}' for name, number in heads.items())}.\n"
            "  Start a number of processes that divides both."
        )
    return DistributedConfig(tp_size=size)


def _shared(groups: Iterable[Sequence[Block]]) -> Iterator[Sequence[Block]]:
    """Give every process the groups of process 0, until that one closes its teacher."""
    if dist.get_rank() == 0:
        for group in groups:
            dist.broadcast_object_list([group])
            yield group
        return
    while True:
        received: list[Any] = [None]
        dist.broadcast_object_list(received)
        if received[0] is None:
            return
        yield received[0]
