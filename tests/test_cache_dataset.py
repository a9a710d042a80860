"""A cache behind a DataLoader: each block once, in an order that nothing but the seed changes."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from distill.cache.dataset import CacheDataset
from distill.cache.joined import open_joined
from distill.cache.reader import Cache, open_cache
from distill.errors import MismatchError

NUM_BLOCKS = 24


@pytest.fixture
def cache(written_cache: Path) -> Cache:
    return open_cache(str(written_cache / "train"))


def loaded(dataset: CacheDataset, num_workers: int = 0) -> list[tuple[int, ...]]:
    """Block ids of each batch."""
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    found = [batch.block_ids for batch in loader]
    assert len(found) == len(loader) == len(dataset)
    return found


def test_two_ranks_of_two_workers_give_each_block_once(cache: Cache) -> None:
    shares = [
        loaded(CacheDataset(cache, batch_blocks=3, rank=rank, num_ranks=2), num_workers=2)
        for rank in range(2)
    ]
    assert [len(share) for share in shares] == [4, 4]
    taken = [block for share in shares for batch in share for block in batch]
    assert sorted(taken) == list(range(NUM_BLOCKS))
    order = cache.epoch_order(0, 0).tolist()
    for rank, share in enumerate(shares):
        assert [block for batch in share for block in batch] == order[rank::2]


def test_batches_are_those_of_the_cache(cache: Cache) -> None:
    (batch, *_) = DataLoader(CacheDataset(cache, batch_blocks=2), batch_size=None, num_workers=1)
    wanted = cache.batch(batch.block_ids)
    assert torch.equal(batch.input_ids_BT, wanted.input_ids_BT)
    assert torch.equal(batch.row_mask_BT, wanted.row_mask_BT)
    assert torch.equal(batch.targets.ids_N, wanted.targets.ids_N)
    assert torch.equal(batch.targets.weights_N, wanted.targets.weights_N)


def test_number_of_workers_does_not_change_the_order(cache: Cache) -> None:
    dataset = CacheDataset(cache, batch_blocks=2, seed=4)
    dataset.set_epoch(1)
    alone = loaded(dataset)
    assert alone != loaded(CacheDataset(cache, batch_blocks=2, seed=4))
    assert [block for batch in alone for block in batch] == cache.epoch_order(4, 1).tolist()
    assert loaded(dataset, num_workers=1) == loaded(dataset, num_workers=2) == alone


def test_an_epoch_goes_on_where_it_stopped_with_another_number_of_ranks(cache: Cache) -> None:
    order = cache.epoch_order(0, 5).tolist()
    before = CacheDataset(cache, batch_blocks=3, rank=1, num_ranks=2)
    before.set_epoch(5)
    first = loaded(before)[0]
    assert list(first) == order[1:6:2]
    after = CacheDataset(cache, batch_blocks=2)
    after.set_epoch(5, blocks_taken=6)
    assert [block for batch in loaded(after, num_workers=2) for block in batch] == order[6:]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_that_stay_see_the_next_epoch(cache: Cache, context: str) -> None:
    dataset = CacheDataset(cache, batch_blocks=4)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=context,
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        found = [block for batch in loader for block in batch.block_ids]
        assert found == cache.epoch_order(0, epoch).tolist()


def test_ranks_get_equally_many_batches_and_what_is_left_out_changes(cache: Cache) -> None:
    left_out = []
    for epoch in range(3):
        taken: list[int] = []
        for rank in range(2):
            dataset = CacheDataset(cache, batch_blocks=5, rank=rank, num_ranks=2)
            dataset.set_epoch(epoch)
            batches = loaded(dataset)
            assert [len(batch) for batch in batches] == [5, 5]
            taken += [block for batch in batches for block in batch]
        assert len(set(taken)) == len(taken) == 20
        left_out.append(set(range(NUM_BLOCKS)) - set(taken))
    assert left_out[0] != left_out[1] != left_out[2]


def test_joined_caches_are_one(written_cache: Path) -> None:
    joined = open_joined([str(written_cache / "train")])
    found = loaded(CacheDataset(joined, batch_blocks=6, seed=2))
    assert [block for batch in found for block in batch] == joined.epoch_order(2, 0).tolist()


def test_a_temperature_that_the_cache_lacks_is_refused(cache: Cache) -> None:
    with pytest.raises(MismatchError, match="not captured for this temperature"):
        loaded(CacheDataset(cache, temperature=2.0))


def test_shares_and_sizes_that_do_not_fit_are_refused(cache: Cache) -> None:
    with pytest.raises(ValueError, match="there is no rank 2 of 2"):
        CacheDataset(cache, rank=2, num_ranks=2)
    with pytest.raises(
        ValueError, match=r"batch_blocks \(13\) times num_ranks \(2\) .* the 24 blocks"
    ):
        CacheDataset(cache, batch_blocks=13, rank=0, num_ranks=2)
    with pytest.raises(ValueError, match=r"batch_blocks \(0\)"):
        CacheDataset(cache, batch_blocks=0)
    with pytest.raises(ValueError, match="25 blocks cannot be taken of the 24"):
        CacheDataset(cache).set_epoch(0, blocks_taken=25)
