"""Several caches of one identity, read as one: how a cache grows without being rewritten."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache.manifest import Manifest
from distill.cache.reader import Batch, Cache, assemble, open_cache, shuffle
from distill.errors import MismatchError, explain_difference

_SHARED = ("split", "tokenizer", "padded_vocab_size", "targets", "seed", "block_length")
"""Manifest fields that must be equal. One seed and one held-out share (below), because they decide
which documents are held out: what one cache holds out, no other may train on."""


class JoinedCache:
    """Complete caches read one after the other as if they were one; get it from `open_joined`.

    Blocks are numbered through. At most `SHUFFLE_SHARDS` shards are in memory, as in one cache.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = tuple(caches)
        self._starts = np.cumsum([0, *(len(cache) for cache in caches)])
        for cache in self.caches[1:]:
            cache.held = self.caches[0].held

    def __len__(self) -> int:
        """Return the number of blocks."""
        return int(self._starts[-1])

    @property
    def manifest(self) -> Manifest:
        """Of the first cache: the others share tokenizer, targets, temperature and block length."""
        return self.caches[0].manifest

    @property
    def num_rows(self) -> int:
        """Rows that count, over all caches."""
        return sum(cache.num_rows for cache in self.caches)

    @property
    def checksums(self) -> tuple[str, ...]:
        """Checksums of all manifests: what the joined cache is."""
        return tuple(cache.manifest.checksum for cache in self.caches)

    @property
    def url(self) -> str:
        """Folders of the caches."""
        return " + ".join(cache.url for cache in self.caches)

    def batch(self, block_ids: Sequence[int], temperature: float | None = None) -> Batch:
        """Return the given blocks, in that order; see `Cache.batch`."""
        parts = []
        for block_id in block_ids:
            if not 0 <= block_id < len(self):
                raise IndexError(f"{self.url} has {len(self)} blocks, there is no block {block_id}")
            number = int(np.searchsorted(self._starts, block_id, side="right")) - 1
            parts.append(self.caches[number].block(int(block_id - self._starts[number])))
        return assemble(tuple(block_ids), parts, self.manifest, temperature)

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Block ids of one epoch, the shards of all caches shuffled together; see `Cache`."""
        shards = []
        for start, cache in zip(self._starts, self.caches, strict=False):
            for shard in range(cache.manifest.num_shards):
                own = cache.manifest.shard_blocks(shard)
                shards.append(range(int(start) + own.start, int(start) + own.stop))
        return shuffle(shards, seed, epoch)


def open_joined(urls: Sequence[str]) -> JoinedCache:
    """Open complete caches as one.

    Args:
        urls: Their folders, one or more.

    Raises:
        CacheError: one of them is missing, incomplete or damaged.
        MismatchError: two of them differ in teacher, tokenizer, targets, seed, held-out share or
            block length, or hold the same blocks; both sides are shown.
    """
    caches = [open_cache(url) for url in urls]
    first = caches[0]
    for place, cache in enumerate(caches[1:], start=1):
        ours, theirs = _identity(first.manifest), _identity(cache.manifest)
        if ours != theirs:
            raise MismatchError(
                explain_difference(
                    "two caches that are to be read as one are not of one identity.",
                    (first.url, ours),
                    (cache.url, theirs),
                )
                + "\n  Leave one out of cache.also, or capture it again with the settings of the "
                "other."
            )
        for other in caches[:place]:
            _refuse_overlap(other, cache)
    return JoinedCache(caches)


def _identity(manifest: Manifest) -> dict[str, Any]:
    teacher = dict(manifest.teacher)
    if teacher.get("weights") is not None:  # equal weights are the same teacher in any folder
        del teacher["model"]
    shared = {name: getattr(manifest, name) for name in _SHARED}
    share = manifest.data["settings"].get("held_out_fraction")
    return {**shared, "teacher": teacher, "data.held_out_fraction": share}


def _refuse_overlap(left: Cache, right: Cache) -> None:
    """Refuse the same blocks twice: they would be seen twice as often as all others."""
    same_blocks = left.manifest.data["blocks"] == right.manifest.data["blocks"]
    one, two = (_taken(cache.manifest) for cache in (left, right))
    same_stream = one[0] == two[0] and one[1].start < two[1].stop and two[1].start < one[1].stop
    if same_blocks or same_stream:
        raise MismatchError(
            "two caches that are to be read as one hold the same blocks.\n"
            f"  {left.url}  blocks {one[1].start} to {one[1].stop - 1} of its documents\n"
            f"  {right.url}  blocks {two[1].start} to {two[1].stop - 1} of its documents\n"
            "  Leave one out of cache.also, or capture further blocks: data.skip_train_blocks."
        )


def _taken(manifest: Manifest) -> tuple[Any, range]:
    """The documents of a cache, and which of their blocks it holds."""
    settings = manifest.data["settings"]
    first = int(settings.get("skip_train_blocks", 0))
    stream = (settings.get("sources"), manifest.data["files"])
    return stream, range(first, first + manifest.num_blocks)
