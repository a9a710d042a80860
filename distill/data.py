"""Documents or chats into packed blocks with a loss mask.

A block is `block_length` token ids. Documents follow each other in blocks without gaps; one that
does not fit goes on in the next block as a segment of its own. Attention never crosses segments
(positions restart), and no row predicts the first token of a segment. Shape suffix: T positions.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.config import DataConfig, SourceConfig
from distill.errors import ConfigError
from distill.fingerprint import of_file
from distill.tokens import end_id, tokenize_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "held_out")
_TEXTS_AT_ONCE = 256
"""Documents tokenized per call: enough for the tokenizer's threads, little memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One packed row of tokens."""

    block_id: int
    input_ids_T: NDArray[np.int32]
    segment_lengths: NDArray[np.int32]
    """Tokens of each document in the block; their sum is T."""
    loss_mask_T: NDArray[np.bool_]
    """True where the token counts as a label."""

    def position_ids(self) -> NDArray[np.int64]:
        """Positions that restart at every segment, [T]."""
        starts = np.cumsum(self.segment_lengths) - self.segment_lengths
        return np.arange(len(self.input_ids_T)) - np.repeat(starts, self.segment_lengths)

    def row_mask(self) -> NDArray[np.bool_]:
        """True where row t counts, [T - 1]: token t + 1 is a label and begins no segment."""
        counts = self.loss_mask_T[1:].copy()
        counts[np.cumsum(self.segment_lengths)[:-1] - 1] = False
        return counts


