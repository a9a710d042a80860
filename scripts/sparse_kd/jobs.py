"""The experiment as jobs of a few minutes, each with one result file: done once, whoever asks."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from tqdm import tqdm

from distill.config import ExperimentConfig
from distill.files import write_bytes_atomically, write_json_atomically
from scripts.sparse_kd.arms import ARMS
from scripts.sparse_kd.gradients import compare_gradients
from scripts.sparse_kd.store import Store
from scripts.sparse_kd.students import (
    NUM_SEEDS,
    measure,
    new_student,
    pretrained_student,
    shuffled,
    train_student,
    weights_of,
)

REPEATED_BLOCKS = 32
"""The last blocks of the train caches: a corpus so small that it is read again and again."""
EPOCHS = (1, 4, 16)
REPEATED_ARMS = ("dense", "sampled_12", "threshold_12")


@dataclass(frozen=True)
class Job:
    """One result."""

    kind: Literal["pretrained", "arm", "gradients", "repeated"]
    seed: int
    arm: str = ""
    epochs: int = 1

    @property
    def name(self) -> str:
        """Name of its result file."""
        parts = [self.kind, self.arm, f"{self.epochs}-epochs" if self.kind == "repeated" else ""]
        return "-".join([*filter(None, parts), f"seed-{self.seed}"])


Stages = list[list[Job]]


def all_jobs(arms: Sequence[str] = ()) -> Stages:
    """Return stages, each of which needs the ones before; within one, the order of importance.

    Where arms are named, theirs are the only ones, and only their students are scored.
    """
    seeds = range(NUM_SEEDS)
    taught = [
        [Job("pretrained", seed) for seed in seeds],
        [Job("arm", seed, arm) for seed in seeds for arm in arms or ARMS],
    ]
    if arms:
        return taught
    return [
        *taught,
        [Job("gradients", seed) for seed in seeds],
        [
            Job("repeated", seed, arm, epochs)
            for seed in seeds
            for arm in REPEATED_ARMS
            for epochs in EPOCHS
        ],
    ]


def result_file(config: ExperimentConfig, job: Job) -> Path:
    """Return where the result of a job is, or will be."""
    return config.run_folder / "jobs" / f"{job.name}.json"


def results(config: ExperimentConfig, stages: Stages) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Yield the jobs that are done, with their results."""
    for stage in stages:
        for job in stage:
            path = result_file(config, job)
            if path.exists():
                yield job, json.loads(path.read_text())


def pending_jobs(config: ExperimentConfig, stages: Stages) -> Stages:
    """Return the jobs of each stage that are not done."""
    return [[job for job in stage if not result_file(config, job).exists()] for stage in stages]


def run_jobs(config: ExperimentConfig, stages: Stages, workers: int) -> None:
    """Do all jobs that are not done, some at a time, each on its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    pending = pending_jobs(config, stages)
    context = get_context("spawn")
    with (
        tqdm(total=sum(map(len, pending)), unit="job", mininterval=10) as bar,
        ProcessPoolExecutor(workers, context, _begin, (config, threads)) as pool,
    ):
        for stage in pending:
            futures = {pool.submit(_do, job): job for job in stage}
            for future in as_completed(futures):
                future.result()
                bar.set_postfix_str(futures[future].name, refresh=False)
                bar.update()


_stores: list[Store] = []


def _begin(config: ExperimentConfig, threads: int) -> None:
    torch.set_num_threads(threads)
    _stores.append(Store(config))


def _do(job: Job) -> None:
    store = _stores[0]
    write_json_atomically(result_file(store.config, job), do(store, job))


def do(store: Store, job: Job) -> dict[str, Any]:
    """Return the result of one job."""
    config, held_out = store.config, range(len(store.held_out))
    if job.kind == "gradients":
        model = new_student(store, job.seed)
        path = _dense_file(config, job.seed)
        model.load_state_dict(safetensors.torch.load_file(path), strict=False)
        return {"gradients": compare_gradients(store, model, job.seed)}
    model = pretrained_student(store, job.seed)
    if job.kind == "pretrained":
        return {"held_out": measure(store, model, "held_out", held_out)}
    num_train = len(store.train())
    first_repeated = num_train - REPEATED_BLOCKS
    blocks = range(first_repeated)
    if job.kind == "repeated":
        blocks = range(first_repeated, num_train)
    batches = shuffled(config, blocks, job.seed, job.epochs)
    seconds = train_student(store, ARMS[job.arm], model, batches, job.seed)
    found = {
        "tokens": sum(map(len, batches)) * config.data.block_length,
        "train_seconds": round(seconds, 1),
        "held_out": measure(store, model, "held_out", held_out),
    }
    if job.kind == "repeated":
        found["train"] = measure(store, model, "train", blocks)
    elif job.arm == "dense":
        write_bytes_atomically(
            _dense_file(config, job.seed), safetensors.torch.save(weights_of(model))
        )
    return found


def _dense_file(config: ExperimentConfig, seed: int) -> Path:
    return config.run_folder / "dense" / f"{seed}.safetensors"
