"""Which decoder layers a pruned student keeps, and how the others go.

Shape suffixes: B blocks, T positions, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import ConfigError
from students.calibration import CalibrationBlock, cross_entropy, hooks, run


def layers_of(model: Any) -> nn.ModuleList:
    """Return the decoder layers.

    Raises:
        ConfigError: the model has no list of them.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"student.model: {type(model).__name__} has no list of layers to prune.")
    return layers


def require_enough(num_layers: int, num_kept: int) -> None:
    """Refuse to keep more layers than there are.

    Raises:
        ConfigError: both numbers are shown.
    """
    if num_kept > num_layers:
        raise ConfigError(
            f"student.num_layers is {num_kept}, but the model has {num_layers} layers: keep fewer."
        )


def evenly_spaced(num_layers: int, num_kept: int) -> list[int]:
    """Return the indices of `num_kept` of `num_layers` layers, evenly spaced, both ends included.

    Raises:
        ConfigError: there are fewer layers than asked for.
    """
    require_enough(num_layers, num_kept)
    if num_kept == 1:
        return [0]
    return [round(index * (num_layers - 1) / (num_kept - 1)) for index in range(num_kept)]


def most_important(importance: list[float], num_kept: int) -> list[int]:
    """Return the indices of the `num_kept` largest values, rising; of equal ones the first.

    Raises:
        ConfigError: there are fewer layers than asked for.
    """
    require_enough(len(importance), num_kept)
    ranked = sorted(range(len(importance)), key=lambda index: (-importance[index], index))
    return sorted(ranked[:num_kept])


def block_influence(model: Any, blocks: list[CalibrationBlock]) -> list[float]:
    """Return how much each layer turns its input: 1 - E[cos(input_t, output_t)] over all tokens.

    Method: ShortGPT, Men et al. 2024, arXiv:2403.03853, equation 1. One pass over the blocks.
    """
    layers = list(layers_of(model))
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def make(number: int) -> Callable[..., None]:
        def add(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before_BTD, after_BTD = inputs[0].float(), _hidden(output).float()
            cosine_BT = F.cosine_similarity(before_BTD, after_BTD, dim=-1)
            sums[number] += float((1 - cosine_BT).cpu().double().sum())

        return add

    with hooks(layers, make):
        for _ in run(model, blocks):
            pass
    num_tokens = sum(block.input_ids_BT.numel() for block in blocks)
    return [float(value) / num_tokens for value in sums]


def loss_increase(model: Any, blocks: list[CalibrationBlock], vocab_size: int) -> list[float]:
    """Return by how much the cross-entropy rises, in nats a row, when each layer alone is skipped.

    Takes one pass over the blocks for each layer, and one more.
    """
    layers = list(layers_of(model))
    whole = cross_entropy(model, blocks, vocab_size)
    increase = []
    for layer in layers:
        with hooks([layer], lambda _number: _skip):
            increase.append(cross_entropy(model, blocks, vocab_size) - whole)
    return increase


def keep_layers(model: Any, kept: list[int]) -> None:
    """Drop all decoder layers but those numbered in `kept`, in place.

    Raises:
        ConfigError: a layer does not exist.
    """
    layers = layers_of(model)
    if kept[-1] >= len(layers):
        raise ConfigError(
            f"student.kept_layers names layer {kept[-1]}, but the model has {len(layers)} layers, "
            f"0 to {len(layers) - 1}."
        )
    model.get_decoder().layers = nn.ModuleList([layers[index] for index in kept])
    for number, layer in enumerate(model.get_decoder().layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    text_config = model.config.get_text_config()
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = [text_config.layer_types[index] for index in kept]
    text_config.num_hidden_layers = len(kept)


def _skip(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


def _hidden(output: Any) -> Tensor:
    hidden_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_BTD
