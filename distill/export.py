"""Students as plain transformers folders, with a note of where they come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from distill.checkpoint import plain_storage_errors
from distill.config import TrainConfig
from distill.files import whole_folder, write_json_atomically

PROVENANCE = "distill.json"
"""In the folder of a student: what it was made with."""


def gather_student(accelerator: Accelerator, model: Any, settings: TrainConfig) -> Any:
    """Return a trained student whole, in the memory of the main process; None on the others.

    Args:
        accelerator: All of its processes must call this: each may hold a shard of every weight.
        model: A `DistillationModel` that it prepared.
        settings: How it was trained.
    """
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    student = accelerator.unwrap_model(model).student
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(student.config)
        if settings.lora is not None:
            from distill.adapters import add_adapters

            whole = add_adapters(whole, settings.lora)
    # Tied weights may stand in the state once or twice; strict loading would ask for both.
    named = {name.removeprefix("student."): value for name, value in state.items()}
    missing = whole.load_state_dict(named, strict=False, assign=True).missing_keys
    whole.tie_weights()
    lost = [name for name in missing if whole.get_parameter(name).is_meta]
    assert not lost, f"not gathered: {lost}"
    whole.generation_config = student.generation_config
    return whole


def save_student(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    provenance: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Publish a student so that `AutoModelForCausalLM.from_pretrained(folder)` opens it.

    Args:
        folder: Where to.
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        provenance: What it was made with, kept as distill.json.
        files: Further files by name: those of `distill.model_card.student_files`.

    Raises:
        StorageError: no space; an older folder is untouched.
    """
    with plain_storage_errors(folder), whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json_atomically(temporary / PROVENANCE, dict(provenance))
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return what `save_student` noted, or None where there is no student."""
    path = folder / PROVENANCE
    if not path.exists():
        return None
    provenance: dict[str, Any] = json.loads(path.read_text())
    return provenance
