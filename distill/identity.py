"""What a cache is of: the fields of its manifest, from an experiment."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill import fingerprint
from distill.cache import format as fmt
from distill.cache.manifest import Manifest
from distill.config import ExperimentConfig, to_tree
from distill.data import source_fingerprints
from distill.errors import ConfigError, MismatchError
from distill.models import load_config, load_tokenizer


def cache_identity(config: ExperimentConfig) -> dict[str, Any]:
    """Return all manifest fields that are known before any block is made.

    Raises:
        ConfigError: teacher, tokenizer or data cannot be opened.
        MismatchError: the tokenizer has more tokens than the teacher has logits.
    """
    teacher = config.teacher
    model = load_config(teacher.model, "teacher.model", teacher.revision)
    tokenizer = load_tokenizer(*tokenizer_source(config))
    vocab_size = len(tokenizer)
    padded = int(model.get_text_config().vocab_size)
    if padded < vocab_size:
        raise MismatchError(
            "the tokenizer has more tokens than the teacher has logits.\n"
            f"  teacher    {teacher.model}  {padded:,} logits\n"
            f"  tokenizer  {tokenizer_source(config)[0]}  {vocab_size:,} tokens\n"
            "  Use the teacher's own tokenizer: leave out data.tokenizer."
        )
    settings = to_tree(config)
    targets = settings["targets"]
    return {
        "teacher": teacher_identity(config),
        "tokenizer": {"fingerprint": fingerprint.of_tokenizer(tokenizer), "vocab_size": vocab_size},
        "padded_vocab_size": padded,
        "data": {"settings": settings["data"], "files": source_fingerprints(config.data)},
        "targets": targets,
        "seed": config.seed,
        "head_step_nats": fmt.head_step_nats(targets),
        "block_length": config.data.block_length,
        "blocks_per_shard": config.cache.blocks_per_shard,
    }


def teacher_identity(config: ExperimentConfig) -> dict[str, Any]:
    """What the manifest says of the teacher.

    Raises:
        ConfigError: there is no such model, or it has no weights.
    """
    teacher = config.teacher
    model = load_config(teacher.model, "teacher.model", teacher.revision)
    stored = dict(getattr(model, "quantization_config", None) or {}).get("quant_method")
    path = Path(teacher.model)
    try:
        weights = fingerprint.of_weights(path) if path.exists() else None
    except FileNotFoundError as error:
        raise ConfigError(f"teacher.model: {error}.") from None
    # What vLLM quantises on load is another teacher than the checkpoint is.
    quantisation = getattr(teacher, "quantization", None) or stored
    if path.suffix == ".gguf":
        quantisation = "gguf"
    return {
        "model": teacher.model,
        "revision": getattr(model, "_commit_hash", None) or teacher.revision,
        "weights": weights,
        "dtype": teacher.dtype,
        "quantisation": quantisation,
        "licence": teacher.licence,
    }


def make_manifest(
    fields: dict[str, Any], split: str, blocks: str, num_blocks: int, num_rows: int
) -> Manifest:
    """Complete the fields of `cache_identity` by what the blocks of one split say."""
    return Manifest(
        **(fields | {"data": fields["data"] | {"blocks": blocks}}),
        split=split,
        num_blocks=num_blocks,
        num_rows=num_rows,
        versions={name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")},
    )


def tokenizer_source(config: ExperimentConfig) -> tuple[str, str, str | None]:
    """Return name, setting and revision of the tokenizer."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer, "data.tokenizer", None
    return config.teacher.model, "teacher.model", config.teacher.revision
