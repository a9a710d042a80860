"""Tiny models of the families that can be cut, and blocks to measure them on."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from students.calibration import CalibrationBlock

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCAB_SIZE = 40
SCRATCH = (
    "student.kind=scratch",
    "student.hidden_size=32",
    "student.intermediate_size=64",
    "student.num_layers=2",
    "student.num_heads=4",
)


def tiny_model(family: str = "llama", **changes: Any) -> Any:
    """Two layers of 6 heads in 3 groups, 10 MLP and 24 hidden channels; float64, seeded.

    Norms and biases are random too, so that a wrong cut of them shows.
    """
    config_type, model_type = FAMILIES[family]
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_type(config_type(**(shape | changes))).double().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data.uniform_(0.5, 1.5)
    return model


def make_calibration(*lengths: int) -> list[CalibrationBlock]:
    """One block of random tokens, of two documents, for each length."""
    blocks = []
    for seed, length in enumerate(lengths):
        ids = torch.randint(VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))
        first = length // 3
        places = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[0, [first - 1, length - 1]] = False
        blocks.append(CalibrationBlock(ids, places, mask))
    return blocks


def logits_of(model: Any, block: CalibrationBlock) -> torch.Tensor:
    """Logits [B, T, V] of one packed block."""
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=block.input_ids_BT, position_ids=block.position_ids_BT, use_cache=False
        ).logits
    return logits


def copy_with_tokens(model: Path, folder: Path, tokens: list[str]) -> Path:
    """The model with a tokenizer of more tokens; the tiny teacher has 7 logits to spare."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    return folder
