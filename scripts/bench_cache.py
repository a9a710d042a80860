"""Size and speed of the cache on a real teacher's distributions.

    python scripts/bench_cache.py [--quick] [--out results/bench_cache.json]

Needs the demo's assets (`make demo-assets`). SmolLM2 has 49,152 tokens; its ids are mapped into
Llama 3's 128,256 by an injection that keeps their order (id v goes to a random place in
[128256 v / 49152, 128256 (v + 1) / 49152)): ids take 17 bits, and small ones stay frequent.
All bytes of a shard count: ids, weights, entropy, masks, input ids, Parquet's own. One thread.
The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distill.cache.format import head_step_nats
from distill.cache.manifest import Manifest
from distill.cache.reader import open_cache
from distill.cache.storage import Folder, write_manifest
from distill.cache.writer import BlockSpool, ShardWriter
from distill.config import SampledConfig, TargetsConfig, ThresholdConfig, TopKConfig, load, to_tree
from distill.data import Block, make_blocks
from distill.draw import draw
from distill.files import write_json_atomically
from distill.models import load_causal_lm, load_tokenizer
from distill.targets import SparseTargets, concatenate
from distill.uniforms import row_uniforms
from scripts.provenance import provenance

ROOT = Path(__file__).parent.parent
VOCAB_SIZE = 128_256
KINDS: dict[str, TargetsConfig] = {
    "threshold": ThresholdConfig(tau=1 / 40),
    "top_k_64": TopKConfig(kind="top_k", k=64),
    "sampled_50": SampledConfig(kind="sampled", draws=50),
}
SEED = 0


def main() -> None:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 blocks instead of 64")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    num_blocks = 8 if options.quick else 64
    blocks, targets = teacher_targets(num_blocks, KINDS)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    result: dict[str, Any] = {
        "blocks": num_blocks,
        "text": "documentation inside CPython (technical English)",
        "vocab_size": VOCAB_SIZE,
        "bytes_per_row": {},
        "mean_ids": {},
        "bytes_per_id": {},
        "coding_error_nats": {},
    }
    for name, config in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            result |= measure(folder, name, config, blocks, targets[name], result)
    result |= provenance(SEED)
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


@torch.inference_mode()
def teacher_targets(
    num_blocks: int, kinds: dict[str, TargetsConfig]
) -> tuple[list[Block], dict[str, list[SparseTargets]]]:
    """Blocks of the demo's corpus, and their targets of each kind from one forward pass."""
    config = load(ROOT / "configs" / "smollm2-demo.yaml", [f"data.train_blocks={num_blocks}"])
    tokenizer = load_tokenizer(config.teacher.model, "teacher.model")
    model = load_causal_lm(config.teacher.model, "teacher.model", dtype=torch.bfloat16)
    place_V = stretched_ids(len(tokenizer))
    blocks: list[Block] = []
    targets: dict[str, list[SparseTargets]] = {name: [] for name in kinds}
    for split, block in make_blocks(config.data, tokenizer, SEED):
        if split != "train":
            continue
        mask = torch.from_numpy(block.row_mask())
        logits_TV = (
            model(
                input_ids=torch.from_numpy(block.input_ids_T).long()[None],
                position_ids=torch.from_numpy(block.position_ids())[None],
                use_cache=False,
            )
            .logits[0, :-1][mask]
            .float()
        )
        uniforms_R = row_uniforms(SEED, block.block_id, len(mask))[mask]
        for name, kind in kinds.items():
            drawn = draw(logits_TV, uniforms_R, kind).scatter_rows(mask)
            drawn.ids_N.copy_(place_V[drawn.ids_N])
            targets[name].append(drawn)
        stretched = place_V[torch.from_numpy(block.input_ids_T).long()].numpy().astype(np.int32)
        blocks.append(Block(block.block_id, stretched, block.segment_lengths, block.loss_mask_T))
        if len(blocks) == num_blocks:
            break
    return blocks, targets


def stretched_ids(num_tokens: int) -> torch.Tensor:
    """Order-preserving injection of `num_tokens` ids into `VOCAB_SIZE`."""
    edges = np.arange(num_tokens + 1) * VOCAB_SIZE // num_tokens
    random = np.random.default_rng(SEED)
    return torch.from_numpy(edges[:-1] + random.integers(0, np.diff(edges)))


def measure(
    folder: str,
    name: str,
    config: TargetsConfig,
    blocks: list[Block],
    targets: list[SparseTargets],
    so_far: dict[str, Any],
) -> dict[str, Any]:
    """Write one cache of all blocks, read it back, and return what is known of its kind."""
    manifest = new_manifest(folder, config, blocks)
    writer, joined = ShardWriter(Folder(folder), manifest), concatenate(targets)
    started = time.perf_counter()
    record = writer.write(0, blocks, joined)
    write_seconds = time.perf_counter() - started
    writer.seal()
    read_seconds = min(read_all(folder) for _ in range(5))
    num_rows = record.num_rows
    figures = {
        "bytes_per_row": record.num_bytes / num_rows,
        "mean_ids": record.num_ids / num_rows,
        "bytes_per_id": record.num_bytes / record.num_ids,
        "coding_error_nats": record.coding_error_nats / num_rows,
    }
    merged = {key: so_far[key] | {name: value} for key, value in figures.items()}
    if name == "threshold":
        merged["write_rows_per_second"] = round(num_rows / write_seconds)
        merged["read_rows_per_second"] = round(num_rows / read_seconds)
    return merged


def new_manifest(
    folder: str, config: TargetsConfig, blocks: list[Block], vocab_size: int = VOCAB_SIZE
) -> Manifest:
    """Write the manifest of a cache with one shard for all blocks."""
    spool = BlockSpool(Folder(folder), len(blocks))
    for block in blocks:
        spool.add(block)
    settings = to_tree(config)
    manifest = Manifest(
        split="train",
        teacher={"model": "SmolLM2-135M-Instruct, ids stretched"},
        tokenizer={"fingerprint": "stretched", "vocab_size": vocab_size},
        padded_vocab_size=vocab_size,
        data={"blocks": spool.finish()},
        targets=settings,
        seed=SEED,
        head_step_nats=head_step_nats(settings),
        block_length=len(blocks[0].input_ids_T),
        num_blocks=len(blocks),
        blocks_per_shard=len(blocks),
        num_rows=spool.num_rows,
        versions={},
    )
    write_manifest(Folder(folder), manifest)
    return manifest


def read_all(folder: str) -> float:
    """Seconds to open the cache and turn every block, four at a time, into tensors."""
    started = time.perf_counter()
    cache = open_cache(folder)
    order = cache.epoch_order(SEED, 0)
    for first in range(0, len(order), 4):
        cache.batch(order[first : first + 4].tolist())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
