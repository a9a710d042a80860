"""Blocks of the experiment's own train cache, on which a model to cut is measured.

Shape suffixes: B blocks (always 1 here), T positions, R rows that count, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from distill import fingerprint
from distill.cache.reader import open_cache
from distill.config import ExperimentConfig
from distill.errors import CacheError, ConfigError, MismatchError

_CHUNK_ROWS = 256
"""Rows whose logits over the whole vocabulary exist at a time."""


@dataclass(frozen=True, slots=True)
class CalibrationBlock:
    """One packed block."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    """Restart at every document."""
    row_mask_BT: Tensor
    """True where position t predicts a token that counts; the last position never does."""


def read_blocks(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, num_blocks: int
) -> tuple[list[CalibrationBlock], dict[str, Any]]:
    """Read the first blocks of the train cache in the order of training.

    Args:
        config: The experiment.
        tokenizer: Of the model to measure; must be the cache's.
        num_blocks: How many.

    Returns:
        The blocks, and what to note of them: the cache's checksum and the number of blocks.

    Raises:
        CacheError: the cache is missing, incomplete or damaged.
        ConfigError: it has fewer blocks.
        MismatchError: it was made with another tokenizer.
    """
    try:
        cache = open_cache(config.cache_folder("train"))
    except CacheError as error:
        raise CacheError(
            "student: layers, heads and channels are measured on blocks of the train cache.\n"
            f"  {error}\n  Or cut without data: student.layers=spaced student.importance=weight"
        ) from None
    if num_blocks > len(cache):
        raise ConfigError(
            f"student.calibration_blocks is {num_blocks}, but {cache.url} has {len(cache)} blocks: "
            "lower it."
        )
    ours, theirs = fingerprint.of_tokenizer(tokenizer), cache.manifest.tokenizer["fingerprint"]
    if ours != theirs:
        raise MismatchError(
            "the model to cut has another tokenizer than the cache it is to be measured on.\n"
            f"  cache          {cache.url}  tokenizer {theirs[:8]}\n"
            f"  student.model  {tokenizer.name_or_path}  tokenizer {ours[:8]}\n"
            "  Choose a model of the teacher's family, or cut without data: "
            "student.layers=spaced student.importance=weight"
        )
    blocks = []
    for block_id in cache.epoch_order(config.seed, 0)[:num_blocks]:
        batch = cache.batch([int(block_id)])
        blocks.append(
            CalibrationBlock(batch.input_ids_BT, batch.position_ids_BT, batch.row_mask_BT)
        )
    return blocks, {"cache": cache.manifest.checksum, "blocks": num_blocks}


@contextmanager
def hooks(
    modules: list[nn.Module], make: Callable[[int], Callable[..., Any]], *, before: bool = False
) -> Iterator[None]:
    """Register `make(number)` on each module, before or after its forward, and remove all again."""
    handles = [
        module.register_forward_pre_hook(make(number))
        if before
        else module.register_forward_hook(make(number))
        for number, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def run(model: Any, blocks: list[CalibrationBlock]) -> Iterator[Tensor]:
    """Pass each block through the decoder, one at a time; yield its last hidden states."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for block in blocks:
            # Without a cache and an attention mask, attention stays within documents.
            yield model.get_decoder()(
                input_ids=block.input_ids_BT.to(device),
                position_ids=block.position_ids_BT.to(device),
                use_cache=False,
            ).last_hidden_state
    finally:
        model.train(was_training)


@torch.inference_mode()
def cross_entropy(model: Any, blocks: list[CalibrationBlock], vocab_size: int) -> float:
    """Return the mean cross-entropy with the true next tokens over all rows that count, in nats.

    Logits of padding, from `vocab_size` on, are left out.
    """
    head = model.get_output_embeddings()
    total, num_rows = 0.0, 0
    for block, hidden_BTD in zip(blocks, run(model, blocks), strict=True):
        mask_BT = block.row_mask_BT.to(hidden_BTD.device)
        labels_R = block.input_ids_BT[:, 1:].to(hidden_BTD.device)[mask_BT[:, :-1]]
        hidden_RD = hidden_BTD[mask_BT]
        for first in range(0, len(labels_R), _CHUNK_ROWS):
            rows = slice(first, first + _CHUNK_ROWS)
            logits_RV = head(hidden_RD[rows])[:, :vocab_size].float()
            total += float(F.cross_entropy(logits_RV, labels_R[rows], reduction="sum"))
        num_rows += len(labels_R)
    if num_rows == 0:
        raise ConfigError(
            f"student.calibration_blocks: in the first {len(blocks)} blocks no token counts; "
            "take more."
        )
    return total / num_rows