def make_blocks(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> Iterator[tuple[str, Block]]:
    """Read documents in order and yield (split, block), until both splits have what is asked for.

    A document belongs to `held_out` by the hash of its text and the seed, whatever its neighbours.
    The last block of each split is filled up with masked end-of-text tokens.

    Raises:
        ConfigError: a source cannot be opened, a column is missing, or a split stays empty.
    """
    limits = {"train": config.train_blocks, "held_out": config.held_out_blocks}
    skipped = {"train": config.skip_train_blocks, "held_out": 0}
    if config.train_blocks is not None:
        limits["train"] = config.skip_train_blocks + config.train_blocks
    packers = {split: _Packer(config.block_length, end_id(tokenizer)) for split in SPLITS}

    def kept(split: str, blocks: Iterator[Block]) -> Iterator[tuple[str, Block]]:
        for block in blocks:
            if block.block_id >= skipped[split]:
                yield split, replace(block, block_id=block.block_id - skipped[split])

    for batch in _batches(_documents(config, seed), _TEXTS_AT_ONCE):
        wanted = []
        for number, item in batch:
            source = config.sources[number]
            _require_item(item, source, number)
            split = _split_of(item, seed, config.held_out_fraction)
            if not packers[split].is_full(limits[split]):
                wanted.append((split, source, item))
        for (split, _, _), (ids, mask) in zip(
            wanted, tokenize_documents(wanted, tokenizer), strict=True
        ):
            yield from kept(split, packers[split].add(ids, mask, limits[split]))
        if all(packers[split].is_full(limits[split]) for split in SPLITS):
            return
    for split, packer in packers.items():
        yield from kept(split, packer.flush(limits[split]))
        if packer.num_blocks <= skipped[split]:
            after = f" after the first {skipped[split]:,}" if skipped[split] else ""
            raise ConfigError(
                f"the documents of `data.sources` gave no {split} block of {config.block_length} "
                f"tokens{after}.\n  Give more documents, or change data.held_out_fraction "
                f"(now {config.held_out_fraction})."
            )


def source_fingerprints(config: DataConfig) -> dict[str, str]:
    """Fingerprint of each local file that the sources name; hub data is pinned by its revision.

    Raises:
        ConfigError: a pattern of `data_files` matches nothing.
    """
    prints: dict[str, str] = {}
    for number, source in enumerate(config.sources):
        patterns = [pattern for pattern in source.data_files or () if "://" not in pattern]
        if Path(source.path).is_dir():
            patterns.append(f"{source.path}/**")
        for pattern in patterns:
            files = local_files(pattern)
            if not files:
                raise ConfigError(f"data.sources.{number}.data_files: nothing matches {pattern!r}.")
            prints |= {str(path): of_file(path) for path in files}
    return prints


def local_files(pattern: str) -> list[Path]:
    """Return the files that a pattern of `data_files` matches, sorted; `**` crosses folders."""
    # Path.glob takes no absolute pattern.
    found = [Path(name) for name in sorted(glob(pattern, recursive=True))]  # noqa: PTH207
    return [path for path in found if path.is_file()]


def _documents(config: DataConfig, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield (number of the source, text or messages); several sources are mixed by weight."""
    streams = {n: iter(_open_source(source, n)) for n, source in enumerate(config.sources)}
    random = np.random.default_rng(seed)
    while streams:
        numbers = list(streams)
        weights = np.array([config.sources[number].weight for number in numbers])
        number = int(random.choice(numbers, p=weights / weights.sum()))
        try:
            yield number, next(streams[number])["item"]
        except StopIteration:
            del streams[number]
        except (pa.ArrowException, ValueError) as error:
            raise ConfigError(
                f"data.sources.{number}: a document cannot be read: {error}"
            ) from error


def _open_source(source: SourceConfig, number: int) -> Any:
    import datasets

    # Local files are read as they are now; the library's own cache goes by path and time.
    is_local = source.data_files is not None and "[" not in source.split
    try:
        data = datasets.load_dataset(
            source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            data_files=list(source.data_files) if source.data_files else None,
            streaming=source.streaming or is_local,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"data.sources.{number}: cannot open {source.path!r}: {error}") from error
    if data.column_names is not None and source.column not in data.column_names:
        raise ConfigError(
            f"data.sources.{number}.column: {source.path!r} has no column {source.column!r}, "
            f"only {', '.join(data.column_names)}."
        )
    return data.select_columns(source.column).rename_column(source.column, "item")


def _require_item(item: Any, source: SourceConfig, number: int) -> None:
    """Refuse what is no text, or no list of messages."""
    if source.format == "text":
        fits = isinstance(item, str)
    else:
        fits = isinstance(item, list) and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in item
        )
    if not fits:
        wanted = "text" if source.format == "text" else "a list of {role, content} messages"
        raise ConfigError(
            f"data.sources.{number}.column: expected {wanted} in {source.column!r}, found "
            f"{str(item)[:80]!r}.\n  Choose another column or format, or remove such documents."
        )


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def _split_of(item: Any, seed: int, fraction: float) -> str:
    text = (
        item if isinstance(item, str) else repr([(turn["role"], turn["content"]) for turn in item])
    )
    digest = hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


class _Packer:
    """Concatenates documents and cuts them into blocks."""

    def __init__(self, block_length: int, pad_id: int) -> None:
        self.num_blocks = 0
        self._length, self._pad_id, self._filled = block_length, pad_id, 0
        self._ids: list[NDArray[np.int32]] = []
        self._masks: list[NDArray[np.bool_]] = []

    def is_full(self, limit: int | None) -> bool:
        return limit is not None and self.num_blocks >= limit

    def add(
        self, ids: NDArray[np.int32], mask: NDArray[np.bool_], limit: int | None
    ) -> Iterator[Block]:
        while len(ids) and not self.is_full(limit):
            room = self._length - self._filled
            self._ids.append(ids[:room])
            self._masks.append(mask[:room])
            self._filled += len(ids[:room])
            ids, mask = ids[room:], mask[room:]
            if self._filled == self._length:
                yield self._cut()

    def flush(self, limit: int | None) -> Iterator[Block]:
        """Fill up the block in work, if it has any row."""
        if self._filled > 1 and not self.is_full(limit):
            room = self._length - self._filled
            if room:
                self._ids.append(np.full(room, self._pad_id, dtype=np.int32))
                self._masks.append(np.zeros(room, dtype=np.bool_))
            yield self._cut()

    def _cut(self) -> Block:
        block = Block(
            self.num_blocks,
            np.concatenate(self._ids),
            np.array([len(part) for part in self._ids], dtype=np.int32),
            np.concatenate(self._masks),
        )
        self.num_blocks += 1
        self._ids, self._masks, self._filled = [], [], 0
        return block
