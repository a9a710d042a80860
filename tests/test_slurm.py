"""The SLURM script, run as SLURM runs it: once a task, with the variables of an array."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.cache.reader import open_cache
from tests.processes import cached

SCRIPT = Path(__file__).parent.parent / "scripts" / "slurm_capture.sh"


def start(yaml: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a task; `distill` is the command of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(yaml), "seed=0"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(SCRIPT.parent.parent), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def array(task: int, first: int, last: int, step: int = 1) -> dict[str, str]:
    """Variables of a task."""
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(last),
        "SLURM_ARRAY_TASK_STEP": str(step),
        "SLURM_ARRAY_TASK_COUNT": str((last - first) // step + 1),
    }


@pytest.mark.slow
def test_tasks_in_turn_do_a_share_each_and_the_last_seals_the_cache(
    tiny_yaml: Path, written_cache: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run" / "cache"
    for task, (done, end) in {3: (4, "others are missing"), 5: (8, "complete in")}.items():
        process = start(tiny_yaml, **array(task, first=3, last=5, step=2))
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.startswith(f"worker {(task - 3) // 2} of 2 on ")
        assert end in out
        assert len(list(root.glob("*/shards/*.json"))) == done
    assert cached(root) == cached(written_cache)


@pytest.mark.slow
def test_tasks_at_once_complete_the_cache_though_one_is_killed_and_requeued(
    tiny_yaml: Path, written_cache: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run" / "cache"
    killed, other = (start(tiny_yaml, **array(task, 0, 1)) for task in (0, 1))
    while killed.poll() is None and not list(root.glob("*/shards/*.parquet")):
        pass
    killed.kill()
    killed.communicate()
    again = start(tiny_yaml, **array(0, 0, 1), SLURM_RESTART_COUNT="1")
    for process in (other, again):
        out, err = process.communicate()
        assert process.returncode == 0, err
    assert "restart 1" in out
    assert cached(root) == cached(written_cache)
    assert len(open_cache(str(root / "train"))) == 24


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, "SLURM_ARRAY_TASK_ID: start this with sbatch --array"),
        (array(0, 0, 4) | {"SLURM_ARRAY_TASK_COUNT": "2"}, "the array has gaps"),
    ],
    ids=["no array", "gaps"],
)
def test_what_would_leave_shards_out_is_refused(
    tiny_yaml: Path, variables: dict[str, str], shown: str
) -> None:
    process = start(tiny_yaml, **variables)
    _, err = process.communicate()
    assert process.returncode != 0
    assert shown in err
    assert not (tiny_yaml.parent / "run").exists()
