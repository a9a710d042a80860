"""Students as plain transformers folders, with a note of where they come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.checkpoint import plain_storage_errors
from distill.files import whole_folder, write_json_atomically

PROVENANCE = "distill.json"
"""In the folder of a student: what it was made with."""


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
            (temporary / name).write_bytes(content)


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return what `save_student` noted, or None where there is no student."""
    path = folder / PROVENANCE
    if not path.exists():
        return None
    provenance: dict[str, Any] = json.loads(path.read_text())
    return provenance
