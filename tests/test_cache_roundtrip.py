import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache import format as fmt
from distill.cache.inspect import find_faults
from distill.cache.manifest import Manifest
from distill.cache.reader import SHUFFLE_SHARDS, Cache, open_cache
from distill.cache.storage import Folder
from distill.cache.writer import ShardWriter
from distill.config import TargetsConfig, ThresholdConfig, TopKConfig, parse, to_tree
from distill.data import Block
from distill.draw import draw
from distill.errors import ConfigError
from distill.targets import SparseTargets, concatenate
from distill.uniforms import row_uniforms
from tests.conftest import folder_bytes, make_manifest, write_cache

_NUMBERS = itertools.count()
_BITS: Sequence[Literal[8, 16]] = (8, 16)


@dataclass(frozen=True)
class Made:
    """A made-up cache before it is written; `targets` hold all rows of each block."""

    manifest: Manifest
    blocks: list[Block]
    targets: list[SparseTargets]

    def written(self, url: str | None = None) -> Cache:
        url = url or f"memory://made/{next(_NUMBERS)}"
        write_cache(url, self.manifest, self.blocks, self.targets)
        return open_cache(url)


def logits(teacher: str, num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    if teacher == "uniform":
        return torch.zeros(num_rows, vocab_size)
    if teacher == "random":
        return torch.randn(num_rows, vocab_size, generator=random) * 3
    hot = torch.randint(vocab_size, (num_rows, 1), generator=random)
    gap = {"confident": 30.0, "one-hot": 1000.0}[teacher]
    return torch.zeros(num_rows, vocab_size).scatter(1, hot, gap)


def make(blocks: list[Block], config: TargetsConfig, teacher: str, vocab_size: int) -> Made:
    targets = []
    for block in blocks:
        mask = torch.from_numpy(block.row_mask())
        if not mask.any():
            targets.append(SparseTargets.empty().scatter_rows(mask))
            continue
        drawn = draw(
            logits(teacher, int(mask.sum()), vocab_size, block.block_id),
            row_uniforms(0, block.block_id, len(mask))[mask],
            config,
        )
        targets.append(drawn.scatter_rows(mask))
    return Made(make_manifest(to_tree(config), vocab_size, blocks_per_shard=2), blocks, targets)


@st.composite
def blocks_of(draw_from: st.DrawFn, vocab_size: int) -> list[Block]:
    length, count = draw_from(st.integers(2, 12)), draw_from(st.integers(1, 5))
    blocks = []
    for number in range(count):
        cuts = draw_from(st.sets(st.integers(1, length - 1), max_size=3))
        mask = draw_from(
            st.one_of(
                st.just([True] * length),
                st.just([False] * length),
                st.lists(st.booleans(), min_size=length, max_size=length),
            )
        )
        ids = st.lists(st.integers(0, vocab_size - 1), min_size=length, max_size=length)
        tokens = np.array(draw_from(ids), np.int32)
        lengths = np.diff([0, *sorted(cuts), length]).astype(np.int32)
        blocks.append(Block(number, tokens, lengths, np.array(mask, np.bool_)))
    return blocks


@st.composite
def made_caches(draw_from: st.DrawFn) -> Made:
    vocab_size = draw_from(st.sampled_from([2, 3, 17, 64, 300]))
    bits = draw_from(st.sampled_from(_BITS))
    temperature = draw_from(st.sampled_from([1.0, 0.7, 2.0]))
    config: TargetsConfig
    if draw_from(st.booleans()):
        tau = draw_from(st.sampled_from([0.01, 0.025, 0.1, 0.5, 1.0]))
        config = ThresholdConfig(tau=tau, bits=bits, temperature=temperature)
    else:
        k = draw_from(st.integers(1, min(vocab_size - 1, 20)))
        config = TopKConfig(kind="top_k", k=k, bits=bits, temperature=temperature)
    teacher = draw_from(st.sampled_from(["random", "uniform", "confident", "one-hot"]))
    made = make(draw_from(blocks_of(vocab_size)), config, teacher, vocab_size)
    per_shard = draw_from(st.integers(1, 4))
    return replace(made, manifest=replace(made.manifest, blocks_per_shard=per_shard))


@given(made_caches())
@settings(max_examples=100, deadline=None)
def test_what_was_written_is_read_back(made: Made) -> None:
    cache = made.written()
    assert not [fault for fault in find_faults(cache.url) if fault]
    batch = cache.batch(range(len(made.blocks)))
    masks = [block.row_mask() for block in made.blocks]
    exact = concatenate(made.targets).keep_rows(torch.from_numpy(np.concatenate(masks)))
    for row, block in enumerate(made.blocks):
        assert batch.input_ids_BT[row].tolist() == block.input_ids_T.tolist()
        assert batch.position_ids_BT[row].tolist() == block.position_ids().tolist()
        assert batch.row_mask_BT[row].tolist() == [*block.row_mask().tolist(), False]
    labels = [b.input_ids_T[1:][mask] for b, mask in zip(made.blocks, masks, strict=True)]
    assert batch.labels_R.tolist() == np.concatenate(labels).tolist()
    for name in ("ids_N", "counts_R", "num_head_R"):
        assert getattr(batch.targets, name).tolist() == getattr(exact, name).tolist()
    assert batch.targets.temperature == made.manifest.targets["temperature"]
    assert batch.targets.has_bucket == (made.manifest.targets["kind"] == "top_k")
    torch.testing.assert_close(batch.targets.entropy_R, exact.entropy_R, rtol=2**-8, atol=0)
    require_weights_within_the_coding(batch.targets, exact, cache.manifest)
    assert sum(record.num_ids for record in cache.records) == len(exact.ids_N)
    assert sum(record.num_rows for record in cache.records) == exact.num_rows
    recorded = sum(record.coding_error_nats for record in cache.records)
    assert recorded == pytest.approx(kl_nats(exact, batch.targets), rel=1e-3, abs=1e-5)


def require_weights_within_the_coding(
    read: SparseTargets, exact: SparseTargets, manifest: Manifest
) -> None:
    """What format.py promises: half a step a code, 10 bits a tail, rows that sum to one."""
    largest = 1 - 2**-10
    torch.testing.assert_close(
        read.tail_mass_R, exact.tail_mass_R.clamp(max=largest), rtol=2**-10, atol=0
    )
    assert manifest.head_step_nats is not None
    step, starts = manifest.head_step_nats, [0, *exact.counts_R.cumsum(0).tolist()]
    for row, (first, last) in enumerate(itertools.pairwise(starts)):
        head = first + int(exact.num_head_R[row])
        tail_mass = float(read.tail_mass_R[row])
        weights = read.weights_N[first:last].double()
        assert float(weights[: head - first].sum()) == pytest.approx(1 - tail_mass, rel=1e-5)
        if head < last:
            assert weights[head - first :].tolist() == pytest.approx(
                [tail_mass / (last - head)] * (last - head), rel=1e-6
            )
        # A code is off by half a step, the sum that normalises the codes of a row as well.
        before, after = exact.weights_N[first:head].double(), weights[: head - first]
        reached = before > math.exp(-fmt.head_span_nats(manifest.targets))
        error = (after / after.sum()).log() - (before / before.sum()).log()
        assert bool((error[reached].abs() <= step + 1e-4).all())


def kl_nats(exact: SparseTargets, read: SparseTargets) -> float:
    """Sum over rows of KL(exact || read), with the tail as an outcome where it is one."""
    p, q = exact.weights_N.double(), read.weights_N.double()
    if read.has_bucket:
        p, q = torch.cat([p, exact.tail_mass_R]), torch.cat([q, read.tail_mass_R])
    return float(torch.nn.functional.kl_div(q.clamp(min=1e-300).log(), p, reduction="sum"))


def plain_blocks(count: int, length: int = 6) -> list[Block]:
    return [
        Block(
            number,
            np.arange(number, number + length, dtype=np.int32) % 17,
            np.array([2, length - 2], np.int32),
            np.ones(length, np.bool_),
        )
        for number in range(count)
    ]


def test_tail_of_almost_no_mass_is_written_so_that_it_can_be_read() -> None:
    made = make(plain_blocks(1), ThresholdConfig(tau=0.1), "one-hot", 17)
    rows = logits("one-hot", 4, 17, seed=0).clamp(max=100)  # exp(-100) is subnormal in float32
    mask = torch.from_numpy(made.blocks[0].row_mask())
    drawn = draw(rows, torch.zeros(4, dtype=torch.float64), ThresholdConfig(tau=0.1))
    cache = replace(made, targets=[drawn.scatter_rows(mask)]).written()
    assert not [fault for fault in find_faults(cache.url) if fault]


def test_no_setting_gives_a_row_more_entries_than_its_count_can_hold() -> None:
    cache = make(plain_blocks(1), ThresholdConfig(tau=1e-4), "uniform", 70_000).written()
    assert int(cache.batch([0]).targets.counts_R.max()) == 10_001
    with pytest.raises(ConfigError, match=r"tau: .* equal to 0\.0001 \(got 9e-05\)"):
        parse(ThresholdConfig, {"tau": 9e-5}, "test")
    with pytest.raises(ConfigError, match=r"k: .* equal to 65535 \(got 65536\)"):
        parse(TopKConfig, {"kind": "top_k", "k": 2**16}, "test")


def test_blocks_come_in_the_order_asked_for() -> None:
    cache = make(plain_blocks(7), ThresholdConfig(), "random", 17).written()
    order = [6, 0, 3, 3, 5]
    batch = cache.batch(order)
    alone = [cache.batch([number]) for number in order]
    assert batch.block_ids == tuple(order)
    assert batch.input_ids_BT.tolist() == [part.input_ids_BT[0].tolist() for part in alone]
    assert batch.labels_R.tolist() == torch.cat([part.labels_R for part in alone]).tolist()
    joined = concatenate([part.targets for part in alone])
    assert batch.targets.weights_N.tolist() == joined.weights_N.tolist()
    with pytest.raises(IndexError, match="7 blocks, there is no block 7"):
        cache.batch([7])


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    made = make(plain_blocks(40), ThresholdConfig(), "uniform", 17)
    first, second = made.written(), made.written()
    orders = [first.epoch_order(seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(40)]}) == 5
    assert second.epoch_order(0, 0).tolist() == orders[0]


