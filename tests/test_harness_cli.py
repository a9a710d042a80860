"""Our scores are those of lm-eval's own command line, to the last digit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.config import EvaluationConfig
from distill.evaluate.harness import run_tasks
from tests.tiny_tasks import write_tasks

TASKS = ("tiny_choice", "tiny_rolling")


@pytest.mark.slow
@pytest.mark.parametrize(("num_fewshot", "limit"), [(None, None), (2, 4)])
def test_scores_equal_those_of_the_command_line_to_the_last_digit(
    tiny_teacher: Path, tmp_path: Path, num_fewshot: int | None, limit: int | None
) -> None:
    folder = write_tasks(tmp_path / "tasks")
    theirs = command_line(tiny_teacher, folder, tmp_path / "out", num_fewshot, limit)
    config = EvaluationConfig(
        tasks=TASKS,
        include_path=str(folder),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=3,
        max_length=128,
        dtype="float32",
    )
    files = run_tasks(
        "tiny",
        str(tiny_teacher),
        config,
        tmp_path / "eval",
        device="cpu",
        seed=7,
        on_progress=lambda _: None,
    )
    compared = 0
    for path in files:
        record, row = json.loads(path.read_text()), theirs["results"][path.stem]
        assert record["num_fewshot"] == theirs["n-shot"][path.stem]
        for name, metric in record["metrics"].items():
            stderr = row[f"{name}_stderr,none"]
            assert metric["value"] == row[f"{name},none"]
            assert metric["stderr"] == (None if stderr == "N/A" else stderr)
            compared += 1
    assert compared == 4


def command_line(
    model: Path, tasks: Path, out: Path, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={model},dtype=float32,max_length=128"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--device", "cpu"]
    command += ["--batch_size", "3", "--seed", "7", "--output_path", str(out)]
    if num_fewshot is not None:
        command += ["--num_fewshot", str(num_fewshot)]
    if limit is not None:
        command += ["--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.rglob("results_*.json")
    results: dict[str, Any] = json.loads(path.read_text())
    return results
