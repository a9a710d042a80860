"""Training by several processes on gloo: replicated and sharded, killed and resumed."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.checkpoint import Checkpoints
from tests.processes import Ranks

ROOT = Path(__file__).parent.parent
SCRATCH = (
    "student.kind=scratch",
    "student.hidden_size=64",
    "student.intermediate_size=96",
    "student.num_layers=2",
    "student.num_heads=4",
)
TIED = (*SCRATCH, "student.tie_embeddings=true")
LORA = ("train.lora.rank=4", "train.learning_rate=1e-2")
RECOMPUTED = ("train.gradient_checkpointing=true",)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_copy")]


def arguments(yaml: Path, run_folder: Path, *settings: str) -> list[str]:
    """The command of a training of 6 steps."""
    cache = yaml.with_name("run") / "cache"
    return [
        *("train", str(yaml), f"run_folder={run_folder}", f"cache.folder={cache}", "--resume"),
        *("train.learning_rate=1e-3", "train.checkpoint_every=1", "train.blocks_per_step=4"),
        *("train.save_dtype=float32", *settings),
    ]


def launch(
    num_processes: int, yaml: Path, run_folder: Path, *settings: str, sharded: bool = False
) -> Ranks:
    """Start a training."""
    command = arguments(yaml, run_folder, *settings)
    return Ranks(command, run_folder.with_suffix(".txt"), num_processes, sharded=sharded)


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run_folder / "student" / "final" / "model.safetensors"))


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


def test_how_a_step_is_shared_by_processes_does_not_change_it(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    results = []
    for num_processes in (1, 2, 4):
        folder = tmp_path / f"by-{num_processes}"
        launch(num_processes, tiny_yaml, folder).finish()
        results.append(weights(folder))
    for other in results[1:]:
        assert_close(other, results[0])


def test_torchrun_starts_processes_that_train_together(tiny_yaml: Path, tmp_path: Path) -> None:
    launch(1, tiny_yaml, tmp_path / "alone").finish()
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    verb = arguments(tiny_yaml, tmp_path / "launched")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "distill.cli", *verb],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_close(weights(tmp_path / "launched"), weights(tmp_path / "alone"))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="untied"),
        pytest.param(TIED, id="tied"),
        pytest.param((*LORA, *RECOMPUTED), id="untied-lora-recomputed"),
        pytest.param((*TIED, *LORA), id="tied-lora"),
        pytest.param((*TIED, *RECOMPUTED), id="tied-recomputed"),
    ],
)
def test_sharded_student_is_the_one_of_a_single_process(
    tiny_yaml: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    launch(1, tiny_yaml, tmp_path / "whole", *settings).finish()
    launch(2, tiny_yaml, tmp_path / "sharded", *settings, sharded=True).finish()
    assert_close(weights(tmp_path / "sharded"), weights(tmp_path / "whole"))


def test_sharded_training_in_bfloat16_saves_what_a_single_process_does(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    settings = ("train.precision=bfloat16",)
    launch(1, tiny_yaml, tmp_path / "whole", *settings).finish()
    launch(2, tiny_yaml, tmp_path / "sharded", *settings, sharded=True).finish()
    found, wanted = weights(tmp_path / "sharded"), weights(tmp_path / "whole")
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) < 5e-3, name  # 6 steps of at most 1e-3


def test_sharded_training_goes_on_with_another_number_of_processes(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    launch(2, tiny_yaml, tmp_path / "unbroken", sharded=True).finish()
    folder = tmp_path / "grown"
    stopped = launch(2, tiny_yaml, folder, sharded=True)
    wait_for_checkpoint(stopped, folder, after=1)
    stopped.kill()
    launch(4, tiny_yaml, folder, sharded=True).finish()
    assert_close(weights(folder), weights(tmp_path / "unbroken"))
    assert '"processes": "sharded"' in (folder / "checkpoints" / "run.json").read_text()


def wait_for_checkpoint(ranks: Ranks, folder: Path, after: int) -> None:
    """Until a newer checkpoint than `after` is there."""
    checkpoints = Checkpoints(folder / "checkpoints", {}, keep=1)
    while ranks.are_running and checkpoints.latest() <= after:
        time.sleep(0.002)
    assert checkpoints.latest() > after


@pytest.mark.parametrize(("num_processes", "kills", "seconds"), [(1, 14, 1.5), (2, 6, 3.0)])
def test_training_killed_at_random_moments_ends_with_the_same_bits(
    tiny_yaml: Path, tmp_path: Path, num_processes: int, kills: int, seconds: float
) -> None:
    moments = random.Random(num_processes)
    settings = ("train.epochs=2", "train.keep_best=true", "train.eval_every=3")
    launch(num_processes, tiny_yaml, tmp_path / "unbroken", *settings).finish()
    wanted = weights(tmp_path / "unbroken")
    run = done = 0
    while done < kills:
        folder = tmp_path / f"killed-{run}"
        ranks = launch(num_processes, tiny_yaml, folder, *settings)
        deadline = time.monotonic() + moments.uniform(0, seconds)
        while ranks.are_running and time.monotonic() < deadline:
            time.sleep(0.002)
        done += ranks.are_running
        ranks.kill()
        run += (folder / "student" / "final").exists()
    folder = tmp_path / f"killed-{run}"
    launch(num_processes, tiny_yaml, folder, *settings).finish()
    for number in range(run + 1):
        found = weights(tmp_path / f"killed-{number}")
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not list((folder / "checkpoints").glob(".*"))
