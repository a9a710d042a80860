"""A transformers model without weights, whose parts are filled, used and emptied one at a time.

Nothing of a family is written again: the decoder's own forward makes masks, positions and whatever
else its layers want, and calls them. Only one of them is there. It takes its hidden states from us
and ends the pass; the others hand on what they are given.

Shape suffixes: B blocks, T positions, D hidden size.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from distill.errors import TeacherError
from distill.teacher.weights import Checkpoint

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _ReachedError(Exception):
    """Ends a forward pass with what it came for."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        self.hidden_BTD = hidden_BTD


class _Slot:
    """Stands in for one decoder layer; what it does in a pass is set before."""

    def __init__(self, layer: Any) -> None:
        self.arrives = False
        """End the pass with what arrives here."""
        self.parked_BTD: Tensor | None = None
        """Use this in place of what arrives."""
        self.computes = False
        """Compute, and end the pass with the result."""
        self._compute = layer.forward
        layer.forward = self.forward  # on the instance: names of parameters stay as they are

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.arrives:
            raise _ReachedError(hidden_BTD)
        if self.parked_BTD is not None:
            hidden_BTD = self.parked_BTD
        if not self.computes:
            return hidden_BTD
        result = self._compute(hidden_BTD, *args, **kwargs)
        raise _ReachedError(result if isinstance(result, Tensor) else result[0])


@dataclass(frozen=True, slots=True)
class Stage:
    """What is in memory at a time: the embedding, one layer, or norm and head."""

    names: tuple[str, ...]
    """Parameters and buffers of the model."""
    stored: tuple[str, ...]
    """Tensors of the checkpoint that make them."""
    is_direct: bool
    """Whether each stored tensor is a parameter; else transformers has to convert them."""


