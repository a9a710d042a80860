"""The batch job: documents -> blocks -> teacher -> cache. Read from top to bottom.

Any number of workers may run `capture` at once; they share nothing but the folder. Killed at any
moment, a worker loses at most the shard in work, and the next start goes on from there.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill import fingerprint
from distill.cache import format as fmt
from distill.cache.manifest import Manifest, ShardRecord
from distill.cache.storage import Folder, read_manifest, write_manifest
from distill.cache.writer import BlockSpool, ShardWriter
from distill.config import ExperimentConfig, to_tree
from distill.data import SPLITS, Block, make_blocks, source_fingerprints
from distill.errors import CacheError, ConfigError, MismatchError, explain_difference
from distill.models import load_config, load_tokenizer
from distill.progress import ProgressBar
from distill.targets import SparseTargets, concatenate
from distill.teacher import Teacher, open_teacher

_SHARDS_IN_FLIGHT = 2
"""Shards being encoded and written while the teacher computes the next ones."""


def capture(config: ExperimentConfig, *, worker: int = 0, num_workers: int = 1) -> bool:
    """Cache the teacher's targets of both splits, as far as they are not there yet.

    Args:
        config: The experiment.
        worker: This worker takes the shards whose number leaves this remainder ...
        num_workers: ... when divided by this.

    Returns:
        Whether both caches are complete now (other workers may still be busy).

    Raises:
        ConfigError: data or teacher cannot be opened.
        MismatchError: the folder holds a cache of something else; both sides are shown.
        TeacherError: the teacher's logits are unusable.
        StorageError: no space; what is finished stays.
    """
    if _is_follower(config):
        tokenizer = load_tokenizer(*_tokenizer_source(config))
        for _ in open_teacher(config, len(tokenizer)).score(()):
            pass  # process 0 writes what all computed
        return True
    try:
        manifests = prepare(config)
    except FileNotFoundError:
        if incomplete_splits(config):
            raise
        # While this worker packed, another completed the caches and removed the spooled blocks.
        manifests = prepare(config)
    writers = {s: ShardWriter(Folder(config.cache_folder(s)), m) for s, m in manifests.items()}
    pending = {s: writer.pending(worker, num_workers) for s, writer in writers.items()}
    if any(pending.values()):
        teacher = open_teacher(config, manifests["train"].vocab_size)
        for split in reversed(SPLITS):  # held-out first: it is small and shows mistakes early
            if pending[split]:
                _fill(writers[split], pending[split], teacher, f"capture {split}")
        teacher.close()
    sealed = [writer.seal() for writer in writers.values()]
    return all(sealed)


def _is_follower(config: ExperimentConfig) -> bool:
    """Whether this process only computes its share of a tensor-parallel teacher.

    Raises:
        ConfigError: torchrun started several processes for a teacher that cannot share its work.
    """
    rank, size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    if size > 1 and not getattr(config.teacher, "tensor_parallel", False):
        raise ConfigError(
            f"the capture was started as {size} processes, which would all do the same work.\n"
            "  Give teacher.tensor_parallel=true (kind resident), or start it as one process: "
            "distill cache CONFIG"
        )
    return rank > 0


def prepare(config: ExperimentConfig) -> dict[str, Manifest]:
    """Return the manifests of both splits; where there are none yet, make blocks and manifests.

    Raises:
        MismatchError: a manifest is there, of something else.
    """
    fields = _identity(config)
    manifests = {}
    for split in SPLITS:
        folder = config.cache_folder(split)
        manifest = read_manifest(Folder(folder))
        if manifest is not None:
            blocks = manifest.data["blocks"]
            wanted = _manifest(fields, split, blocks, manifest.num_blocks, manifest.num_rows)
            require_same(manifest, wanted, folder)
            manifests[split] = manifest
    if len(manifests) < len(SPLITS):
        spools = {
            s: BlockSpool(Folder(config.cache_folder(s)), config.cache.blocks_per_shard)
            for s in SPLITS
        }
        tokenizer = load_tokenizer(*_tokenizer_source(config))
        with ProgressBar("pack", _expected_tokens(config)) as bar:
            for split, block in make_blocks(config.data, tokenizer, config.seed):
                spools[split].add(block)
                bar.advance(config.data.block_length)
        for split, spool in spools.items():
            made = _manifest(fields, split, spool.finish(), spool.num_blocks, spool.num_rows)
            folder = config.cache_folder(split)
            require_same(manifests.get(split, made), made, folder)
            if split not in manifests:
                write_manifest(Folder(folder), made)
                manifests[split] = made
    return manifests


def require_same(found: Manifest, wanted: Manifest, folder: str) -> None:
    """Refuse a cache whose manifest is not the one that the config asks for.

    Raises:
        MismatchError: every field that differs is shown with both sides.
    """
    if found.identity() != wanted.identity():
        raise MismatchError(
            explain_difference(
                f"the cache {folder} was made with other settings than the config has.",
                ("cache", found.identity()),
                ("config", wanted.identity()),
            )
            + "\n  Give the settings of the cache, or another `run_folder` or `cache.folder`, or "
            f"remove the folder {folder}."
        )


def _fill(writer: ShardWriter, shards: list[int], teacher: Teacher, name: str) -> None:
    """Score the shards in turn; a thread encodes and writes one while the next is scored."""
    manifest, length = writer.manifest, writer.manifest.block_length
    remaining = sum(len(manifest.shard_blocks(shard)) for shard in shards) * length
    handed: deque[tuple[int, list[Block]]] = deque()

    def groups() -> Iterator[list[Block]]:
        for shard in shards:
            try:
                blocks = writer.read_blocks(shard)
            except CacheError:
                if writer.is_complete():  # another worker did our shards too, and cleaned up
                    return
                raise
            handed.append((shard, blocks))
            yield blocks

    with (
        ProgressBar(name, manifest.num_tokens, done=manifest.num_tokens - remaining) as bar,
        ThreadPoolExecutor(1) as thread,
    ):
        in_flight: deque[Future[ShardRecord]] = deque()
        targets: list[SparseTargets] = []
        for target in teacher.score(groups()):
            targets.append(target)
            shard, blocks = handed[0]
            bar.advance(length, f"shard {shard + 1} of {manifest.num_shards}")
            if len(targets) == len(blocks):
                if len(in_flight) == _SHARDS_IN_FLIGHT:
                    in_flight.popleft().result()
                in_flight.append(thread.submit(writer.write, shard, blocks, concatenate(targets)))
                handed.popleft()
                targets = []
        for future in in_flight:
            future.result()


def _identity(config: ExperimentConfig) -> dict[str, Any]:
    """All manifest fields that are known before any block is made."""
    teacher = config.teacher
    model = load_config(teacher.model, "teacher.model", teacher.revision)
    tokenizer = load_tokenizer(*_tokenizer_source(config))
    vocab_size = len(tokenizer)
    padded = int(model.get_text_config().vocab_size)
    if padded < vocab_size:
        raise MismatchError(
            "the tokenizer has more tokens than the teacher has logits.\n"
            f"  teacher    {teacher.model}  {padded:,} logits\n"
            f"  tokenizer  {_tokenizer_source(config)[0]}  {vocab_size:,} tokens\n"
            "  Use the teacher's own tokenizer: leave out data.tokenizer."
        )
    quantisation = dict(getattr(model, "quantization_config", None) or {})
    settings = to_tree(config)
    targets = settings["targets"]
    folder = Path(teacher.model)
    try:
        weights = fingerprint.of_weights(folder) if folder.exists() else None
    except FileNotFoundError as error:
        raise ConfigError(f"teacher.model: {error}.") from None
    return {
        "teacher": {
            "model": teacher.model,
            "revision": getattr(model, "_commit_hash", None) or teacher.revision,
            "weights": weights,
            "dtype": teacher.dtype,
            "quantisation": "gguf"
            if folder.suffix == ".gguf"
            else quantisation.get("quant_method"),
            "licence": teacher.licence,
        },
        "tokenizer": {"fingerprint": fingerprint.of_tokenizer(tokenizer), "vocab_size": vocab_size},
        "padded_vocab_size": padded,
        "data": {"settings": settings["data"], "files": source_fingerprints(config.data)},
        "targets": targets,
        "seed": config.seed,
        "head_step_nats": fmt.head_step_nats(targets),
        "block_length": config.data.block_length,
        "blocks_per_shard": config.cache.blocks_per_shard,
    }


def _manifest(
    fields: dict[str, Any], split: str, blocks: str, num_blocks: int, num_rows: int
) -> Manifest:
    return Manifest(
        **(fields | {"data": fields["data"] | {"blocks": blocks}}),
        split=split,
        num_blocks=num_blocks,
        num_rows=num_rows,
        versions={name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")},
    )


def _tokenizer_source(config: ExperimentConfig) -> tuple[str, str, str | None]:
    """Name, setting and revision of the tokenizer."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer, "data.tokenizer", None
    return config.teacher.model, "teacher.model", config.teacher.revision


def _expected_tokens(config: ExperimentConfig) -> int:
    blocks = (config.data.train_blocks or 0) + (config.data.held_out_blocks or 0)
    return blocks * config.data.block_length


def incomplete_splits(config: ExperimentConfig) -> list[str]:
    """Return the splits whose cache is not complete."""
    return [s for s in SPLITS if not Folder(config.cache_folder(s)).exists(fmt.INDEX)]
