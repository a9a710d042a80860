"""How students are made: an explicit table from `student.kind` to a builder.

A builder returns a causal language model of transformers, and a note of how it was made that goes
into the model's config.json as `distill`. The tokenizer is the model's own, or for a model from
scratch the one of the data.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.cache.reader import open_cache
from distill.config import ExperimentConfig, to_tree
from distill.errors import MismatchError
from distill.export import read_provenance, save_student
from distill.licences import published_name
from distill.model_card import student_files
from distill.models import load_tokenizer
from students.pretrained import build_pretrained
from students.pruned import build_pruned
from students.scratch import build_scratch

BUILDERS: dict[
    str, Callable[[Any, ExperimentConfig, PreTrainedTokenizerBase], tuple[Any, dict[str, Any]]]
] = {
    "pretrained": build_pretrained,
    "pruned": build_pruned,
    "scratch": build_scratch,
}
"""kind -> (its config, the experiment, tokenizer) -> model and note."""


def build_student(config: ExperimentConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """Make the configured student and open its tokenizer.

    Raises:
        ConfigError: a model or a setting cannot be used.
        CacheError: the student is to be measured on the train cache, and that is not complete.
        MismatchError: the student has fewer logits than its tokenizer has tokens.
    """
    student = config.student
    if student.kind == "scratch":
        if config.data.tokenizer is not None:
            tokenizer = load_tokenizer(config.data.tokenizer, "data.tokenizer")
        else:
            tokenizer = load_tokenizer(
                config.teacher.model, "teacher.model", config.teacher.revision
            )
        origin = {}
    else:
        tokenizer = load_tokenizer(student.model, "student.model", student.revision)
        origin = {"from": student.model, "revision": student.revision}
    model, note = BUILDERS[student.kind](student, config, tokenizer)
    num_logits = model.get_output_embeddings().weight.shape[0]
    if num_logits < len(tokenizer):
        raise MismatchError(
            "the student has fewer logits than its tokenizer has tokens.\n"
            f"  student    {tokenizer.name_or_path}  {num_logits:,} logits\n"
            f"  tokenizer  {tokenizer.name_or_path}  {len(tokenizer):,} tokens\n"
            "  Set student.kind=pretrained with student.resize_embeddings=true, or choose another."
        )
    model.config.distill = {"kind": student.kind, **origin, **note}
    return model, tokenizer


def save_initial(
    config: ExperimentConfig, student: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Save the untrained student with its card, so that it can be compared with the trained one.

    Raises:
        CacheError: the train cache, of which the card tells, is not complete.
        ConfigError: the licence of the teacher is not met.
        StorageError: no space; an older folder is untouched.
    """
    folder = config.run_folder / "student" / "initial"
    made_with = {"student": to_tree(config)["student"], "seed": config.seed}
    if read_provenance(folder) == made_with:
        return
    manifest = open_cache(config.cache_folder("train")).manifest
    files = student_files(config, manifest, student, is_trained=False)
    save_student(folder, student, tokenizer, made_with, files)
    print(f"train: the student is to be called {published_name(config)}; its card is in {folder}")
