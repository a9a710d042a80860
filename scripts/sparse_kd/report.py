"""What the finished jobs say together: numbers, tables and plots."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.cache.reader import open_cache
from distill.config import ExperimentConfig
from distill.files import write_json_atomically, write_text_atomically
from scripts.provenance import provenance
from scripts.sparse_kd.arms import ARMS, CAPTURES
from scripts.sparse_kd.jobs import Job, Stages, results
from scripts.sparse_kd.plots import plot_angles, plot_losses, plot_repeated
from scripts.sparse_kd.store import folder_of
from scripts.sparse_kd.tables import tables

RATES = {"ce": ("ce", "ce_third_rate", "ce_tenth_rate"), "dense": ("dense", "dense_third_rate")}
"""Arms that differ in their learning rate alone; the gap is between the best of each."""

MEASURES = ("ce_nats", "kl_nats", "agreement", "acceptance", "ece")

Results = list[tuple[Job, dict[str, Any]]]
Runs = Mapping[str, Mapping[int, dict[str, Any]]]
"""Arm -> seed -> its scores on the held-out blocks."""


def report(config: ExperimentConfig, stages: Stages, out: Path) -> dict[str, Any]:
    """Write `out`.json, .md, .csv and the plots beside them; return what the first holds."""
    done = list(results(config, stages))
    runs = runs_of(done)
    manifest = open_cache(str(folder_of(config, next(iter(CAPTURES)), "train"))).manifest
    summary = {
        "data": manifest.data,
        "teacher": manifest.teacher,
        "jobs_done": len(done),
        "jobs": sum(map(len, stages)),
        "captures": captures(config),
        "pretrained": over_seeds([found["held_out"] for job, found in _of(done, "pretrained")]),
        "arms": arms(runs),
        "gap": {kind: best_rate(runs, kind) for kind in RATES},
        "gradients": gradients(done),
        "repeated": repeated(done),
        "train_tokens": sorted({found["tokens"] for _, found in _of(done, "arm")}),
        "held_out_rows": sorted({found["held_out"]["rows"] for _, found in _of(done, "arm")}),
        **provenance(config.seed, leave_out=["--report"]),
    }
    write_json_atomically(out.with_suffix(".json"), summary)
    write_text_atomically(out.with_suffix(".md"), tables(summary))
    write_text_atomically(out.with_suffix(".csv"), single_runs(done))
    plots = {"arms": plot_losses, "gradients": plot_angles, "repeated": plot_repeated}
    for part, draw in plots.items():
        if summary[part]:
            draw(summary, out.with_name(f"{out.name}_{part}.png"))
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


def single_runs(done: Results) -> str:
    """One line of CSV for every student and the blocks on which it was scored."""
    lines = [",".join(["kind", "arm", "epochs", "seed", "split", "tokens", *MEASURES])]
    for job, found in done:
        for split in ("held_out", "train"):
            if split in found:
                scores = (f"{found[split][name]:.6f}" for name in MEASURES)
                tokens = str(found.get("tokens", 0))
                ran = (job.kind, job.arm, str(job.epochs), str(job.seed), split, tokens)
                lines.append(",".join([*ran, *scores]))
    return "\n".join(lines) + "\n"


def runs_of(done: Results) -> Runs:
    """Return the scores of all arms."""
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for job, found in _of(done, "arm"):
        runs[job.arm][job.seed] = found["held_out"]
    return runs


def arms(runs: Runs) -> dict[str, dict[str, Any]]:
    """Of each arm: every measure over the seeds, and how far it is from dense KL and from CE."""
    dense = best_rate(runs, "dense")
    summary: dict[str, dict[str, Any]] = {}
    for arm in (name for name in ARMS if name in runs):
        summary[arm] = over_seeds(list(runs[arm].values()))
        pairs = [(run, runs[dense][s]) for s, run in runs[arm].items() if s in runs.get(dense, {})]
        if arm != dense:
            above = estimate([mine["ce_nats"] - other["ce_nats"] for mine, other in pairs])
            # The same blocks under every seed: their noise does not shrink with more seeds.
            by_seed = [_block_differences(*pair) for pair in pairs]
            blocks = [sum(values) / len(values) for values in zip(*by_seed, strict=True)]
            summary[arm]["above_dense_nats"] = above | {
                "stderr_of_blocks": estimate(blocks)["stderr"]
            }
    add_shares(summary, best_rate(runs, "ce"))
    return summary


def add_shares(summary: dict[str, dict[str, Any]], from_ce: str) -> None:
    """Say of every arm which share of the gap from `from_ce` to dense KL it closes.

    The error is that of a quotient of independent values: both have the noise of dense KL in
    common, so it is too large rather than too small.
    """
    whole = summary.get(from_ce, {}).get("above_dense_nats", estimate([]))
    for arm, found in summary.items():
        above = found.get("above_dense_nats")
        if arm == from_ce or above is None or above["mean"] is None or whole["mean"] is None:
            continue
        ratio = above["mean"] / whole["mean"]
        errors = (above["stderr"], whole["stderr"])
        relative = None if None in errors else math.hypot(errors[0], ratio * errors[1])
        found["share_of_gap"] = {
            "mean": 1 - ratio,
            "stderr": None if relative is None else abs(relative / whole["mean"]),
            "n": above["n"],
        }


def best_rate(runs: Runs, kind: str) -> str:
    """Return which of the arms of a kind, `ce` or `dense`, ends with the lowest cross-entropy.

    Chosen on the held-out blocks: whatever luck is in that narrows the gap.
    """
    done = [arm for arm in RATES[kind] if arm in runs]
    return min(
        done,
        key=lambda arm: estimate([run["ce_nats"] for run in runs[arm].values()])["mean"],
        default=kind,
    )


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
