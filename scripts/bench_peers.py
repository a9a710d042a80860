"""Our cache beside other layouts, on the same rows of a real teacher, in one run.

    python scripts/bench_peers.py [--quick] [--out results/bench_peers.json]

Rows of SmolLM2 with ids stretched over 128,256 (scripts/bench_cache.py says how). For each layout:
bytes a row with everything in its files, coding error (KL over k + 1 outcomes from the exact to the
decoded values, nats a row), and rows written and read a second on one thread; reading ends in
tensors. Layouts take turns; `write_over_ours` and `read_over_ours` are rates over those of
`distill_threshold` in the same round. `threshold` and `sampled` hold other ids than top-k: their
bytes compare, their coding errors, which are those of their exact part, do not. Needs assets/
(`make demo-assets`).

The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch

from distill.cache.storage import Folder
from distill.cache.writer import ShardWriter
from distill.config import TargetsConfig, TopKConfig
from distill.data import Block
from distill.files import write_json_atomically
from distill.targets import SparseTargets, concatenate
from scripts import bench_cache
from scripts.peer_layouts import LAYOUTS, Arrays
from scripts.provenance import provenance, spread

KINDS: dict[str, TargetsConfig] = {
    **bench_cache.KINDS,
    "top_k_128": TopKConfig(kind="top_k", k=128),
}
OURS = "distill_threshold"


def main() -> None:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 blocks instead of 32")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    blocks, targets = bench_cache.teacher_targets(4 if options.quick else 32, KINDS)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    runs: dict[str, Callable[[], Run]] = {
        f"distill_{name}": partial(ours, KINDS[name], blocks, targets[name]) for name in KINDS
    }
    runs |= {name: partial(theirs, name, blocks, targets["top_k_128"]) for name in LAYOUTS}
    rounds = 1 if options.quick else 5
    found: dict[str, list[Run]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    layouts = {name: figures(found[name], found[OURS]) for name in found}
    result = {
        "blocks": len(blocks),
        "rounds": rounds,
        "rows": int(sum(block.row_mask().sum() for block in blocks)),
        "vocab_size": bench_cache.VOCAB_SIZE,
        "layouts": layouts,
        **provenance(bench_cache.SEED),
    }
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


class Run(NamedTuple):
    """One writing and reading of all rows."""

    num_bytes: int
    error_nats: float
    """Of all rows."""
    num_rows: int
    write_seconds: float
    read_seconds: float


def ours(config: TargetsConfig, blocks: list[Block], targets: list[SparseTargets]) -> Run:
    """Write one shard, read it back; checksums and all."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = bench_cache.new_manifest(folder, config, blocks)
        writer, joined = ShardWriter(Folder(folder), manifest), concatenate(targets)
        started = time.perf_counter()
        record = writer.write(0, blocks, joined)
        taken = time.perf_counter() - started
        writer.seal()
        reading = bench_cache.read_all(folder)
    return Run(record.num_bytes, record.coding_error_nats, record.num_rows, taken, reading)


def theirs(name: str, blocks: list[Block], targets: list[SparseTargets]) -> Run:
    """Write the top-k rows in a layout, read them back, and see what they lost."""
    k, write, read = LAYOUTS[name]
    exact = as_arrays(targets, k)
    with tempfile.TemporaryDirectory() as name_of:
        folder = Path(name_of)
        started = time.perf_counter()
        write(folder, exact, blocks)
        taken = time.perf_counter() - started
        started = time.perf_counter()
        ids, logprobs = read(folder)
        reading = time.perf_counter() - started
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert np.array_equal(ids.reshape(-1, k).numpy(), exact[0]), "the ids are not those written"
    error = coding_error(torch.from_numpy(exact[1]), logprobs.reshape(-1, k))
    return Run(num_bytes, error * len(exact[0]), len(exact[0]), taken, reading)


def as_arrays(targets: list[SparseTargets], k: int) -> Arrays:
    """The k likeliest ids of every row, masked ones included, and their log-probabilities.

    Masked rows have none; they take those of the row before, so that layouts stay rectangular.
    """
    ids, logprobs = [], []
    for block in targets:
        rows = (block.counts_R > 0).cumsum(0).sub(1).clamp(min=0)
        kept = int(block.counts_R.max())
        ids.append(block.ids_N.view(-1, kept)[rows, :k])
        logprobs.append(block.weights_N.view(-1, kept)[rows, :k].log())
    return torch.cat(ids).int().numpy(), torch.cat(logprobs).float().numpy()


def coding_error(exact_RK: torch.Tensor, decoded_RK: torch.Tensor) -> float:
    """Mean KL over k + 1 outcomes from the exact to the decoded values, nats a row."""
    t_RK, q_RK = exact_RK.double().exp(), decoded_RK.double().exp()
    t_tail_R = (1 - t_RK.sum(-1)).clamp(min=1e-12)
    q_tail_R = (1 - q_RK.sum(-1)).clamp(min=1e-12)
    kept_R = (t_RK * (exact_RK.double() - decoded_RK.double())).sum(-1)
    return float((kept_R + t_tail_R * (t_tail_R / q_tail_R).log()).mean())


def figures(runs: list[Run], of_ours: list[Run]) -> dict[str, Any]:
    """Of one layout, per row, and over ours round by round."""
    first = runs[0]
    pairs = list(zip(runs, of_ours, strict=True))
    return {
        "bytes_per_row": round(first.num_bytes / first.num_rows, 2),
        "coding_error_nats": first.error_nats / first.num_rows,
        "write_rows_per_second": round(first.num_rows / min(run.write_seconds for run in runs)),
        "read_rows_per_second": round(first.num_rows / min(run.read_seconds for run in runs)),
        "write_over_ours": spread([our.write_seconds / run.write_seconds for run, our in pairs]),
        "read_over_ours": spread([our.read_seconds / run.read_seconds for run, our in pairs]),
    }


if __name__ == "__main__":
    main()
