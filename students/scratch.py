"""A student with random weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from distill.config import ExperimentConfig, ScratchStudentConfig
from distill.errors import ConfigError


def build_scratch(
    student: ScratchStudentConfig, config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, dict[str, Any]]:
    """Make a Llama over the tokenizer's vocabulary; equal seeds give equal weights.

    Returns:
        The student, and a note of its size.

    Raises:
        ConfigError: the sizes do not fit each other.
    """
    shape = student.shape
    if shape.hidden_size % shape.num_heads or shape.num_heads % shape.num_key_value_heads:
        raise ConfigError(
            f"student: hidden_size ({shape.hidden_size}) must be a multiple of num_heads "
            f"({shape.num_heads}), and that of num_key_value_heads ({shape.num_key_value_heads})."
        )
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        tie_word_embeddings=shape.tie_embeddings,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(llama)
    return model, {"size": student.size, "seed": config.seed}
