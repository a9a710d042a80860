"""Which blocks each step sees: decided by seed and step alone, so any step can be the first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distill.cache.joined import JoinedCache
from distill.cache.reader import Batch
from distill.config import ExperimentConfig


def read_steps(
    cache: JoinedCache, config: ExperimentConfig, process: int, num_processes: int, steps: range
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield each step with this process's micro-batches; a thread reads one step ahead.

    Args:
        cache: All caches of the training.
        config: For the seed of its training and its train section.
        process: Number of this process.
        num_processes: How many share a step.
        steps: Which steps, counted from 0; finding the first costs the same wherever it is.

    Raises:
        CacheError: a shard is damaged.
    """
    settings = config.train
    orders: dict[int, Any] = {}

    def read(step: int) -> list[Batch]:
        mine = []
        first = step * settings.blocks_per_step + process
        for place in range(first, (step + 1) * settings.blocks_per_step, num_processes):
            epoch, within = divmod(place, len(cache))
            if epoch not in orders:
                orders.clear()
                orders[epoch] = cache.epoch_order(config.training_seed, epoch)
            mine.append(int(orders[epoch][within]))
        size = settings.micro_batch_blocks
        cuts = [mine[first : first + size] for first in range(0, len(mine), size)]
        return [cache.batch(cut, settings.temperature) for cut in cuts]

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(read, steps.start) if steps else None
        for step in steps:
            assert ahead is not None
            batches = ahead.result()
            ahead = thread.submit(read, step + 1) if step + 1 in steps else None
            yield step, batches
