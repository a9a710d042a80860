"""Cut a Llama-like model in width: attention heads by group, MLP channels, hidden channels.

A unit is what goes as a whole: a key-value head with all query heads that share it (a group), one
channel of a layer's MLP, or one hidden channel of the whole model. Nothing is rescaled: RMS norms
of fewer hidden channels divide by their own root mean square, and training repairs the rest.

Shape suffixes: B blocks, T positions, G groups, C channels of the MLP, D hidden size, U units.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from distill.errors import ConfigError
from students.calibration import CalibrationBlock, hooks, run

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose parameters are those of `_AXES`."""

_GROUPS, _CHANNELS, _HIDDEN = "groups", "channels", "hidden"

_AXES: Mapping[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": (None, _HIDDEN),
    "lm_head.weight": (None, _HIDDEN),
    "norm.weight": (_HIDDEN,),
    "input_layernorm.weight": (_HIDDEN,),
    "post_attention_layernorm.weight": (_HIDDEN,),
    "self_attn.q_proj.weight": (_GROUPS, _HIDDEN),
    "self_attn.k_proj.weight": (_GROUPS, _HIDDEN),
    "self_attn.v_proj.weight": (_GROUPS, _HIDDEN),
    "self_attn.o_proj.weight": (_HIDDEN, _GROUPS),
    "self_attn.q_proj.bias": (_GROUPS,),
    "self_attn.k_proj.bias": (_GROUPS,),
    "self_attn.v_proj.bias": (_GROUPS,),
    "self_attn.o_proj.bias": (_HIDDEN,),
    "self_attn.q_norm.weight": (None,),
    "self_attn.k_norm.weight": (None,),
    "mlp.gate_proj.weight": (_CHANNELS, _HIDDEN),
    "mlp.up_proj.weight": (_CHANNELS, _HIDDEN),
    "mlp.down_proj.weight": (_HIDDEN, _CHANNELS),
    "mlp.gate_proj.bias": (_CHANNELS,),
    "mlp.up_proj.bias": (_CHANNELS,),
    "mlp.down_proj.bias": (_HIDDEN,),
}
"""What each dimension of a parameter counts; None stays whole."""

_NAME = re.compile(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)")


@dataclass(frozen=True, slots=True)
class Importance:
    """How much each unit matters; only the order within a row of numbers means anything."""

    groups_LG: Tensor
    """Of each layer's attention groups, float64."""
    channels_LC: Tensor
    """Of each layer's MLP channels, float64."""
    hidden_D: Tensor
    """Of the hidden channels, float64."""


@dataclass(frozen=True, slots=True)
class Width:
    """How much of a model's width is kept."""

    num_heads: int
    num_groups: int
    intermediate_size: int
    hidden_size: int


