"""The batch job: documents -> blocks -> teacher -> cache. Read from top to bottom.

Any number of workers may run `capture` at once; they share nothing but the folder. Killed at any
moment, a worker loses at most the shard in work (of a streamed teacher: the window), and the next
start goes on from there.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from transformers.utils.logging import disable_progress_bar

from distill.cache import format as fmt
from distill.cache.manifest import Manifest
from distill.cache.storage import Folder, read_manifest, write_manifest
from distill.cache.writer import BlockSpool, ShardWriter
from distill.config import ExperimentConfig
from distill.data import SPLITS, Block, make_blocks
from distill.errors import CacheError, ConfigError, MismatchError, explain_difference
from distill.identity import cache_identity, make_manifest, teacher_identity, tokenizer_source
from distill.models import load_tokenizer
from distill.progress import ProgressBar, ShardProgress
from distill.targets import SparseTargets, concatenate
from distill.teacher import Teacher, open_teacher
from distill.workers import run_workers
from distill.workers.protocol import Job, Reporter, Work

_SHARDS_IN_FLIGHT = 2
"""Shards being encoded and written while the teacher computes the next ones."""


def capture(config: ExperimentConfig, *, worker: int = 0, num_workers: int = 1) -> bool:
    """Cache the teacher's targets of both splits, as far as they are not there yet.

    Args:
        config: The experiment; `capture` says how many workers share the work, and where.
        worker: This worker takes the shards whose number leaves this remainder ...
        num_workers: ... when divided by this.

    Returns:
        Whether both caches are complete now (other workers may still be busy).

    Raises:
        ConfigError: data or teacher cannot be opened, or there is no room for the workers.
        MismatchError: the folder holds a cache of something else; both sides are shown.
        TeacherError: the teacher's logits are unusable.
        StorageError: no space; what is finished stays.
        WorkerError: more workers died than `capture.max_restarts`; what is finished stays.
    """
    if _is_follower(config):
        tokenizer = load_tokenizer(*tokenizer_source(config))
        for _ in open_teacher(config, len(tokenizer)).score(()):
            pass  # process 0 writes what all computed
        return True
    is_shared_out = config.capture.workers > 1 or config.capture.engine == "ray"
    if is_shared_out and num_workers > 1:
        raise ConfigError(
            f"--worker {worker}/{num_workers} is one of several independent workers, but the "
            f"config starts workers of its own (capture.workers={config.capture.workers}, "
            f"capture.engine={config.capture.engine}).\n"
            "  Leave out --worker, or set capture.workers=1 and capture.engine=local."
        )
    try:
        manifests = prepare(config)
    except FileNotFoundError:
        if incomplete_splits(config):
            raise
        # While this worker packed, another completed the caches and removed the spooled blocks.
        manifests = prepare(config)
    writers = {s: ShardWriter(Folder(config.cache_folder(s)), m) for s, m in manifests.items()}
    jobs = [
        Job(split, shard, len(manifests[split].shard_blocks(shard)) * config.data.block_length)
        for split in reversed(SPLITS)  # held-out first: it is small and shows mistakes early
        for shard in writers[split].pending(worker, num_workers)
    ]
    if jobs and is_shared_out:
        with _progress(manifests, jobs) as progress:
            run_workers(config, partial(_open_in_worker, config, manifests), jobs, progress)
    elif jobs:
        teacher = open_teacher(config, manifests["train"].vocab_size)
        with _progress(manifests, jobs) as progress:
            _fill(writers, teacher, jobs, progress)
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
    fields = cache_identity(config)
    manifests = {}
    for split in SPLITS:
        folder = config.cache_folder(split)
        manifest = read_manifest(Folder(folder))
        if manifest is not None:
            blocks = manifest.data["blocks"]
            wanted = make_manifest(fields, split, blocks, manifest.num_blocks, manifest.num_rows)
            require_same(manifest, wanted, folder)
            manifests[split] = manifest
    if len(manifests) < len(SPLITS):
        spools = {
            s: BlockSpool(Folder(config.cache_folder(s)), config.cache.blocks_per_shard)
            for s in SPLITS
        }
        tokenizer = load_tokenizer(*tokenizer_source(config))
        with ProgressBar("pack", _expected_tokens(config)) as bar:
            for split, block in make_blocks(config.data, tokenizer, config.seed):
                spools[split].add(block)
                bar.advance(config.data.block_length)
        for split, spool in spools.items():
            _require_rows(split, spool)
            made = make_manifest(fields, split, spool.finish(), spool.num_blocks, spool.num_rows)
            folder = config.cache_folder(split)
            require_same(manifests.get(split, made), made, folder)
            if split not in manifests:
                write_manifest(Folder(folder), made)
                manifests[split] = made
    return manifests


def _require_rows(split: str, spool: BlockSpool) -> None:
    if spool.num_rows == 0:
        raise ConfigError(
            f"no token of the {spool.num_blocks} {split} blocks counts: every loss mask is empty.\n"
            "  Of chats, only what the assistant says counts; do these have assistant turns?"
        )


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


def _open_in_worker(config: ExperimentConfig, manifests: Mapping[str, Manifest]) -> Work:
    """Load a worker's teacher, whose machine may hold another model under the same name."""
    disable_progress_bar()
    for split, manifest in manifests.items():
        wanted = dataclasses.replace(manifest, teacher=teacher_identity(config))
        require_same(manifest, wanted, config.cache_folder(split))
    writers = {s: ShardWriter(Folder(config.cache_folder(s)), m) for s, m in manifests.items()}
    return partial(_fill, writers, open_teacher(config, manifests["train"].vocab_size))