class Skeleton:
    """The model, and its stages in the order of a forward pass: embedding, layers, norm and head.

    Raises:
        TeacherError: the family has no plain list of layers, or the checkpoint lacks tensors.
    """

    def __init__(
        self,
        model_config: Any,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        attention: str,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._quantizer = _quantizer(model_config, device)
        # Buffers are real: rotary frequencies are computed, not stored.
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, attn_implementation=attention
            )
        if self._quantizer is not None:
            self._quantizer.preprocess_model(model=self.model, dtype=dtype, device_map={"": device})
        self.model.eval()
        self._decoder = self.model.get_decoder()
        layers = getattr(self._decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise TeacherError(
                f"teacher.model: the layers of a {model_config.model_type} cannot be streamed, "
                "because its decoder has no list `layers`.\n  Use teacher.kind=resident."
            )
        self._empty = dict(self.model.state_dict(keep_vars=True))
        self.stages = self._make_stages(len(layers))
        self._slots = [_Slot(layer) for layer in layers]
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._slots)

    def num_bytes(self, stage: Stage) -> int:
        """Bytes of a stage in memory."""
        return sum(self._empty[name].nbytes for name in stage.names)

    def read(self, stage: Stage, *, pin: bool = False) -> dict[str, Tensor]:
        """Read what makes a stage, by its name in the checkpoint, in the dtype of the model."""
        dtypes = {}
        if stage.is_direct:
            dtypes = {
                stored: self._empty[name].dtype
                for name, stored in zip(stage.names, stage.stored, strict=True)
            }
        return self._checkpoint.read(stage.stored, dtypes, pin=pin)

    def fill(self, stage: Stage, tensors: Mapping[str, Tensor]) -> None:
        """Put weights, which are on the device where `is_direct`, into the model.

        Raises:
            TeacherError: some of the stage's parameters got none.
        """
        if stage.is_direct:
            for name, stored in zip(stage.names, stage.stored, strict=True):
                self._put(name, tensors[stored])
            return
        self._convert(tensors)
        state = self.model.state_dict(keep_vars=True)
        empty = [name for name in stage.names if state[name].is_meta]
        if empty:
            raise self._missing(empty)

    def clear(self, stage: Stage) -> None:
        """Take the weights of a stage out again."""
        for name in stage.names:
            self._put(name, self._empty[name])

    def embed(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return what arrives at the first layer, [B, T, D]."""
        self._slots[0].arrives = True
        try:
            return self._run(input_ids=input_ids_BT, position_ids=position_ids_BT)
        finally:
            self._slots[0].arrives = False

    def layer(self, number: int, hidden_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return what one layer makes of `hidden_BTD`."""
        slot = self._slots[number]
        slot.parked_BTD, slot.computes = hidden_BTD, True
        try:
            return self._run(inputs_embeds=hidden_BTD, position_ids=position_ids_BT)
        finally:
            slot.parked_BTD, slot.computes = None, False

    def finish(self, hidden_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return the final hidden states after the last norm, [B, T, D]."""
        self._slots[-1].parked_BTD = hidden_BTD
        try:
            return self._run(inputs_embeds=hidden_BTD, position_ids=position_ids_BT)
        finally:
            self._slots[-1].parked_BTD = None

    def _run(self, **inputs: Tensor) -> Tensor:
        try:
            # Restarting positions keep documents apart only without cache and attention mask.
            output = self._decoder(**inputs, use_cache=False)
        except _ReachedError as reached:
            return reached.hidden_BTD
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _make_stages(self, num_layers: int) -> tuple[Stage, ...]:
        paths = {module: path for path, module in self.model.named_modules()}
        prefix = f"{paths[self._decoder.layers]}."
        embedding = f"{paths[self.model.get_input_embeddings()]}."
        head = f"{paths[self.model.get_output_embeddings()]}."
        outside = [name for name in self._empty if not name.startswith(prefix)]
        aliases = {}
        if f"{head}weight" not in self._checkpoint and self.model.config.tie_word_embeddings:
            aliases[f"{head}weight"] = f"{embedding}weight"
        groups = [[name for name in outside if not name.startswith(head)]]
        for number in range(num_layers):
            own = f"{prefix}{number}."
            groups.append([name for name in self._empty if name.startswith(own)])
        groups.append([name for name in outside if not name.startswith(embedding)])
        stored_by_layer: dict[int | None, list[str]] = {}
        for name in self._checkpoint.names:
            found = _LAYER.search(name)
            stored_by_layer.setdefault(int(found[1]) if found else None, []).append(name)
        stages = []
        for number, names in enumerate(groups, start=-1):
            key = number if 0 <= number < num_layers else None
            stages.append(self._make_stage(names, stored_by_layer.get(key, []), aliases, key))
        return tuple(stages)

    def _make_stage(
        self, names: list[str], stored: list[str], aliases: dict[str, str], layer: int | None
    ) -> Stage:
        found = [aliases.get(name, name) for name in names]
        missing = [name for name in found if name not in self._checkpoint]
        is_whole = layer is None or set(found) == set(stored)
        if not missing and is_whole and all(map(self._fits, names, found)):
            return Stage(tuple(names), tuple(found), is_direct=True)
        # Tensors of other names may be what is missing: fused or renamed by transformers.
        if missing and not any(name not in self._empty for name in stored):
            raise self._missing(missing)
        return Stage(tuple(names), tuple(stored), is_direct=False)

    def _fits(self, name: str, stored: str) -> bool:
        """Whether a stored tensor is a parameter as it stands, but for the width of its floats."""
        wanted = self._empty[name]
        found = self._checkpoint.dtype(stored)
        return self._checkpoint.shape(stored) == tuple(wanted.shape) and (
            found == wanted.dtype or (found in _FLOATS and wanted.dtype in _FLOATS)
        )

    def _put(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf not in module._parameters:
            module._buffers[leaf] = tensor
        elif isinstance(tensor, nn.Parameter):
            module._parameters[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _convert(self, tensors: Mapping[str, Tensor]) -> None:
        """Let transformers fuse experts, dequantise or rename, as `from_pretrained` would."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(
            dtype=self._dtype,
            hf_quantizer=self._quantizer,
            device_map={"": self._device},
            weight_mapping=get_model_conversion_mapping(self.model, None, self._quantizer),
        )
        convert_and_load_state_dict_in_model(self.model, dict(tensors), options, None)

    def _missing(self, names: Sequence[str]) -> TeacherError:
        return TeacherError(
            f"the checkpoint {self._checkpoint.folder} lacks {len(names)} tensors that the model "
            f"needs, first {names[0]}.\n  Download it again, or check that config.json belongs to "
            "it."
        )


def _quantizer(model_config: Any, device: torch.device) -> Any:
    """Return the quantizer of transformers for a quantised checkpoint, else None."""
    if getattr(model_config, "quantization_config", None) is None:
        return None
    from transformers.quantizers.auto import get_hf_quantizer

    return get_hf_quantizer(model_config, None, {"": device}, True, {})[0]
