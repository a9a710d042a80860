"""A student cut out of a larger model: first in depth, then what is left in width."""

import os
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.config import ExperimentConfig, PrunedStudentConfig
from distill.models import load_causal_lm, pick_device
from students import depth, width
from students.calibration import CalibrationBlock, read_blocks


def build_pruned(
    student: PrunedStudentConfig, config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, dict[str, Any]]:
    """Cut the model as the config says; measure it first where the config asks for that.

    Under a launcher every process does so for itself, on its own device, and gets the same.

    Returns:
        The student, on the CPU, and a note of how it was made.

    Raises:
        ConfigError: there is less to keep than asked for, or the model cannot be cut.
        CacheError: it is to be measured, and the train cache is not complete.
        MismatchError: that cache was made with another tokenizer.
    """
    model = load_causal_lm(student.model, "student.model", revision=student.revision, dtype="auto")
    num_layers = len(depth.layers_of(model))
    depth.require_enough(num_layers, student.num_layers or 1)
    if student.is_cut_in_width:
        full = width.width_of(model)
        wanted = width.plan(
            model, student.num_heads, student.intermediate_size, student.hidden_size
        )
    blocks: list[CalibrationBlock] = []
    note: dict[str, Any] = {}
    if student.is_calibrated:
        blocks, note["calibration"] = read_blocks(config, tokenizer, student.calibration_blocks)
        model.to(_own_device(config.device))
    kept = _kept_layers(model, student, blocks, len(tokenizer))
    if kept != list(range(num_layers)):
        depth.keep_layers(model, kept)
        chosen = "listed" if student.kept_layers is not None else student.layers
        note["depth"] = {"layers": _share(len(kept), num_layers), "by": chosen, "kept": kept}
    if student.is_cut_in_width:
        importance = (
            width.activation_importance(model, blocks)
            if student.importance == "activation"
            else width.weight_importance(model)
        )
        model = width.cut(model, wanted, importance)
        note["width"] = {
            "heads": _share(wanted.num_heads, full.num_heads),
            "key_value_heads": _share(wanted.num_groups, full.num_groups),
            "mlp_channels": _share(wanted.intermediate_size, full.intermediate_size),
            "hidden_channels": _share(wanted.hidden_size, full.hidden_size),
            "by": student.importance,
        }
    return model.cpu(), note


def _kept_layers(
    model: Any, student: PrunedStudentConfig, blocks: list[CalibrationBlock], vocab_size: int
) -> list[int]:
    num_layers = len(depth.layers_of(model))
    if student.kept_layers is not None:
        return list(student.kept_layers)
    num_kept = student.num_layers or num_layers
    if student.layers == "spaced":
        return depth.evenly_spaced(num_layers, num_kept)
    if student.layers == "influence":
        return depth.most_important(depth.block_influence(model, blocks), num_kept)
    return depth.most_important(depth.loss_increase(model, blocks, vocab_size), num_kept)


def _share(kept: int, found: int) -> str:
    return f"{kept:,} of {found:,}"


def _own_device(name: str | None) -> torch.device:
    device = pick_device(name)
    return (
        torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        if str(device) == "cuda"
        else device
    )