def _fill(
    writers: Mapping[str, ShardWriter], teacher: Teacher, jobs: Iterable[Job], reporter: Reporter
) -> None:
    """Score shards in turn; a thread encodes and writes one while the next is scored."""
    handed: deque[tuple[Job, list[Block]]] = deque()

    def groups() -> Iterator[list[Block]]:
        for job in jobs:
            try:
                blocks = writers[job.split].read_blocks(job.shard)
            except CacheError:
                if not writers[job.split].is_complete():
                    raise
                # Another capture did this shard too, and cleaned up.
                reporter.scored(job.num_tokens)
                reporter.published(job)
                continue
            handed.append((job, blocks))
            yield blocks

    def publish(job: Job, blocks: list[Block], targets: list[SparseTargets]) -> None:
        writers[job.split].write(job.shard, blocks, concatenate(targets))
        reporter.published(job)

    with ThreadPoolExecutor(1) as thread:
        in_flight: deque[Future[None]] = deque()
        targets: list[SparseTargets] = []
        for target in teacher.score(groups(), reporter.scored):
            targets.append(target)
            job, blocks = handed[0]
            if len(targets) == len(blocks):
                if len(in_flight) == _SHARDS_IN_FLIGHT:
                    in_flight.popleft().result()
                in_flight.append(thread.submit(publish, job, blocks, targets))
                handed.popleft()
                targets = []
        for future in in_flight:
            future.result()


def _progress(manifests: Mapping[str, Manifest], jobs: list[Job]) -> ShardProgress:
    total_tokens = sum(manifest.num_tokens for manifest in manifests.values())
    total_shards = sum(manifest.num_shards for manifest in manifests.values())
    return ShardProgress(
        "capture",
        total_tokens=total_tokens,
        done_tokens=total_tokens - sum(job.num_tokens for job in jobs),
        total_shards=total_shards,
        done_shards=total_shards - len(jobs),
    )


def _expected_tokens(config: ExperimentConfig) -> int:
    blocks = (config.data.train_blocks or 0) + (config.data.held_out_blocks or 0)
    return blocks * config.data.block_length


def incomplete_splits(config: ExperimentConfig) -> list[str]:
    """Return the splits whose cache is not complete."""
    return [s for s in SPLITS if not Folder(config.cache_folder(s)).exists(fmt.INDEX)]
