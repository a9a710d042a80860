"""The verbs that look at caches: `inspect` and `verify`."""

import argparse
import json
import os
from pathlib import Path

from distill.config import load
from distill.errors import CacheError, ConfigError, MismatchError


def inspect_caches(options: argparse.Namespace) -> int:
    """Print what caches hold."""
    from distill.cache.inspect import describe, summarise
    from distill.cache.reader import open_cache
    from distill.cache.rows import describe_rows, sample_rows
    from distill.models import load_tokenizer

    summaries = []
    for url in _cache_folders(options.target):
        cache = open_cache(url)
        summary, teacher = summarise(cache), cache.manifest.teacher
        try:
            tokenizer = load_tokenizer(teacher["model"], "teacher.model", teacher["revision"])
            summary["rows"] = sample_rows(cache, tokenizer)
            rows = describe_rows(summary["rows"])
        except (ConfigError, MismatchError) as error:
            rows = f"  rows are not shown as text: {error}"  # the teacher may live elsewhere
        summaries.append(summary)
        if not options.json:
            print(f"{describe(summary)}\n{rows}")
    if options.json:
        print(json.dumps(summaries, indent=1))
    return 0


def verify_caches(options: argparse.Namespace) -> int:
    """Check every byte of caches; return 1 if there is a fault."""
    num_faults = sum(_count_faults(url) for url in _cache_folders(options.target))
    return 1 if num_faults else 0


def _count_faults(url: str) -> int:
    from distill.cache.inspect import find_strangers, verify
    from distill.cache.storage import Folder, read_manifest
    from distill.progress import ProgressBar

    try:
        manifest = read_manifest(Folder(url))
    except CacheError:
        manifest = None  # verify says what is wrong with it
    checked: list[int] = []
    with ProgressBar(f"verify {url}", manifest.num_tokens if manifest else 0) as bar:

        def count(shard: int) -> None:
            checked.append(shard)
            if manifest is not None:
                bar.advance(len(manifest.shard_blocks(shard)) * manifest.block_length)

        faults = verify(url, num_threads=os.cpu_count() or 1, on_shard=count)
    print(f"{url}: {len(checked)} shards checked, {len(faults)} faults")
    for line in [*faults, *(f"note: {stranger}" for stranger in find_strangers(url))]:
        print(f"  {line}")
    return len(faults)


def _cache_folders(target: str) -> list[str]:
    """Caches of a config, or the cache that a folder is or holds."""
    from distill.cache.storage import Folder
    from distill.data import SPLITS

    if is_config(target):
        config = load(Path(target))
        return [config.cache_folder(split) for split in SPLITS]
    held = [
        split for split in SPLITS if Folder(f"{target.rstrip('/')}/{split}").exists("manifest.json")
    ]
    return [f"{target.rstrip('/')}/{split}" for split in held] or [target]


def is_config(target: str) -> bool:
    """Whether a target on the command line is a config rather than a folder."""
    return target.endswith((".yaml", ".yml"))
