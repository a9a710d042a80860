"""Settings of data, targets, cache and the workers that fill it; teachers are in teacher.py."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from distill.config.base import STRICT, Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One data set, opened by `datasets.load_dataset`."""

    path: str
    """Hub id, or the name of a loader for local files: json, parquet, text, csv, arrow."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split, slices allowed (train[:1%])."""
    revision: str | None = None
    """Commit of a hub data set: pin it, so that the data cannot change under a cache."""
    data_files: tuple[str, ...] | None = None
    """Files for the local loaders; glob patterns allowed."""
    format: Literal["text", "chat"] = "text"
    """`text`: every token counts; `chat`: only what the assistant says counts."""
    column: str = "text"
    """Column with the text, or (chat) with the list of {role, content} messages."""
    weight: PositiveFloat = 1.0
    """Share of this source in a mix of several, relative to the others."""
    streaming: bool = False
    """Read from the hub while working rather than download first."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Documents into packed blocks."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """What to read; several are interleaved by weight."""
    tokenizer: str | None = None
    """Folder or hub id; by default the teacher's own tokenizer."""
    block_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens a block; a block of L tokens has L - 1 rows."""
    train_blocks: Positive | None = None
    """Blocks to make for training; by default all that the documents give."""
    skip_train_blocks: Annotated[int, Field(ge=0)] = 0
    """Training blocks to pass over first: those that an earlier cache holds (see cache.also)."""
    held_out_blocks: Positive | None = 64
    """Blocks to make of the held-out documents; null takes all of them."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the documents held out, chosen by the hash of their text."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopKConfig:
    """The k likeliest ids with their probabilities, and the mass of the rest."""

    kind: Literal["top_k"]
    k: Annotated[int, Field(gt=0, le=65_535)] = 64
    """Ids a row; the format counts them in 16 bits."""
    also_temperatures: tuple[PositiveFloat, ...] = ()
    """Further temperatures at which students may be trained (train.temperature)."""
    tail: Literal["bucket"] = "bucket"
    """The loss takes the rest as one more outcome, so that the divergence stays a true one."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature at capture; the student is scored at the same one."""
    bits: Literal[8, 16] = 8
    """Bits of a head log-probability."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ThresholdConfig:
    """Every id with probability >= tau, and an unbiased sample of the rest."""

    kind: Literal["threshold"] = "threshold"
    tau: Annotated[float, Field(ge=1e-4, le=1)] = 0.025
    """Ids at least this likely are kept exactly; smaller tau keeps more, up to 2 / tau a row."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature at capture; the student is scored at the same one."""
    bits: Literal[8, 16] = 8
    """Bits of a head log-probability."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampledConfig:
    """Ids drawn with replacement, with their counts: RS-KD, arXiv:2503.16870."""

    kind: Literal["sampled"]
    draws: Annotated[int, Field(gt=0, le=65_535)] = 50
    """Draws a row; an id drawn c times weighs c / draws."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature at capture; the student is scored at the same one."""


TargetsConfig = Annotated[TopKConfig | ThresholdConfig | SampledConfig, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheConfig:
    """Where and how targets are kept."""

    folder: str | None = None
    """Folder or fsspec URL; by default RUN_FOLDER/cache. Caches of several runs may be shared."""
    also: tuple[str, ...] = ()
    """Folders of further complete caches, of the same identity, whose `train` is read with ours."""
    blocks_per_shard: Positive = 64
    """Blocks a file: what a kill may lose, and what a worker takes at a time."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CaptureConfig:
    """Who fills the cache. None of it is part of the cache's identity."""

    engine: Literal["local", "ray"] = "local"
    """`local`: processes on this machine; `ray`: actors on a Ray cluster."""
    workers: Positive = 1
    """Teachers at work, each whole; shards are handed out one at a time."""
    gpus_per_worker: Annotated[int, Field(ge=0)] | None = None
    """GPUs that each worker has to itself; by default what its teacher needs, if there are any."""
    cpus_per_worker: Positive | None = None
    """CPU threads of each worker; by default `local` shares out the cores and `ray` takes 1."""
    ray_address: str | None = None
    """HOST:PORT of the Ray cluster; by default the one at hand. `local` starts one."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Workers that may die before the capture gives up; others take up their shards."""
