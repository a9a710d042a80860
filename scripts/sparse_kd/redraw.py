"""Draws of other seeds, from the hidden states that the store kept.

Draws are noise that all students of one cache share. Where every seed has draws of its own, the
standard error over seeds counts that noise too.
"""

from dataclasses import replace

import torch

from distill.cache import format as fmt
from distill.progress import ProgressBar
from distill.targets import concatenate
from scripts.sparse_kd.arms import CAPTURES
from scripts.sparse_kd.store import Store, begin, draw_kinds, folder_of, is_drawn


@torch.inference_mode()
def draw_again(store: Store, seed: int) -> None:
    """Fill the train caches of all kinds that are drawn, with the draws of another seed.

    Raises:
        MismatchError: there are caches of other settings.
    """
    config = store.config
    paths = {kind: folder_of(config, kind, "train", seed) for kind in CAPTURES if is_drawn(kind)}
    if all((path / fmt.INDEX).exists() for path in paths.values()):
        return
    blocks = [store.train().block(block_id)[0] for block_id in range(len(store.train()))]
    own = replace(config, seed=config.seed + seed)
    writers = {kind: begin(own, path, "train", kind, blocks) for kind, path in paths.items()}
    kinds = {kind: CAPTURES[kind] for kind in paths}
    missing = sorted({shard for writer in writers.values() for shard in writer.pending()})
    manifest = store.train().manifest
    num_tokens = manifest.block_length * sum(len(manifest.shard_blocks(n)) for n in missing)
    with ProgressBar(f"draws of seed {seed}", num_tokens) as bar:
        for shard in missing:
            some = [blocks[block_id] for block_id in manifest.shard_blocks(shard)]
            found = []
            for block in some:
                logits_RV = store.teacher_logits(store.hidden("train", [block.block_id]))
                found.append(draw_kinds(logits_RV, block, kinds, own.seed))
                bar.advance(manifest.block_length)
            for kind, writer in writers.items():
                writer.write(shard, some, concatenate([each[kind] for each in found]))
    for writer in writers.values():
        writer.seal()