class CountingFolder(Folder):
    """Counts how often each file is read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.reads[name] += 1
        return super().read(name)


@pytest.mark.parametrize("blocks_a_batch", [1, 3])
def test_every_shard_is_read_once_an_epoch_and_few_are_held(blocks_a_batch: int) -> None:
    opened = make(plain_blocks(41), ThresholdConfig(), "uniform", 17).written()
    folder = CountingFolder(opened.url)
    cache = Cache(folder, opened.manifest, opened.records)
    order = cache.epoch_order(seed=3, epoch=0).tolist()
    for first in range(0, len(order), blocks_a_batch):
        cache.batch(order[first : first + blocks_a_batch])
        assert len(cache.held) <= SHUFFLE_SHARDS
    assert opened.manifest.num_shards == 21
    assert folder.reads == {f"shards/{shard:05d}.parquet": 1 for shard in range(21)}


def test_bytes_depend_neither_on_the_folder_nor_on_the_order_of_shards(tmp_path: Path) -> None:
    made = make(plain_blocks(7), ThresholdConfig(), "random", 17)
    cache = made.written(str(tmp_path / "forwards"))
    backwards = Folder(str(tmp_path / "backwards"))
    backwards.write(fmt.MANIFEST, cache.manifest.to_json().encode())
    writer = ShardWriter(backwards, cache.manifest)
    for shard in reversed(writer.pending()):
        places = cache.manifest.shard_blocks(shard)
        targets = concatenate([made.targets[place] for place in places])
        writer.write(shard, [made.blocks[place] for place in places], targets)
    assert writer.seal()
    assert [*folder_bytes(tmp_path / "forwards")] == [*folder_bytes(tmp_path / "backwards")]
