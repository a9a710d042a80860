"""Small random models of several families, and groups of packed blocks for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config import ResidentTeacherConfig, StreamedTeacherConfig, ThresholdConfig
from distill.data import Block
from distill.targets import SparseTargets
from distill.teacher import Teacher
from distill.teacher.resident import ResidentTeacher
from distill.teacher.selection import Selection
from distill.teacher.streamed import StreamedTeacher

VOCAB_SIZE = 320
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, scaled rope": ("llama", {"rope_parameters": _LONG_ROPE}),
    "mistral, sliding window": ("mistral", {"sliding_window": 8}),
    "qwen2, layers of two types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gemma, scaled embedding": ("gemma", {}),
    "gemma3, layers of two types": ("gemma3_text", {"sliding_window": 8}),
    "granite, scaled embedding": ("granite", {"embedding_multiplier": 2.0}),
    "mixtral, experts": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe, experts": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "deepseek_v3, dense and expert layers": ("deepseek_v3", _LATENT),
}
"""name -> (model_type, what differs from the common shape)."""


def save_model(
    folder: Path, family: str = "llama", *, shard_bytes: int | None = None, **changes: Any
) -> Path:
    """Save a seeded random model of one family."""
    model_type, own = FAMILIES[family]
    settings = {k: v for k, v in {**_SHAPE, **own, **changes}.items() if v is not None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    options = {"max_shard_size": shard_bytes} if shard_bytes else {}
    model.save_pretrained(folder, **options)
    return folder


def packed_groups(sizes: tuple[int, ...] = (3, 1), length: int = 32) -> list[list[Block]]:
    """Groups of blocks of two documents each, of random tokens."""
    random = np.random.default_rng(0)
    ids = iter(range(sum(sizes)))

    def block() -> Block:
        tokens = random.integers(3, VOCAB_SIZE, length).astype(np.int32)
        cut = length // 3
        return Block(
            next(ids), tokens, np.array([cut, length - cut], np.int32), np.ones(length, bool)
        )

    return [[block() for _ in range(size)] for size in sizes]


def selection(vocab_size: int = VOCAB_SIZE) -> Selection:
    """What follows the last hidden states of every teacher in these tests."""
    return Selection("teacher", ThresholdConfig(tau=0.1), 0, vocab_size, chunk_rows=40)


def resident(folder: Path, **settings: Any) -> Teacher:
    """Open a resident teacher on the CPU."""
    known: dict[str, Any] = {"dtype": "float32", "device": "cpu", "micro_batch_tokens": 64}
    return ResidentTeacher(
        ResidentTeacherConfig(model=str(folder), **(known | settings)), selection()
    )


def streamed(folder: Path, **settings: Any) -> StreamedTeacher:
    """Open a streamed teacher on the CPU, with windows of two micro-batches."""
    known: dict[str, Any] = {"dtype": "float32", "device": "cpu", "micro_batch_tokens": 64}
    known["window_tokens"] = 96
    return StreamedTeacher(
        StreamedTeacherConfig(kind="streamed", model=str(folder), **(known | settings)), selection()
    )


def require_equal(found: list[SparseTargets], expected: list[SparseTargets]) -> None:
    """Equal to the last bit, in every field."""
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.ids_N) > 0
        for name in ("ids_N", "weights_N", "counts_R", "num_head_R", "tail_mass_R", "entropy_R"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
