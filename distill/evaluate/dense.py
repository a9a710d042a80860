"""Teacher and student side by side over whole distributions, where both can be loaded.

Shape suffixes: R rows that count, D hidden size, V vocabulary, M measures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.cache.reader import Batch, Cache
from distill.evaluate.fidelity import Estimate, by_document, clustered_mean, sums_by_segment

_ROWS_AT_ONCE = 256
"""Rows whose logits of both models exist at a time."""


@dataclass(frozen=True, slots=True)
class Exact:
    """Means over all rows that count, at the cache's temperature."""

    kl_nats: Estimate
    """KL(teacher || model)."""
    agreement: Estimate
    """Share of rows where the likeliest tokens are the same."""
    acceptance: Estimate
    """sum of min(t, q): the share of the model's draws that the teacher accepts in speculative
    decoding (Leviathan et al. 2023, arXiv:2211.17192), and 1 - total variation."""


@torch.no_grad()
def measure_exactly(
    model: Any,
    teacher: Any,
    cache: Cache,
    *,
    device: torch.device,
    on_block: Callable[[int], None] | None = None,
) -> Exact:
    """Score every block of `cache` with both models.

    Args:
        model: A causal language model of transformers, on `device`.
        teacher: Another, with the same tokenizer, on `device`.
        cache: Its blocks and temperature are used, its targets are not.
        device: Where both are.
        on_block: Called with the number of tokens after each block.
    """
    manifest, blocks = cache.manifest, []
    for block_id in range(len(cache)):
        batch = cache.batch([block_id]).to(device)
        hidden = [hidden_states(each, batch) for each in (model, teacher)]
        parts = []
        for first in range(0, len(batch.labels_R), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            q_RV, t_RV = (
                each.get_output_embeddings()(hidden_RD[rows])[:, : manifest.vocab_size].float()
                for each, hidden_RD in zip((model, teacher), hidden, strict=True)
            )
            parts.append(compare(q_RV / manifest.temperature, t_RV / manifest.temperature))
        blocks.append(sums_by_segment(batch, torch.cat(parts)))
        if on_block is not None:
            on_block(manifest.block_length)
    sums_CM, counts_C = by_document(blocks)
    return Exact(*(clustered_mean(sums_C, counts_C) for sums_C in sums_CM.unbind(1)))


def compare(logits_RV: Tensor, teacher_logits_RV: Tensor) -> Tensor:
    """Return KL(teacher || model), agreement and acceptance of each row, float64 [R, 3]."""
    logq_RV, logt_RV = logits_RV.log_softmax(-1), teacher_logits_RV.log_softmax(-1)
    q_RV, t_RV = logq_RV.exp(), logt_RV.exp()
    kl_R = (t_RV * (logt_RV - logq_RV)).sum(-1)
    agrees_R = logq_RV.argmax(-1) == logt_RV.argmax(-1)
    accepted_R = torch.minimum(q_RV, t_RV).sum(-1)
    return torch.stack([kl_R.double(), agrees_R.double(), accepted_R.double()], dim=1)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Return a model's last hidden states of the rows that count, [R, D]."""
    # As in training: positions that restart, no mask and no cache keep packed documents apart.
    hidden_BTD = model.get_decoder()(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    ).last_hidden_state
    hidden_RD: Tensor = hidden_BTD[batch.row_mask_BT]
    return hidden_RD
