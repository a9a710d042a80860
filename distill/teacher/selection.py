"""From final hidden states to sparse targets, a few rows at a time: what teachers share.

Shape suffixes: B blocks, T positions, D hidden size, V vocabulary, R rows that count.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.config import TargetsConfig
from distill.data import Block
from distill.draw import NonFiniteRowError, draw
from distill.errors import TeacherError
from distill.targets import SparseTargets, concatenate
from distill.uniforms import row_uniforms

OnTokens = Callable[[int], None]


def tell_nobody(num_tokens: int) -> None:
    """Take a number of tokens, and forget it."""
    del num_tokens


class Selection:
    """Draws the targets of whole blocks; logits exist for `chunk_rows` rows at a time."""

    def __init__(
        self, name: str, targets: TargetsConfig, seed: int, vocab_size: int, chunk_rows: int
    ) -> None:
        self._name, self._targets, self._seed = name, targets, seed
        self._vocab_size, self._chunk_rows = vocab_size, chunk_rows

    def select(
        self, hidden_BTD: Tensor, blocks: Sequence[Block], head: Callable[[Tensor], Tensor]
    ) -> Iterator[SparseTargets]:
        """Yield the targets of each block in order, on the CPU.

        Args:
            hidden_BTD: Final hidden states, after the last norm.
            blocks: Their blocks.
            head: From hidden states [R, D] to logits [R, V or more].

        Raises:
            TeacherError: logits are NaN or infinite; teacher, block and row are named.
        """
        masks = [torch.from_numpy(block.row_mask()) for block in blocks]
        uniforms_R = torch.cat(
            [
                row_uniforms(self._seed, block.block_id, len(mask))[mask]
                for block, mask in zip(blocks, masks, strict=True)
            ]
        )
        hidden_RD = hidden_BTD[torch.stack([_with_last(mask) for mask in masks])]
        parts: list[SparseTargets] = []
        for first in range(0, len(hidden_RD), self._chunk_rows):
            rows = slice(first, first + self._chunk_rows)
            logits_RV = head(hidden_RD[rows])[:, : self._vocab_size]
            try:
                parts.append(draw(logits_RV, uniforms_R[rows], self._targets))
            except NonFiniteRowError as error:
                raise self._name_row(first + error.row, blocks, masks) from None
        if not parts:
            is_top_k = self._targets.kind == "top_k"
            parts = [SparseTargets.empty(self._targets.temperature, has_bucket=is_top_k)]
        yield from _split(concatenate(parts).to("cpu"), masks)

    def _name_row(self, counted: int, blocks: Sequence[Block], masks: list[Tensor]) -> TeacherError:
        places = torch.stack(masks).nonzero()
        place, row = places[counted].tolist()
        return non_finite(self._name, blocks[place].block_id, row)


def non_finite(name: str, block_id: int, row: int) -> TeacherError:
    """Return the error for logits that are NaN or infinite."""
    return TeacherError(
        f"the teacher {name} gave NaN or infinite logits in block {block_id}, row {row}.\n"
        "  Nothing of this shard was written. Try teacher.dtype=float32 (or bfloat16 in place of "
        "float16), or check the checkpoint."
    )


def micro_batches(blocks: Sequence[Block], num_tokens: int) -> Iterator[Sequence[Block]]:
    """Cut blocks into pieces of at most `num_tokens` tokens, but never below one block."""
    at_once = max(1, num_tokens // len(blocks[0].input_ids_T))
    for first in range(0, len(blocks), at_once):
        yield blocks[first : first + at_once]


def stack_inputs(blocks: Sequence[Block], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and restarting position ids of blocks of one length, int64 [B, T] each."""
    input_ids_BT = torch.from_numpy(np.stack([block.input_ids_T for block in blocks])).long()
    position_ids_BT = torch.from_numpy(np.stack([block.position_ids() for block in blocks]))
    return input_ids_BT.to(device), position_ids_BT.to(device)


def _with_last(mask: Tensor) -> Tensor:
    """[T - 1] rows to [T] positions: the last position predicts nothing that is known."""
    return torch.cat([mask, mask.new_zeros(1)])


def _split(joined: SparseTargets, masks: list[Tensor]) -> Iterator[SparseTargets]:
    starts_R = torch.cat([torch.zeros(1, dtype=torch.int64), joined.counts_R.cumsum(0)])
    first = 0
    for mask in masks:
        last = first + int(mask.sum())
        yield joined.slice_rows(first, last, starts_R).scatter_rows(mask)
        first = last