def width_of(model: Any, setting: str = "student.model") -> Width:
    """Return the widths of a model.

    Raises:
        ConfigError: the model is of no family that can be cut in width.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{setting}: model type {config.model_type!r} cannot be cut in width, only "
            f"{', '.join(FAMILIES)}.\n  Cut it in depth (student.num_layers), or choose another."
        )
    return Width(
        num_heads=config.num_attention_heads,
        num_groups=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        hidden_size=config.hidden_size,
    )


def plan(
    model: Any, num_heads: int | None, intermediate_size: int | None, hidden_size: int | None
) -> Width:
    """Return the widths to keep, None keeping all, before anything is measured or cut.

    Raises:
        ConfigError: the family cannot be cut, more is to be kept than there is, heads would leave
            their group, or transformers has no such model; all problems are reported at once.
    """
    full = width_of(model)
    problems = []
    for name, wanted, found in (
        ("num_heads", num_heads, full.num_heads),
        ("intermediate_size", intermediate_size, full.intermediate_size),
        ("hidden_size", hidden_size, full.hidden_size),
    ):
        if wanted is not None and wanted > found:
            problems.append(f"student.{name} is {wanted}, but the model has {found}: keep fewer.")
    heads = num_heads or full.num_heads
    a_group = full.num_heads // full.num_groups
    if heads % a_group:
        problems.append(
            f"student.num_heads is {heads}, but {a_group} heads share a key-value head and go "
            f"together: give a multiple of {a_group}."
        )
    if problems:
        raise ConfigError("\n  ".join(problems))
    kept = Width(
        heads,
        heads // a_group,
        intermediate_size or full.intermediate_size,
        hidden_size or full.hidden_size,
    )
    _cut_config(model.config, kept)
    return kept


def activation_importance(model: Any, blocks: list[CalibrationBlock]) -> Importance:
    """Measure all units on calibration blocks, as Minitron does.

    With a_t the activation of a unit at token t, its importance is

        sqrt(sum over blocks of (mean over t of |a_t|) ** 2),

    where |a_t| is, for a group, the L2 norm of its heads' outputs before the output projection; for
    an MLP channel, the absolute value of what enters the down projection; for a hidden channel, the
    absolute value after a layer's RMS norms, their importances summed over norms and layers.

    Method: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2, aggregated by mean over tokens
    and L2 over the batch. Memory is flat: only sums of squares are kept.
    """
    width, layers = width_of(model), list(model.get_decoder().layers)
    squares = {
        "groups": torch.zeros(len(layers), width.num_groups, dtype=torch.float64),
        "channels": torch.zeros(len(layers), width.intermediate_size, dtype=torch.float64),
        "first": torch.zeros(len(layers), width.hidden_size, dtype=torch.float64),
        "second": torch.zeros(len(layers), width.hidden_size, dtype=torch.float64),
    }

    def entering(name: str) -> Callable[[int], Callable[..., None]]:
        def make(number: int) -> Callable[..., None]:
            def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                joined_BTU, num_units = inputs[0].float(), squares[name].shape[1]
                size_BTU = joined_BTU.reshape(*joined_BTU.shape[:2], num_units, -1).norm(dim=-1)
                squares[name][number] += size_BTU.mean(1).cpu().double().square().sum(0)

            return add

        return make

    def leaving(name: str) -> Callable[[int], Callable[..., None]]:
        def make(number: int) -> Callable[..., None]:
            def add(_module: nn.Module, _inputs: tuple[Tensor, ...], normed_BTD: Tensor) -> None:
                mean_BD = normed_BTD.float().abs().mean(1)
                squares[name][number] += mean_BD.cpu().double().square().sum(0)

            return add

        return make

    with (
        hooks([layer.self_attn.o_proj for layer in layers], entering("groups"), before=True),
        hooks([layer.mlp.down_proj for layer in layers], entering("channels"), before=True),
        hooks([layer.input_layernorm for layer in layers], leaving("first")),
        hooks([layer.post_attention_layernorm for layer in layers], leaving("second")),
    ):
        for _ in run(model, blocks):
            pass
    norms = squares["first"].sqrt().sum(0) + squares["second"].sqrt().sum(0)
    return Importance(squares["groups"].sqrt(), squares["channels"].sqrt(), norms)


@torch.inference_mode()
def weight_importance(model: Any) -> Importance:
    """Take the L2 norm of all parameters that would go with each unit; no data is needed."""
    width, num_layers = width_of(model), len(model.get_decoder().layers)
    groups_LG = torch.zeros(num_layers, width.num_groups, dtype=torch.float64)
    channels_LC = torch.zeros(num_layers, width.intermediate_size, dtype=torch.float64)
    hidden_D = torch.zeros(width.hidden_size, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        layer, axes = _axes(name)
        for dim, axis in enumerate(axes):
            squares = {_GROUPS: groups_LG, _CHANNELS: channels_LC}.get(axis or "")
            target = hidden_D if axis == _HIDDEN else None if squares is None else squares[layer]
            if target is not None:
                units = parameter.unflatten(dim, (len(target), -1)).movedim(dim, 0).flatten(1)
                target += units.cpu().double().square().sum(1)
    return Importance(groups_LG.sqrt(), channels_LC.sqrt(), hidden_D.sqrt())


def cut(model: Any, width: Width, importance: Importance) -> Any:
    """Return a new, plain model of the same class with the most important units of `model`.

    Units stay in their order; head_dim, ties and dtype stay as they are. `width` is from `plan`.
    """
    kept: dict[str, Tensor] = {
        _GROUPS: _top(importance.groups_LG, width.num_groups),
        _CHANNELS: _top(importance.channels_LC, width.intermediate_size),
        _HIDDEN: _top(importance.hidden_D[None], width.hidden_size),
    }
    num_units = {
        _GROUPS: importance.groups_LG.shape[1],
        _CHANNELS: importance.channels_LC.shape[1],
        _HIDDEN: len(importance.hidden_D),
    }
    state = {}
    for name, parameter in model.named_parameters():
        layer, axes = _axes(name)
        tensor = parameter.detach()
        for dim, axis in enumerate(axes):
            if axis is not None:
                indices = kept[axis][layer if axis != _HIDDEN else 0].to(tensor.device)
                units = tensor.unflatten(dim, (num_units[axis], -1))
                tensor = units.index_select(dim, indices).flatten(dim, dim + 1)
        state[name] = tensor.clone()
    config = _cut_config(model.config, width)
    with init_empty_weights(include_buffers=False):
        smaller = type(model)(config)
    smaller.tie_weights()
    missing, unexpected = smaller.load_state_dict(state, strict=False, assign=True)
    smaller.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected, unexpected
    assert set(missing) <= tied, missing
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()


def _cut_config(config: Any, width: Width) -> Any:
    tree = config.to_dict()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    tree |= {
        "num_attention_heads": width.num_heads,
        "num_key_value_heads": width.num_groups,
        "intermediate_size": width.intermediate_size,
        "hidden_size": width.hidden_size,
        "head_dim": head_dim,
    }
    try:
        return type(config).from_dict(tree)
    except StrictDataclassError as error:
        hint = ""
        if width.hidden_size % width.num_heads:
            near = max(1, width.hidden_size // width.num_heads) * width.num_heads
            hint = f" Try student.hidden_size={near}."
        reason = str(error).strip().split("\n")[-1].strip()
        raise ConfigError(f"student: transformers refuses the cut model: {reason}{hint}") from None


def _axes(name: str) -> tuple[int, tuple[str | None, ...]]:
    """Layer (0 for what is in none) and axes of a parameter.

    Raises:
        ConfigError: the family's models have such a parameter, but the table does not know it.
    """
    match = _NAME.fullmatch(name)
    assert match is not None
    axes = _AXES.get(match[2])
    if axes is None:
        raise ConfigError(
            f"student.model: the parameter {name!r} is not known, so the model cannot be cut in "
            "width.\n  Cut it in depth (student.num_layers), or choose another."
        )
    return int(match[1] or 0), axes


def _top(importance_RU: Tensor, num_kept: int) -> Tensor:
    """Indices of the largest values of each row, rising; of equal ones the first."""
    order_RU = importance_RU.argsort(dim=-1, descending=True, stable=True)
    return order_RU[:, :num_kept].sort(dim=-1).values
