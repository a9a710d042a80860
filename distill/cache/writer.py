"""Write a cache: blocks first, then shards in any order, each exactly once; the index last."""

import io
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill.cache import format as fmt
from distill.cache.coding import (
    coding_error_nats,
    decode_weights,
    encode_head,
    is_head,
    round_mantissa,
    row_differences,
)
from distill.cache.format import shard_name
from distill.cache.manifest import Manifest, ShardRecord, seal, unseal
from distill.cache.storage import Folder
from distill.data import Block
from distill.errors import CacheError
from distill.fingerprint import of_bytes
from distill.targets import SparseTargets

_ZSTD_LEVEL = 12
"""A tenth fewer bytes than the default level; 19 saves 3 % more and takes seven times as long."""


class BlockSpool:
    """Collects the blocks of a new cache and writes them as `blocks/NNNNN.parquet`.

    The manifest comes last; without one, the next start begins anew and overwrites.
    """

    def __init__(self, folder: Folder, blocks_per_shard: int) -> None:
        self.num_blocks = self.num_rows = 0
        self._folder, self._blocks_per_shard = folder, blocks_per_shard
        self._held: list[Block] = []
        self._digest = sha256()

    def add(self, block: Block) -> None:
        """Take the next block; blocks come in the order of their ids."""
        assert block.block_id == self.num_blocks
        for part in (block.input_ids_T, block.segment_lengths, block.loss_mask_T):
            self._digest.update(part.tobytes())
        self.num_blocks += 1
        self.num_rows += int(block.row_mask().sum())
        self._held.append(block)
        if len(self._held) == self._blocks_per_shard:
            self._write()

    def finish(self) -> str:
        """Write what is left; return the fingerprint of all blocks."""
        if self._held:
            self._write()
        return self._digest.hexdigest()

    def _write(self) -> None:
        shard = (self.num_blocks - 1) // self._blocks_per_shard
        table = pa.table(_block_columns(self._held), schema=fmt.block_schema())
        self._folder.write(f"{fmt.BLOCKS}/{shard_name(shard)}.parquet", _to_parquet(table))
        self._held = []


