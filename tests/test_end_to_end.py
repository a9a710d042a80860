"""The whole pipeline as a user types it: text -> cache -> student -> scores -> leaderboard."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distill.cli import main
from distill.config import ExperimentConfig
from tests.tiny_tasks import write_tasks

ConfigMaker = Callable[..., ExperimentConfig]
ROOT = Path(__file__).parent.parent
TRAIN = ("train.learning_rate=3e-3", "train.epochs=8")


@pytest.fixture
def with_tasks(tiny_yaml: Path, tmp_path: Path) -> Path:
    """The tiny experiment with one lm-eval task."""
    tasks = write_tasks(tmp_path / "tasks")
    tree = yaml.safe_load(tiny_yaml.read_text())
    tree["evaluation"] |= {"include_path": str(tasks), "tasks": ["tiny_choice"]}
    tiny_yaml.write_text(yaml.safe_dump(tree))
    return tiny_yaml


def distill(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "distill.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ)
    )


@pytest.mark.slow
def test_run_makes_a_student_that_nears_the_teacher_and_a_second_run_skips_all(
    with_tasks: Path, tmp_path: Path
) -> None:
    first = distill("run", with_tasks, *TRAIN)
    assert first.returncode == 0, first.stderr
    assert "left" in first.stderr
    assert "tokens/s" in first.stderr
    run = tmp_path / "run"
    table = (run / "leaderboard.md").read_text()
    results = json.loads((run / "results.json").read_text())
    models = {model["name"]: model for model in results["models"]}
    assert list(models) == ["teacher", "initial", "student"]
    assert all(name in table for name in models)
    kl = {name: model["fidelity"]["kl_nats"]["value"] for name, model in models.items()}
    error = {name: model["fidelity"]["kl_nats"]["stderr"] for name, model in models.items()}
    # The estimate is unbiased: of the teacher itself it is 0 within its standard error.
    assert abs(kl["teacher"]) < 4 * error["teacher"] + 1e-3
    assert kl["teacher"] < kl["student"] < 0.7 * kl["initial"]
    assert models["teacher"]["fidelity"]["agreement"]["value"] > 0.999
    assert "tiny_choice" in table

    second = distill("run", with_tasks, *TRAIN)
    assert second.returncode == 0, second.stderr
    for line in ("cache: complete", "train: finished", "fidelity is there, skipped"):
        assert line in second.stdout
    assert second.stdout.count("skipped") >= 5
    assert (run / "leaderboard.md").read_text() == table

    board = distill("leaderboard", with_tasks, "--out", tmp_path / "board")
    assert board.returncode == 0, board.stderr
    assert "student" in board.stdout
    assert json.loads((tmp_path / "board" / "results.json").read_text()) == results


def test_stages_run_on_their_own(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", str(tiny_yaml), "--worker", "0/2"]) == 0
    assert "others are missing" in capsys.readouterr().out
    assert main(["train", str(tiny_yaml)]) == 2
    assert "is incomplete" in capsys.readouterr().err
    assert main(["cache", str(tiny_yaml), "--worker", "1/2"]) == 0
    assert "cache: complete" in capsys.readouterr().out
    assert main(["verify", str(tiny_yaml)]) == 0
    assert "6 shards checked, 0 faults" in capsys.readouterr().out
    assert main(["inspect", str(tiny_yaml), "--json"]) == 0
    summaries = json.loads(capsys.readouterr().out)
    assert [summary["split"] for summary in summaries] == ["train", "held_out"]
    assert summaries[0]["num_tokens"] == 24 * 32
    assert main(["train", str(tiny_yaml), "train.epochs=0.25"]) == 0
    assert main(["eval", str(tiny_yaml), "train.epochs=0.25"]) == 0
    assert (tmp_path / "run" / "leaderboard.md").exists()


def test_top_k_pipeline_trains_too(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["targets.kind=top_k", "targets.k=8", "targets.temperature=2", "train.ce_weight=0"]
    assert main(["run", str(tiny_yaml), *targets, *TRAIN]) == 0
    models = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    kl = {model["name"]: model["fidelity"]["kl_nats"]["value"] for model in models}
    assert 0 <= kl["teacher"] < 1e-3  # what is left is the coding of the probabilities
    assert kl["student"] < 0.7 * kl["initial"]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run" / "cache")]) == 0
    shown = capsys.readouterr().out
    assert "top_k, bits 8, k 8" in shown
    assert "temperature 2.0" in shown
