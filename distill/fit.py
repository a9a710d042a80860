"""What must fit before a student trains: cache, config, tokenizer, vocabulary, run folder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill import fingerprint
from distill.cache.joined import JoinedCache, open_joined
from distill.cache.reader import Batch, Cache
from distill.checkpoint import Checkpoints, require_identity
from distill.config import ExperimentConfig, TrainConfig, to_tree
from distill.errors import CacheError, ConfigError, MismatchError, TrainingError, explain_difference
from distill.export import read_provenance
from distill.licences import require_licence
from distill.losses import require_linear_or_exact


def require_fit(
    cache: Cache | JoinedCache,
    config: ExperimentConfig,
    student: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse a cache that was made for another config, tokenizer or vocabulary.

    Raises:
        MismatchError: both sides are shown.
        CacheError: the cache has nothing to learn from.
        ConfigError: the student could not be saved as its teacher's licence demands.
    """
    require_licence(config)
    if cache.num_rows == 0:
        raise CacheError(f"no row of {cache.url} counts: every loss mask is empty.")
    manifest, settings = cache.manifest, to_tree(config)
    keys = ("model", "dtype", "licence")
    found = {
        "data": manifest.data["settings"],
        "targets": manifest.targets,
        "teacher": {key: manifest.teacher[key] for key in keys},
        "seed": manifest.seed,
    }
    wanted = {
        "data": settings["data"],
        "targets": settings["targets"],
        "teacher": {key: settings["teacher"][key] for key in keys},
        "seed": config.seed,
    }
    if found != wanted:
        raise MismatchError(
            explain_difference(
                f"the cache {cache.url} was made with other settings than the config has.",
                ("cache", found),
                ("config", wanted),
            )
            + "\n  Give the settings of the cache, or capture another: distill cache CONFIG"
        )
    require_linear_or_exact(
        config.train.divergence, is_exact=manifest.has_bucket, where=f"the cache {cache.url}"
    )
    wanted_temperature = config.train.temperature
    if wanted_temperature not in (None, manifest.temperature, *manifest.also_temperatures):
        raise MismatchError(
            "the cache has no targets of the temperature that the student is to be trained at.\n"
            f"  cache   {cache.url}  {[manifest.temperature, *manifest.also_temperatures]}\n"
            f"  config  train.temperature  {wanted_temperature}\n"
            "  Choose one of the cache's, or capture top_k with targets.also_temperatures."
        )
    ours, theirs = fingerprint.of_tokenizer(tokenizer), manifest.tokenizer["fingerprint"]
    if ours != theirs:
        raise MismatchError(
            "the cache was made with another tokenizer than the student's.\n"
            f"  cache    {cache.url}  tokenizer {theirs[:8]} ({manifest.vocab_size:,} tokens)\n"
            f"  student  {tokenizer.name_or_path}  tokenizer {ours[:8]} "
            f"({len(tokenizer):,} tokens)\n"
            "  Choose a student of the teacher's family, or a teacher of the student's."
        )
    num_logits = student.get_output_embeddings().weight.shape[0]
    if num_logits < manifest.vocab_size:
        raise MismatchError(
            "the student has fewer logits than the cache has tokens.\n"
            f"  cache    {cache.url}  {manifest.vocab_size:,} tokens\n"
            f"  student  {tokenizer.name_or_path}  {num_logits:,} logits\n"
            "  Resize its embeddings to the tokenizer, or choose another student."
        )


def count_steps(cache: Cache | JoinedCache, settings: TrainConfig, num_processes: int) -> int:
    """Return the number of optimiser steps; a last step that would be short is left out.

    Raises:
        ConfigError: the blocks do not fill a step, or a step cannot be shared by the processes.
    """
    if settings.blocks_per_step % (settings.micro_batch_blocks * num_processes):
        raise ConfigError(
            f"train.blocks_per_step ({settings.blocks_per_step}) must be a multiple of "
            f"micro_batch_blocks ({settings.micro_batch_blocks}) times processes ({num_processes})."
        )
    num_blocks = int(len(cache) * settings.epochs)
    if num_blocks < settings.blocks_per_step:
        raise ConfigError(
            f"train.blocks_per_step is {settings.blocks_per_step}, but {settings.epochs:g} epochs "
            f"of {cache.url} are {num_blocks} blocks. Lower it, or capture more data."
        )
    return num_blocks // settings.blocks_per_step


def training_identity(config: ExperimentConfig, cache: JoinedCache) -> dict[str, Any]:
    """What decides the trained weights; equal identities need no second training."""
    settings = to_tree(config)
    parts = {name: settings[name] for name in ("seed", "student", "train")}
    if config.train.seed is None:
        del parts["train"]["seed"]  # what was trained before there was one still holds
    return {**parts, "caches": list(cache.checksums)}


def not_finite(
    step: int,
    loss_nats: float,
    grad_norm: float,
    batches: Sequence[Batch],
    costs: Sequence[Tensor],
    checkpoints: Checkpoints,
) -> TrainingError:
    """Return the error of a step whose loss or gradient is NaN or infinite.

    Args:
        step: Its number, from 1.
        loss_nats: Mean over the rows of all processes.
        grad_norm: Of all processes.
        batches: This process's micro-batches.
        costs: Sums of each, as `LossRows.sums`.
        checkpoints: Of the run.
    """
    guilty = [
        block_id
        for batch, cost in zip(batches, costs, strict=True)
        if not bool(torch.isfinite(cost).all())
        for block_id in batch.block_ids
    ]
    seen = [block_id for batch in batches for block_id in batch.block_ids]
    where = f"in blocks {guilty}" if guilty else f"with finite losses here, in blocks {seen}"
    last = checkpoints.latest()
    kept = f"of step {last}, {checkpoints.path(last)}" if last else "none yet"
    return TrainingError(
        f"step {step} has loss {loss_nats} nats and gradient norm {grad_norm}, {where}.\n"
        f"  The step was not taken. Last good checkpoint: {kept}.\n"
        "  Lower train.learning_rate, raise train.warmup_fraction, or use train.precision=float32; "
        "`distill verify` tells whether the cache is right."
    )


def is_finished(config: ExperimentConfig) -> bool:
    """Whether the run holds its finished student.

    Raises:
        MismatchError: it holds a student of other settings.
    """
    folder = config.run_folder / "student" / "final"
    provenance = read_provenance(folder)
    if provenance is None:
        return False
    cache = open_joined(config.training_folders())
    require_identity(provenance["training"], training_identity(config, cache), folder)
    return True
