"""Training by several processes under torchrun, on gloo."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from distill.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_copy")]


def launch(
    num_processes: int, yaml: Path, run_folder: Path, *settings: str
) -> "subprocess.Popen[str]":
    """Start a training."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    cache = yaml.with_name("run") / "cache"
    return subprocess.Popen(
        [
            *(sys.executable, "-m", *launcher, "-m", "distill.cli", "train", str(yaml)),
            *(f"run_folder={run_folder}", f"cache.folder={cache}", "--resume"),
            *("train.learning_rate=1e-3", "train.checkpoint_every=1", "train.blocks_per_step=4"),
            *("train.save_dtype=float32", *settings),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Kill the launcher and what it launched, which has sessions of its own."""
    assert process.poll() is None, process.communicate()[1]
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for each in family:
        each.kill()
    process.communicate()
    psutil.wait_procs(family)


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run_folder / "student" / "final" / "model.safetensors"))


def test_how_a_step_is_shared_by_processes_does_not_change_it(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    results = []
    for num_processes in (1, 2, 4):
        folder = tmp_path / f"by-{num_processes}"
        finish(launch(num_processes, tiny_yaml, folder))
        results.append(weights(folder))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-5)


def test_two_processes_killed_at_random_moments_end_with_the_same_bits(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    moments = random.Random(0)
    many = "train.epochs=5"  # no kill may come after the last step
    finish(launch(2, tiny_yaml, tmp_path / "unbroken", many))
    folder = tmp_path / "killed"
    checkpoints = Checkpoints(folder / "checkpoints", {}, keep=1)
    for _ in range(2):
        process, before = launch(2, tiny_yaml, folder, many), checkpoints.latest()
        while process.poll() is None and checkpoints.latest() == before:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        kill_all(process)
    finish(launch(2, tiny_yaml, folder, many))
    found, wanted = weights(folder), weights(tmp_path / "unbroken")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not list((folder / "checkpoints").glob(".*"))