class ShardWriter:
    """Fills an existing cache: hands out blocks that have no targets yet, and publishes shards.

    Safe with any number of writers on one folder: files appear whole, and equal work gives equal
    bytes.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder

    def is_complete(self) -> bool:
        """Whether the cache has its index."""
        return self._folder.exists(fmt.INDEX)

    def pending(self, worker: int = 0, num_workers: int = 1) -> list[int]:
        """Shards without a record, of those that are `worker` modulo `num_workers`."""
        if self.is_complete():
            return []
        names = self._folder.list(fmt.SHARDS)
        mine = range(worker, self.manifest.num_shards, num_workers)
        return [shard for shard in mine if f"{shard_name(shard)}.json" not in names]

    def read_blocks(self, shard: int) -> list[Block]:
        """Return the blocks of one shard as they were spooled.

        Raises:
            CacheError: the file is missing or damaged.
        """
        name = f"{fmt.BLOCKS}/{shard_name(shard)}.parquet"
        data = self._folder.read(name)
        try:
            table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise CacheError(f"{self._folder.path(name)} is damaged: {error}") from None
        blocks = [
            Block(
                block_id,
                table["input_ids"][row].values.to_numpy(),
                table["segment_lengths"][row].values.to_numpy(),
                table["loss_mask"][row].values.to_numpy(zero_copy_only=False),
            )
            for row, block_id in enumerate(table["block_id"].to_pylist())
        ]
        if [block.block_id for block in blocks] != list(self.manifest.shard_blocks(shard)):
            raise CacheError(f"{self._folder.path(name)} holds other blocks than its name says.")
        return blocks

    def write(self, shard: int, blocks: list[Block], targets: SparseTargets) -> ShardRecord:
        """Publish one shard, then its record.

        Args:
            shard: Its number.
            blocks: All its blocks in order.
            targets: Rows of all blocks, L - 1 a block, empty where a row does not count.
        """
        name, manifest = f"{fmt.SHARDS}/{shard_name(shard)}", self.manifest
        columns, coding_error = _target_columns(targets, len(blocks), manifest)
        schema = fmt.shard_schema(manifest.targets).with_metadata(
            fmt.shard_metadata(manifest.checksum, shard)
        )
        data = _to_parquet(pa.table(_block_columns(blocks) | columns, schema=schema))
        record = ShardRecord(
            manifest=manifest.checksum,
            shard=shard,
            sha256=of_bytes(data),
            num_bytes=len(data),
            num_blocks=len(blocks),
            num_rows=sum(int(block.row_mask().sum()) for block in blocks),
            num_ids=len(targets.ids_N),
            coding_error_nats=coding_error,
        )
        try:
            self._folder.write(f"{name}.parquet", data)
            self._folder.write(f"{name}.json", seal(record.as_dict()).encode())
        except FileNotFoundError:
            # Another worker, who did the same shard, completed the cache and cleaned up.
            if not self.is_complete():
                raise
        return record

    def seal(self) -> bool:
        """Write the index if every shard has its record, and drop the spooled blocks.

        Returns:
            Whether the cache is complete now.
        """
        if not self.is_complete():
            if self.pending():
                return False
            records = [self._read_record(shard) for shard in range(self.manifest.num_shards)]
            index = {"manifest": self.manifest.checksum, "shards": [r.as_dict() for r in records]}
            self._folder.write(fmt.INDEX, seal(index).encode())
        self._folder.remove(fmt.BLOCKS)
        self._folder.remove_unfinished(fmt.SHARDS)
        return True

    def _read_record(self, shard: int) -> ShardRecord:
        name = f"{fmt.SHARDS}/{shard_name(shard)}.json"
        where = self._folder.path(name)
        record = ShardRecord.from_dict(unseal(self._folder.read(name), where), where)
        if record.manifest != self.manifest.checksum or record.shard != shard:
            raise CacheError(
                f"{where} is of another cache or place: manifest {record.manifest}, shard "
                f"{record.shard}; expected {self.manifest.checksum}, {shard}.\n  Remove the file: "
                "the shard is then captured again."
            )
        return record


def _to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    split_into_streams = [
        f"{field.name}.list.element"
        for field in table.schema
        if pa.types.is_list(field.type) and not pa.types.is_boolean(field.type.value_type)
    ]
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=False,
        use_byte_stream_split=split_into_streams,
        write_page_checksum=True,
        write_statistics=False,
        row_group_size=max(table.num_rows, 1),
    )
    return buffer.getvalue()


def _block_columns(blocks: list[Block]) -> dict[str, Any]:
    return {
        "block_id": np.array([block.block_id for block in blocks], dtype=np.int64),
        "input_ids": _lists([block.input_ids_T for block in blocks]),
        "segment_lengths": _lists([block.segment_lengths for block in blocks]),
        "loss_mask": _lists([block.loss_mask_T for block in blocks]),
    }


def _target_columns(
    targets: SparseTargets, num_blocks: int, manifest: Manifest
) -> tuple[dict[str, Any], float]:
    """Columns of the shard in any order, and the summed error of their coding in nats."""
    counts_R, num_head_R = targets.counts_R.numpy(), targets.num_head_R.numpy()
    num_tail_R = counts_R - num_head_R
    ids_N, head_N = targets.ids_N.numpy(), is_head(counts_R, num_head_R)
    exact_tail_R = targets.tail_mass_R.numpy()
    # Rounded to 1, it would leave nothing to the head.
    tail_mass_R = np.minimum(round_mantissa(exact_tail_R, 9), np.float32(1 - 2**-10))
    gaps = row_differences(ids_N[~head_N], num_tail_R)

    def cut(values: NDArray[Any], lengths_R: NDArray[Any], kind: type) -> pa.ListArray:
        return _cut(values.astype(kind), lengths_R.reshape(num_blocks, -1).sum(1))

    one_R = np.ones_like(counts_R)
    columns = {
        "num_head": cut(num_head_R, one_R, np.uint16),
        "num_tail": cut(num_tail_R, one_R, np.uint16),
        "head_ids": cut(ids_N[head_N], num_head_R, np.int32),
        "tail_gaps": cut(gaps, num_tail_R, np.int32),
        "tail_mass": cut(tail_mass_R, one_R, np.float32),
        "entropy": cut(round_mantissa(targets.entropy_R.numpy(), 7), one_R, np.float32),
    }
    weights_N, step = targets.weights_N.numpy(), manifest.head_step_nats
    if step is None:
        draws_N = np.rint(weights_N * manifest.targets["draws"])
        return columns | {"draws": cut(draws_N, counts_R, np.uint16)}, 0.0
    codes = encode_head(weights_N, head_N, step, int(manifest.targets["bits"]))
    steps = row_differences(codes, num_head_R)
    columns["head_steps"] = cut(steps, num_head_R, codes.dtype.type)
    decoded_N = decode_weights(counts_R, num_head_R, codes, tail_mass_R, step)
    error = coding_error_nats(weights_N, decoded_N)
    if manifest.has_bucket:
        error += coding_error_nats(exact_tail_R, tail_mass_R)
    if targets.log_normalisers_RJ is not None:
        normalisers_RJ = targets.log_normalisers_RJ.numpy()
        width_R = one_R * normalisers_RJ.shape[1]
        columns["log_normalisers"] = cut(normalisers_RJ.reshape(-1), width_R, np.float32)
    return columns, error


def _lists(parts: Iterable[NDArray[Any]]) -> pa.ListArray:
    parts = list(parts)
    return _cut(np.concatenate(parts), np.array([len(part) for part in parts]))


def _cut(values: NDArray[Any], lengths: NDArray[Any]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
