"""A student that exists already."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.config import ExperimentConfig, PretrainedStudentConfig
from distill.models import load_causal_lm

EMBEDDING_MULTIPLE = 64
"""Resized vocabularies are padded to it: matrix products on GPUs like such sizes."""


def build_pretrained(
    student: PretrainedStudentConfig, config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, dict[str, Any]]:
    """Open the model in its own dtype; with `resize_embeddings`, give each token a logit.

    New rows are drawn around the mean of the old ones, as transformers does it, from the
    experiment's seed. Logits beyond the tokenizer's tokens are padding and do no harm.

    Returns:
        The student, and a note of what was changed.
    """
    model = load_causal_lm(student.model, "student.model", revision=student.revision, dtype="auto")
    found = model.get_output_embeddings().weight.shape[0]
    if found >= len(tokenizer) or not student.resize_embeddings:
        return model, {}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=EMBEDDING_MULTIPLE)
    made = model.get_output_embeddings().weight.shape[0]
    return model, {"logits": f"{made:,}, resized from {found:,}"}
