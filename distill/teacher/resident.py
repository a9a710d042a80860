"""A teacher of transformers, whole in memory.

Shape suffixes: B blocks, T positions, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from distill.config import ResidentTeacherConfig
from distill.data import Block
from distill.errors import ConfigError
from distill.models import load_causal_lm, pick_device
from distill.targets import SparseTargets
from distill.teacher.selection import Selection, micro_batches, stack_inputs


class ResidentTeacher:
    """Runs micro-batches of whole blocks; the head sees only rows that count, a chunk at a time."""

    def __init__(self, config: ResidentTeacherConfig, selection: Selection) -> None:
        if config.device and config.device_map:
            raise ConfigError("teacher: give either device or device_map, not both.")
        options = {"device_map": config.device_map} if config.device_map else {}
        model = load_causal_lm(
            config.model,
            "teacher.model",
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            **options,
        )
        if not config.device_map:
            model = model.to(pick_device(config.device))
        self._model = model.eval()
        self._config, self._selection = config, selection

    @torch.inference_mode()
    def score(self, groups: Iterable[Sequence[Block]]) -> Iterator[SparseTargets]:
        """Yield the targets of each block in order; see `Teacher`."""
        head = self._model.get_output_embeddings()
        for blocks in groups:
            for batch in micro_batches(blocks, self._config.micro_batch_tokens):
                yield from self._selection.select(self._hidden(batch), batch, head)

    def _hidden(self, blocks: Sequence[Block]) -> Tensor:
        device = self._model.get_input_embeddings().weight.device
        input_ids_BT, position_ids_BT = stack_inputs(blocks, device)
        # Restarting positions keep documents apart only without cache and attention mask.
        output = self._model.get_decoder()(
            input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
        )
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD
