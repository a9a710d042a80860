"""A whole distribution in blocks of 64, of which draws then look into a few.

Shape suffixes: R rows (positions that count), V vocabulary, G blocks of J = 64 vocabulary entries,
M draws, K largest.
"""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Vocabulary entries summed at a time; the draws then look into the few blocks that they hit."""

_CACHED_ENTRIES = 1 << 20
"""Logits that a CPU passes over at a time: 4 MB stay in its cache, where a pass costs a third."""

_NEVER = -1e30
"""Score of vocabulary entries that are not there."""


@dataclass(frozen=True, slots=True)
class Masses:
    """Probabilities of R rows, in G blocks of 64; what follows looks at blocks, then into a few."""

    inside_RGJ: Tensor
    """Of each id; the last block is filled up with zeros."""
    sums_RG: Tensor
    largest_RG: Tensor
    entropy_R: Tensor
    vocab_size: int

    @property
    def total_R(self) -> Tensor:
        """1 but for rounding, and for what was taken out."""
        return self.sums_RG.sum(-1)

    def take_out(self, rows_N: Tensor, ids_N: Tensor) -> None:
        """Set entries to zero. Sums are renewed rather than reduced: no digit is lost."""
        self.inside_RGJ.flatten(1)[rows_N, ids_N] = 0
        blocks_N = rows_N * self.sums_RG.shape[1] + ids_N // BLOCK
        renewed_N = self.inside_RGJ.flatten(0, 1).index_select(0, blocks_N).sum(-1)
        self.sums_RG.view(-1)[blocks_N] = renewed_N


class _Scratch(threading.local):
    """Memory of a CPU's thread that is used again: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return float32 [rows, columns] with anything in it, good until the name is taken anew."""
        if device.type != "cpu":  # these allocators keep what they have
            return torch.empty(rows, columns, device=device)
        if name not in self._held or self._held[name].numel() < rows * columns:
            with torch.inference_mode(False):  # else it could not be written to outside of it
                self._held[name] = torch.empty(rows * columns)
        return self._held[name][: rows * columns].view(rows, columns)


_SCRATCH = _Scratch()


def rows_at_once(logits_RV: Tensor, num_entries: int) -> int:
    """All rows on a GPU; as many as have `num_entries` logits on a CPU."""
    if logits_RV.device.type == "cpu":
        return max(1, num_entries // logits_RV.shape[1])
    return max(1, len(logits_RV))


def make_masses(logits_RV: Tensor, temperature: float) -> Masses:
    """Softmax, sums and maxima of blocks, and entropies; good until the thread's next call."""
    num_rows, vocab_size = logits_RV.shape
    num_blocks = math.ceil(vocab_size / BLOCK)
    at_once = rows_at_once(logits_RV, _CACHED_ENTRIES)
    mass_RV = _SCRATCH.take("masses", num_rows, num_blocks * BLOCK, logits_RV.device)
    inside_RGJ = mass_RV.view(num_rows, num_blocks, BLOCK)
    sums_RG, largest_RG = (mass_RV.new_empty(num_rows, num_blocks) for _ in range(2))
    entropy_R = mass_RV.new_empty(num_rows)
    for first in range(0, num_rows, at_once):
        rows = slice(first, first + at_once)
        scores_RV = _SCRATCH.take("scores", len(mass_RV[rows]), mass_RV.shape[1], mass_RV.device)
        scores_RV[:, :vocab_size] = logits_RV[rows]
        scores_RV[:, vocab_size:] = _NEVER
        if temperature != 1:
            scores_RV /= temperature
        scores_RV -= scores_RV.amax(-1, keepdim=True)
        torch.softmax(scores_RV, -1, out=mass_RV[rows])
        torch.sum(inside_RGJ[rows], -1, out=sums_RG[rows])
        torch.amax(inside_RGJ[rows], -1, out=largest_RG[rows])
        total_R = sums_RG[rows].sum(-1)
        # In blocks: one sum over a long row is cut differently for one row and for many. Scores are
        # log-probabilities but for a constant, which is that of the likeliest id (score 0).
        mean_R = scores_RV.mul_(mass_RV[rows]).view(-1, num_blocks, BLOCK).sum(-1).sum(-1)
        entropy_R[rows] = -(largest_RG[rows].amax(-1) / total_R).log() - mean_R / total_R
    # NaN stays: whoever holds the blocks says where.
    return Masses(inside_RGJ, sums_RG, largest_RG, entropy_R.clamp(min=0), vocab_size)


def top_k(masses: Masses, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their ids: they lie in the k blocks of the largest maxima."""
    inside_RGJ, vocab_size = masses.inside_RGJ, masses.vocab_size
    num_blocks = inside_RGJ.shape[1]
    if k >= num_blocks:
        return inside_RGJ.flatten(1)[:, :vocab_size].topk(k, dim=-1)
    blocks_RK = masses.largest_RG.topk(k, dim=-1, sorted=False).indices
    starts_R = torch.arange(len(blocks_RK), device=blocks_RK.device) * num_blocks
    # Whole blocks are copied, which is ten times as fast as gathering their entries.
    chosen_N = (starts_R[:, None] + blocks_RK).flatten()
    found_RKJ = inside_RGJ.flatten(0, 1).index_select(0, chosen_N).view(*blocks_RK.shape, BLOCK)
    if vocab_size % BLOCK:  # what fills the last block up is never chosen, not even at equal 0
        is_outside_J = torch.arange(BLOCK, device=found_RKJ.device) >= vocab_size % BLOCK
        found_RKJ.masked_fill_((blocks_RK == num_blocks - 1)[:, :, None] & is_outside_J, -1)
    top_RK, places_RK = found_RKJ.flatten(1).topk(k, dim=-1)
    ids_RK = torch.gather(blocks_RK, 1, places_RK // BLOCK) * BLOCK + places_RK % BLOCK
    return top_RK, ids_RK


def likeliest(masses: Masses) -> Tensor:
    """Return the likeliest id of each row, [R]."""
    blocks_R = masses.largest_RG.argmax(-1)
    rows_R = torch.arange(len(blocks_R), device=blocks_R.device)
    return blocks_R * BLOCK + masses.inside_RGJ[rows_R, blocks_R].argmax(-1)


def ids_at(places_RM: Tensor, cumulative_RG: Tensor, mass_RGJ: Tensor) -> Tensor:
    """Return the id in which each place of the cumulative mass falls: first block, then id."""
    blocks_RM = torch.searchsorted(cumulative_RG, places_RM, right=True)
    blocks_RM = blocks_RM.clamp(max=cumulative_RG.shape[1] - 1)  # rows without a tail
    inside_RMJ = torch.gather(mass_RGJ, 1, blocks_RM[:, :, None].expand(-1, -1, BLOCK)).cumsum(
        -1, dtype=torch.float64
    )
    begin_RM = torch.where(blocks_RM > 0, cumulative_RG.gather(1, (blocks_RM - 1).clamp(min=0)), 0)
    width_RM = cumulative_RG.gather(1, blocks_RM) - begin_RM
    # As a share of the block: its float32 sum and its float64 cumulative sum differ by rounding.
    share_RM = ((places_RM - begin_RM) / width_RM.clamp(min=1e-300)).clamp(0, 1 - 2**-52)
    within_RM = torch.searchsorted(
        inside_RMJ, (share_RM * inside_RMJ[:, :, -1])[:, :, None], right=True
    )[:, :, 0]
    return blocks_RM * BLOCK + within_RM
