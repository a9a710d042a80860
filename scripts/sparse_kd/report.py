"""What the finished jobs say together: numbers, tables and plots."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from distill.cache.reader import open_cache
from distill.config import ExperimentConfig
from distill.files import write_json_atomically, write_text_atomically
from scripts.keep_demo_results import machine
from scripts.sparse_kd.arms import ARMS, CAPTURES
from scripts.sparse_kd.jobs import Job, all_jobs, results
from scripts.sparse_kd.plots import plot_angles, plot_losses, plot_repeated
from scripts.sparse_kd.store import folder_of
from scripts.sparse_kd.tables import tables

MEASURES = ("ce_nats", "kl_nats", "agreement", "acceptance", "ece")

Results = list[tuple[Job, dict[str, Any]]]


def report(config: ExperimentConfig, out: Path) -> dict[str, Any]:
    """Write sparse_kd.json, .md and the plots into `out`; return what the first holds."""
    done = list(results(config))
    summary = {
        "command": "python scripts/reproduce_sparse_kd.py",
        "jobs_done": len(done),
        "jobs": sum(map(len, all_jobs())),
        "captures": captures(config),
        "pretrained": over_seeds([found["held_out"] for job, found in _of(done, "pretrained")]),
        "arms": arms(done),
        "gradients": gradients(done),
        "repeated": repeated(done),
        "train_tokens": sorted({found["tokens"] for _, found in _of(done, "arm")}),
        "held_out_rows": sorted({found["held_out"]["rows"] for _, found in _of(done, "arm")}),
        "seed": config.seed,
        "machine": machine(),
    }
    write_json_atomically(out / "sparse_kd.json", summary)
    write_text_atomically(out / "sparse_kd.md", tables(summary))
    plot_losses(summary, out / "sparse_kd_loss.png")
    plot_angles(summary, out / "sparse_kd_angle.png")
    plot_repeated(summary, out / "sparse_kd_repeated.png")
    return summary


def captures(config: ExperimentConfig) -> dict[str, dict[str, float]]:
    """Bytes and ids a row of each cache, everything in its files counted."""
    found = {}
    for kind in CAPTURES:
        records = open_cache(str(folder_of(config, kind, "train"))).records
        rows = sum(record.num_rows for record in records)
        found[kind] = {
            "bytes_per_row": round(sum(record.num_bytes for record in records) / rows, 2),
            "ids_per_row": round(sum(record.num_ids for record in records) / rows, 2),
            "rows": rows,
        }
    return found


def arms(done: Results) -> dict[str, dict[str, Any]]:
    """Of each arm: every measure over the seeds, and differences to CE and dense, seed by seed."""
    runs = {(job.arm, job.seed): found["held_out"] for job, found in _of(done, "arm")}
    summary: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        seeds = [seed for name, seed in runs if name == arm]
        if not seeds:
            continue
        summary[arm] = over_seeds([runs[arm, seed] for seed in seeds])
        both = [s for s in seeds if ("ce", s) in runs and ("dense", s) in runs]
        ce, dense, mine = (
            [runs[name, seed]["ce_nats"] for seed in both] for name in ("ce", "dense", arm)
        )
        if arm not in ("ce", "dense"):
            shares = [(c - m) / (c - d) for c, d, m in zip(ce, dense, mine, strict=True)]
            summary[arm]["share_of_gap"] = estimate(shares)
        if arm != "dense":
            above = [m - d for m, d in zip(mine, dense, strict=True)]
            summary[arm]["above_dense_nats"] = estimate(above)
            pairs = [_block_differences(runs[arm, seed], runs["dense", seed]) for seed in both]
            # The same blocks under every seed: their noise does not shrink with more seeds.
            blocks = [sum(values) / len(values) for values in zip(*pairs, strict=True)]
            summary[arm]["above_dense_nats"]["stderr_of_blocks"] = estimate(blocks)["stderr"]
    return summary


def _block_differences(mine: dict[str, Any], other: dict[str, Any]) -> list[float]:
    pairs = zip(mine["ce_nats_by_block"], other["ce_nats_by_block"], strict=True)
    return [a - b for a, b in pairs]


def gradients(done: Results) -> dict[str, Any]:
    """Angle and norm ratio by arm and blocks of the batch, over the seeds."""
    collected: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for _, found in _of(done, "gradients"):
        for arm, by_blocks in found["gradients"].items():
            for blocks, compared in by_blocks.items():
                collected[arm, blocks].append(compared)
    summary: dict[str, Any] = defaultdict(dict)
    for (arm, blocks), compared in sorted(collected.items(), key=lambda item: _place(item[0][0])):
        summary[arm][blocks] = {
            name: estimate([each[name] for each in compared])
            for name in ("angle_degrees", "norm_ratio", "id_angle_degrees")
        }
    return dict(summary)


def repeated(done: Results) -> dict[str, Any]:
    """KL to the teacher by arm and epochs, held-out and on the repeated blocks, over the seeds."""
    collected: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for job, found in _of(done, "repeated"):
        collected[job.arm, job.epochs].append(found)
    summary: dict[str, Any] = defaultdict(dict)
    for (arm, epochs), runs in collected.items():
        summary[arm][str(epochs)] = {
            split: over_seeds([run[split] for run in runs]) for split in ("held_out", "train")
        }
    return dict(summary)


def _place(arm: str) -> int:
    return list(ARMS).index(arm)


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of each measure over runs that differ in their seed."""
    return {name: estimate([run[name] for run in runs]) for name in MEASURES}


def estimate(values: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None of a single value) and number of values."""
    number = len(values)
    if not number:
        return {"mean": None, "stderr": None, "n": 0}
    mean = sum(values) / number
    if number == 1:
        return {"mean": mean, "stderr": None, "n": 1}
    variance = sum((value - mean) ** 2 for value in values) / (number - 1)
    return {"mean": mean, "stderr": math.sqrt(variance / number), "n": number}


def _of(done: Results, kind: str) -> Results:
    return [(job, found) for job, found in done if job.kind == kind]
