"""Read a complete cache: validated, by block, in shuffled epochs whose state is two numbers.

Shape suffixes: B blocks, T positions, R rows that count, N entries.
"""

import io
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import format as fmt
from distill.cache.coding import decode_weights
from distill.cache.format import shard_name
from distill.cache.manifest import Manifest, ShardRecord, unseal
from distill.cache.storage import Folder, read_manifest
from distill.cache.validate import Columns, check_columns, check_distinct
from distill.data import Block
from distill.errors import CacheError
from distill.fingerprint import of_bytes
from distill.targets import SparseTargets, at_temperature

SHUFFLE_SHARDS = 8
"""Shards in memory at a time; blocks are shuffled within such a window, windows and shards too."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some blocks, ready for the student."""

    block_ids: tuple[int, ...]
    input_ids_BT: Tensor
    position_ids_BT: Tensor
    """Restart at every document."""
    row_mask_BT: Tensor
    """True where position t predicts a token that counts; the last position never does."""
    labels_R: Tensor
    """The tokens that follow, in the order of `row_mask_BT`."""
    targets: SparseTargets
    """The teacher's distributions for the same rows."""

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`."""
        return Batch(
            self.block_ids,
            self.input_ids_BT.to(device, non_blocking=True),
            self.position_ids_BT.to(device, non_blocking=True),
            self.row_mask_BT.to(device, non_blocking=True),
            self.labels_R.to(device, non_blocking=True),
            self.targets.to(device),
        )


@dataclass(frozen=True, slots=True)
class _Shard:
    """One shard in memory: the entries of a block are a slice."""

    columns: Columns
    weights_N: NDArray[np.float32]
    entry_starts: NDArray[np.int64]


class Cache:
    """A complete cache. Memory stays flat: at most `SHUFFLE_SHARDS` shards are held.

    Every shard is checked against its recorded SHA-256 and the rules of the format before anything
    of it is returned. Get one from `open_cache`.
    """

    def __init__(self, folder: Folder, manifest: Manifest, records: list[ShardRecord]) -> None:
        self.manifest = manifest
        self.records = records
        self.held: OrderedDict[tuple[str, int], _Shard] = OrderedDict()
        """Shards in memory, the latest used last; joined caches share one."""
        self._folder = folder

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.manifest.num_blocks

    @property
    def num_rows(self) -> int:
        """Rows that count."""
        return self.manifest.num_rows

    @property
    def url(self) -> str:
        """Folder of the cache."""
        return self._folder.url

    def batch(self, block_ids: Sequence[int], temperature: float | None = None) -> Batch:
        """Return the given blocks, in that order.

        Args:
            block_ids: Which blocks.
            temperature: The cache's own by default, or one of its further ones.

        Raises:
            CacheError: a shard is missing or damaged; it and the field are named.
            IndexError: there is no such block.
            MismatchError: the cache has nothing for that temperature.
        """
        return assemble(
            tuple(block_ids), [self.block(n) for n in block_ids], self.manifest, temperature
        )

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Block ids of one epoch in shuffled order, a function of its arguments alone.

        Shards are shuffled, then blocks within windows of `SHUFFLE_SHARDS` shards: each shard is
        read once an epoch. To resume, keep the epoch and the number of blocks taken.
        """
        shards = range(self.manifest.num_shards)
        return shuffle([self.manifest.shard_blocks(shard) for shard in shards], seed, epoch)

    def check_shard(self, shard: int) -> None:
        """Read one shard and check everything that `batch` would, and that ids are distinct.

        Raises:
            CacheError: as for `batch`.
        """
        where = self._folder.path(f"{fmt.SHARDS}/{shard_name(shard)}.parquet")
        check_distinct(self._read(shard).columns, self.manifest.vocab_size, where)

    def columns(self, shard: int) -> Columns:
        """Return the raw columns of one shard, for statistics."""
        return self._read(shard).columns

    def block(self, block_id: int) -> tuple[Block, dict[str, NDArray[Any]]]:
        """Return one block, and the fields of its `SparseTargets` by name.

        Raises:
            CacheError: its shard is missing or damaged.
            IndexError: there is no such block.
        """
        if not 0 <= block_id < len(self):
            raise IndexError(f"{self.url} has {len(self)} blocks, there is no block {block_id}")
        number, place = divmod(int(block_id), self.manifest.blocks_per_shard)
        shard = self._hold(number)
        columns = shard.columns
        block = columns.blocks[place]
        num_rows = self.manifest.block_length - 1
        rows = slice(place * num_rows, (place + 1) * num_rows)
        entries = slice(shard.entry_starts[place], shard.entry_starts[place + 1])
        kept_R = block.row_mask()
        held: dict[str, NDArray[Any]] = {
            "ids_N": columns.ids_N[entries],
            "weights_N": shard.weights_N[entries],
            "counts_R": columns.counts_R[rows][kept_R],
            "num_head_R": columns.num_head_R[rows][kept_R].astype(np.int64),
            "tail_mass_R": columns.tail_mass_R[rows][kept_R],
            "entropy_R": columns.entropy_R[rows][kept_R],
        }
        if columns.log_normalisers_RJ is not None:
            held["log_normalisers_RJ"] = columns.log_normalisers_RJ[rows][kept_R]
        return block, held

    def _hold(self, number: int) -> _Shard:
        key = (self.url, number)
        if key not in self.held:
            self.held[key] = self._read(number)
            if len(self.held) > SHUFFLE_SHARDS:
                self.held.popitem(last=False)
        self.held.move_to_end(key)
        return self.held[key]

    def _read(self, number: int) -> _Shard:
        name = f"{fmt.SHARDS}/{shard_name(number)}.parquet"
        where, record, manifest = self._folder.path(name), self.records[number], self.manifest
        data = self._folder.read(name)
        found = of_bytes(data)
        if found != record.sha256:
            raise CacheError(
                f"{where} is damaged: {len(data)} bytes with SHA-256 {found}, recorded are "
                f"{record.num_bytes} bytes with {record.sha256}.\n"
                "  Restore the file, or remove the cache and capture it again: distill cache CONFIG"
            )
        try:
            table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CacheError(f"{where} cannot be read: {error}") from None
        columns = check_columns(table, manifest, number, where)
        num_rows = sum(int(block.row_mask().sum()) for block in columns.blocks)
        held = (len(data), len(columns.blocks), num_rows, len(columns.ids_N))
        recorded = (record.num_bytes, record.num_blocks, record.num_rows, record.num_ids)
        if held != recorded:
            raise CacheError(
                f"{where} has (bytes, blocks, rows, ids) {held}, {fmt.INDEX} says {recorded}."
            )
        weights_N = _weights(columns, manifest)
        per_block = columns.counts_R.reshape(len(columns.blocks), -1).sum(1, dtype=np.int64)
        return _Shard(columns, weights_N, np.concatenate([[0], np.cumsum(per_block)]))


def assemble(
    block_ids: tuple[int, ...],
    parts: Sequence[tuple[Block, dict[str, NDArray[Any]]]],
    manifest: Manifest,
    temperature: float | None,
) -> Batch:
    """Put blocks (as from `Cache.block`) of one manifest's kind into a batch; see `Cache.batch`."""
    blocks = [block for block, _ in parts]
    row_mask_BT = np.zeros((len(blocks), manifest.block_length), dtype=np.bool_)
    for row, block in enumerate(blocks):
        row_mask_BT[row, :-1] = block.row_mask()
    input_ids_BT = torch.from_numpy(np.stack([block.input_ids_T for block in blocks])).long()
    mask_BT = torch.from_numpy(row_mask_BT)
    columns: dict[str, Any] = {
        name: torch.from_numpy(np.concatenate([held[name] for _, held in parts]))
        for name in parts[0][1]
    }
    targets = SparseTargets(
        **columns, temperature=manifest.temperature, has_bucket=manifest.has_bucket
    )
    if temperature not in (None, manifest.temperature):
        targets = at_temperature(targets, temperature, manifest.also_temperatures)
    return Batch(
        block_ids,
        input_ids_BT,
        torch.from_numpy(np.stack([block.position_ids() for block in blocks])),
        mask_BT,
        input_ids_BT[:, 1:][mask_BT[:, :-1]],
        targets,
    )


def shuffle(shards: Sequence[range], seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle shards, then their blocks within windows of `SHUFFLE_SHARDS` shards."""
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(shards))
    parts = []
    for first in range(0, len(order), SHUFFLE_SHARDS):
        window = [np.asarray(shards[shard]) for shard in order[first : first + SHUFFLE_SHARDS]]
        parts.append(random.permutation(np.concatenate(window)))
    return np.concatenate(parts)


def open_cache(url: str) -> Cache:
    """Open a complete cache.

    Args:
        url: Its folder, local or an fsspec URL.

    Raises:
        CacheError: there is no cache, it is incomplete, or its manifest or index is damaged.
    """
    folder = Folder(url)
    manifest = read_manifest(folder)
    if manifest is None:
        raise CacheError(
            f"{url} holds no cache: there is no {fmt.MANIFEST}.\n  Make one: distill cache CONFIG"
        )
    if not folder.exists(fmt.INDEX):
        done = sum(name.endswith(".json") for name in folder.list(fmt.SHARDS))
        raise CacheError(
            f"the cache {url} is incomplete: {done} of {manifest.num_shards} shards are there.\n"
            "  Finish it: distill cache CONFIG"
        )
    where = folder.path(fmt.INDEX)
    index = unseal(folder.read(fmt.INDEX), where)
    if index.get("manifest") != manifest.checksum:
        raise CacheError(
            f"{where} belongs to another manifest: it names {index.get('manifest')}, "
            f"{fmt.MANIFEST} is {manifest.checksum}."
        )
    shards = index.get("shards")
    if not isinstance(shards, list):
        raise CacheError(f"{where}, field shards: expected a list of records.")
    records = [ShardRecord.from_dict(fields, where) for fields in shards]
    if any(record.manifest != manifest.checksum for record in records):
        raise CacheError(f"{where}, field shards: a record is of another manifest.")
    if [record.shard for record in records] != list(range(manifest.num_shards)):
        raise CacheError(
            f"{where} lists {len(records)} shards, the manifest needs {manifest.num_shards}."
        )
    return Cache(folder, manifest, records)


def _weights(columns: Columns, manifest: Manifest) -> NDArray[np.float32]:
    """Weights of all entries of a shard."""
    if columns.draws_N is not None:
        return columns.draws_N.astype(np.float32) / np.float32(manifest.targets["draws"])
    assert columns.head_codes is not None
    assert manifest.head_step_nats is not None
    return decode_weights(
        columns.counts_R,
        columns.num_head_R,
        columns.head_codes,
        columns.tail_mass_R,
        manifest.head_step_nats,
    )
