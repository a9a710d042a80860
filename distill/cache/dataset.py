"""A cache as a PyTorch dataset, for loops that are not ours.

Shape suffixes: B blocks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from distill.cache.joined import JoinedCache
from distill.cache.reader import Batch, Cache


class CacheDataset(IterableDataset[Batch]):
    """The blocks of a cache as `Batch`es, an epoch at a time, in an order that seed and epoch fix.

    Hand it to `DataLoader(dataset, batch_size=None)`: its items are whole micro-batches. Rank r of
    n takes blocks r, r + n, ... of the order, as `distill.train` does. All ranks get equally many
    full batches; the few blocks that would be left at the end are left out, others in each epoch.
    Workers of a DataLoader take turns, so their number does not change the order. Each of them
    reads all shards, so one or two will do.

    Example:
        dataset = CacheDataset(open_cache("runs/x/cache/train"), batch_blocks=4)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for batch in DataLoader(dataset, batch_size=None, num_workers=1):
                ...

    Args:
        cache: From `open_cache` or `open_joined`.
        batch_blocks: Blocks a batch.
        seed: Of the order.
        rank: Which share of the blocks to take. By default that of torch.distributed, if it is
            initialised by now.
        num_ranks: Number of shares, by default likewise; processes that are to see the same
            batches (tensor parallel) name both.
        temperature: Of the targets; the cache's own by default, or one of its further ones.

    Raises:
        ValueError: there is no such rank, or the blocks do not fill one batch a rank.
    """

    def __init__(
        self,
        cache: Cache | JoinedCache,
        *,
        batch_blocks: int = 1,
        seed: int = 0,
        rank: int | None = None,
        num_ranks: int | None = None,
        temperature: float | None = None,
    ) -> None:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if is_distributed else 0
        if num_ranks is None:
            num_ranks = torch.distributed.get_world_size() if is_distributed else 1
        if not 0 <= rank < num_ranks:
            raise ValueError(
                f"CacheDataset: there is no rank {rank} of {num_ranks}; they count from 0."
            )
        if not 1 <= batch_blocks * num_ranks <= len(cache):
            raise ValueError(
                f"CacheDataset: batch_blocks ({batch_blocks}) times num_ranks ({num_ranks}) must "
                f"be between 1 and the {len(cache)} blocks of {cache.url}."
            )
        self.cache, self.batch_blocks, self.seed = cache, batch_blocks, seed
        self.rank, self.num_ranks, self.temperature = rank, num_ranks, temperature
        # Shared memory: workers that a DataLoader keeps (persistent_workers) see the next epoch.
        position: Any = torch.zeros(2, dtype=torch.int64)  # its method is untyped in torch
        self._position: Tensor = position.share_memory_()

    def set_epoch(self, epoch: int, blocks_taken: int = 0) -> None:
        """Say which epoch the next iteration goes through, and how much of it is done already.

        To resume, keep the epoch and the blocks that all ranks took of it: batches of a rank times
        `batch_blocks` times `num_ranks`. Both may be others when going on; nothing is read to skip.

        Raises:
            ValueError: an epoch has fewer blocks than that.
        """
        if not 0 <= blocks_taken <= len(self.cache):
            raise ValueError(
                f"CacheDataset: {blocks_taken} blocks cannot be taken of the {len(self.cache)} in "
                f"{self.cache.url}."
            )
        self._position.copy_(torch.tensor([epoch, blocks_taken]))

    def __len__(self) -> int:
        """Return the number of batches that this rank has left in the epoch."""
        blocks_left = len(self.cache) - int(self._position[1])
        return blocks_left // (self.batch_blocks * self.num_ranks)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches of the epoch; in a DataLoader worker, its share of them."""
        epoch, blocks_taken = self._position.tolist()
        order_B = self.cache.epoch_order(self.seed, epoch)[blocks_taken:]
        num_batches = len(order_B) // (self.batch_blocks * self.num_ranks)
        mine_B = order_B[self.rank :: self.num_ranks]
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, num_batches, every):
            start = number * self.batch_blocks
            block_ids = mine_B[start : start + self.batch_blocks].tolist()
            yield self.cache.batch(block_ids, self.temperature)
