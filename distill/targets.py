"""Sparse targets: the one shape in which teacher knowledge travels.

Shape suffixes: R rows (positions that count), N entries of all rows in turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.errors import MismatchError


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Teacher distributions of R rows, each a few weighted token ids; ragged, stored flat.

    Row r owns the next `counts_R[r]` entries of `ids_N` and `weights_N`: first `num_head_R[r]` head
    entries with their exact probabilities, the likeliest first; then tail entries by rising id. Of
    `threshold`, tail entries share one weight; of `sampled`, all entries weigh what was drawn of
    them, and the head is the likeliest id alone, at weight 0 if it never was.
    """

    ids_N: Tensor
    """Token ids, int64."""
    weights_N: Tensor
    """Weights, float32. A row sums to 1, or to 1 - tail_mass if `has_bucket`."""
    counts_R: Tensor
    """Entries of each row, int64."""
    num_head_R: Tensor
    """Head entries of each row, int64."""
    tail_mass_R: Tensor
    """Teacher's probability outside the head, float32."""
    entropy_R: Tensor
    """Entropy of the teacher's whole distribution, nats, float32."""
    log_normalisers_RJ: Tensor | None = None
    """Of `top_k`, for J further temperatures T: log sum_v t_v^(temperature / T), float32."""
    temperature: float = 1.0
    """Softmax temperature; the student is scored at the same one."""
    has_bucket: bool = False
    """True (`top_k`): tail_mass is one more outcome. False: the tail entries carry it, unbiased."""

    @classmethod
    def empty(cls, temperature: float = 1.0, *, has_bucket: bool = False) -> "SparseTargets":
        """Return targets of no rows."""
        ids, mass = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        parts = (ids, mass, ids.clone(), ids.clone(), mass.clone(), mass.clone())
        return cls(*parts, temperature=temperature, has_bucket=has_bucket)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.counts_R)

    def row_of_entry(self) -> Tensor:
        """Return the row of each entry, int64 [N]."""
        rows_R = torch.arange(self.num_rows, device=self.counts_R.device)
        return torch.repeat_interleave(rows_R, self.counts_R, output_size=len(self.ids_N))

    def is_head(self) -> Tensor:
        """Return whether each entry is one of the head, bool [N]."""
        rows_N = self.row_of_entry()
        starts_R = self.counts_R.cumsum(0) - self.counts_R
        places_N = torch.arange(len(rows_N), device=rows_N.device) - starts_R[rows_N]
        return places_N < self.num_head_R[rows_N]

    def slice_rows(self, first: int, last: int, starts_R: Tensor) -> "SparseTargets":
        """Return rows first .. last - 1; `starts_R` [R + 1], on the CPU: first entry of each."""
        entries = slice(int(starts_R[first]), int(starts_R[last]))
        return self._map(lambda values: values[entries], lambda values: values[first:last])

    def keep_rows(self, mask_R: Tensor) -> "SparseTargets":
        """Return the rows where `mask_R` is true, entries included."""
        mask_N = mask_R[self.row_of_entry()]
        return self._map(lambda values: values[mask_N], lambda values: values[mask_R])

    def scatter_rows(self, mask_R: Tensor) -> "SparseTargets":
        """Inverse of `keep_rows`: put the rows where `mask_R` is true; the others are empty."""

        def spread(values: Tensor) -> Tensor:
            out = values.new_zeros(len(mask_R), *values.shape[1:])
            out[mask_R] = values
            return out

        return self._map(lambda values: values, spread)

    def to(self, device: torch.device | str) -> "SparseTargets":
        """Return the targets on `device`."""
        # What comes to the host is read at once, so it has to be there.
        is_host = torch.device(device).type == "cpu"

        def move(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=not is_host)

        return self._map(move, move)

    def _map(
        self, on_entries: Callable[[Tensor], Tensor], on_rows: Callable[[Tensor], Tensor]
    ) -> "SparseTargets":
        normalisers_RJ = self.log_normalisers_RJ
        changed: dict[str, Any] = {name: on_entries(getattr(self, name)) for name in _OF_ENTRIES}
        changed |= {name: on_rows(getattr(self, name)) for name in _OF_ROWS}
        changed["log_normalisers_RJ"] = None if normalisers_RJ is None else on_rows(normalisers_RJ)
        return replace(self, **changed)


_OF_ENTRIES = ("ids_N", "weights_N")
_OF_ROWS = ("counts_R", "num_head_R", "tail_mass_R", "entropy_R")


def concatenate(parts: list[SparseTargets]) -> SparseTargets:
    """Join targets of one kind and temperature row after row."""
    names = [*_OF_ENTRIES, *_OF_ROWS]
    if all(part.log_normalisers_RJ is not None for part in parts):
        names.append("log_normalisers_RJ")
    joined: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
    return replace(parts[0], **joined)


def at_temperature(
    targets: SparseTargets, temperature: float | None, available: Sequence[float]
) -> SparseTargets:
    """Turn `top_k` targets into those of another temperature, exactly but for their coding.

    With t the probabilities at temperature T0, those at T are t_i^(T0 / T) / sum_v t_v^(T0 / T);
    the sums were taken over the whole vocabulary at capture.

    Args:
        targets: With `log_normalisers_RJ` of `available`.
        temperature: T.
        available: The further temperatures of the cache, in its order.

    Raises:
        MismatchError: the cache has nothing for T; both sides are shown.
    """
    if temperature not in available or targets.log_normalisers_RJ is None:
        raise MismatchError(
            "the targets were not captured for this temperature.\n"
            f"  asked for  {temperature}\n"
            f"  captured   {[targets.temperature, *available]}\n"
            "  Choose one of these, or capture top_k targets with targets.also_temperatures."
        )
    assert temperature is not None
    share, rows_N = targets.temperature / temperature, targets.row_of_entry()
    normaliser_R = targets.log_normalisers_RJ[:, available.index(temperature)]
    weights_N = (share * targets.weights_N.log() - normaliser_R[rows_N]).exp()
    head_R = torch.zeros_like(normaliser_R).index_add(0, rows_N, weights_N)
    return replace(
        targets,
        weights_N=weights_N,
        tail_mass_R=(1 - head_R).clamp(min=0),
        temperature=temperature,
        log_normalisers_RJ=None,
    )
