"""Folders of lm-eval's own command line, really run, beside ours."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import EvaluationConfig
from distill.errors import EvalError
from distill.evaluate.foreign import collect_foreign
from distill.evaluate.harness import run_tasks
from distill.evaluate.leaderboard import compare, print_table, write
from tests.tiny_tasks import save_model, write_tasks

pytestmark = pytest.mark.slow  # lm-eval itself takes 15 seconds to start


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, tasks, and one of the models scored by lm-eval and by us."""
    folder = tmp_path_factory.mktemp("work")
    write_tasks(folder / "tasks")
    for seed, name in enumerate(("mine", "theirs")):
        save_model(folder / name, seed=seed)
    lm_eval(folder, "theirs", folder / "elsewhere", limit=4)
    score(folder, "run", mine="mine", same="theirs")
    return folder


def lm_eval(folder: Path, model: str, out: Path, *, limit: int | None) -> None:
    """Score a model with lm-eval's command line."""
    command: list[object] = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={folder / model},dtype=float32,max_length=64"),
        *("--include_path", folder / "tasks", "--tasks", "tiny_choice,tiny_rolling"),
        *("--output_path", out, "--log_samples", "--batch_size", 4),
        *(("--limit", limit) if limit else ()),
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr


def score(folder: Path, run: str, limit: int | None = 4, **models: str) -> Path:
    """Score models as `distill eval` does, into a run folder."""
    config = EvaluationConfig(
        tasks=("tiny_choice", "tiny_rolling"),
        include_path=str(folder / "tasks"),
        limit=limit,
        batch_size=4,
        max_length=64,
        dtype="float32",
    )
    out = folder / run / "eval"
    for name, model in models.items():
        path = str(folder / model)
        run_tasks(name, path, config, out, device="cpu", seed=0, on_progress=lambda _: None)
    listing = [{"name": name, "role": "initial" if name == "mine" else "other"} for name in models]
    (out / "models.json").write_text(json.dumps(listing))
    return folder / run


def results_file(folder: Path) -> Path:
    (found,) = folder.glob("elsewhere/*/results_*.json")
    return found


def changed(work: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of lm-eval's folder whose results say something else."""
    shutil.copytree(work / "elsewhere", tmp_path / "elsewhere")
    path = results_file(tmp_path)
    tree = json.loads(path.read_text())
    for key, value in changes.items():
        tree["config" if key == "limit" else key] = (
            tree["config"] | {key: value} if key == "limit" else value
        )
    path.write_text(json.dumps(tree))
    return tmp_path / "elsewhere"


def test_numbers_of_lm_evals_own_folder_are_ours(work: Path) -> None:
    (theirs,) = collect_foreign(work / "elsewhere")
    assert (theirs.name, theirs.role, theirs.run) == ("theirs", "other", "elsewhere")
    assert theirs.num_parameters is not None
    board = compare([work / "run", work / "elsewhere"])
    ours = next(model for model in board.models if model.name == "run/same")
    assert set(theirs.tasks) == set(ours.tasks) == {"tiny_choice", "tiny_rolling"}
    for task, scores in theirs.tasks.items():
        twin = ours.tasks[task]
        assert scores.main_metric == twin.main_metric
        assert (scores.num_documents, scores.num_documents_total) == (
            twin.num_documents,
            twin.num_documents_total,
        )
        for name, metric in scores.metrics.items():
            assert metric.value == pytest.approx(twin.metrics[name].value, rel=1e-5)
            assert metric.higher_is_better == twin.metrics[name].higher_is_better
        left, right = scores.samples(), twin.samples()
        assert [item["doc_hash"] for item in left] == [item["doc_hash"] for item in right]
        assert [item["metrics"].keys() for item in left] == [
            item["metrics"].keys() for item in right
        ]


def test_a_model_that_was_scored_elsewhere_does_not_differ_from_itself(work: Path) -> None:
    board = compare([work / "run", work / "elsewhere"], baseline="run/same")
    found = {c.task: c for c in board.comparisons if c.model == "theirs"}
    assert found["tiny_choice"].difference == 0
    assert found["tiny_choice"].p_value == 1
    assert found["tiny_rolling"].difference == pytest.approx(0, abs=1e-3)
    assert {c.num_items for c in board.comparisons} == {4}
    assert not any(c.is_significant for c in board.comparisons if c.model == "theirs")


def test_file_and_folders_of_lm_eval_are_read_alike(work: Path) -> None:
    file = results_file(work)
    by_file, by_folder = collect_foreign(file), collect_foreign(file.parent)
    assert by_file == by_folder
    (whole,) = collect_foreign(work / "elsewhere")
    assert replace(whole, run=file.parent.name) == by_file[0]


def test_models_of_one_name_are_called_by_their_folders(work: Path, tmp_path: Path) -> None:
    folder = changed(work, tmp_path)
    (model,) = folder.iterdir()
    shutil.copytree(model, folder / "again")
    board = compare([folder], baseline="again")
    assert [model.name for model in board.models] == sorted(["again", model.name])
    assert {(c.model, c.difference) for c in board.comparisons} == {(model.name, 0)}


def test_the_newest_of_several_files_counts(work: Path, tmp_path: Path) -> None:
    folder = changed(work, tmp_path)
    old = results_file(tmp_path)
    tree = json.loads(old.read_text())
    tree["results"]["tiny_choice"]["acc_norm,none"] = 0.125
    old.with_name("results_2999-01-01T00-00-00.000000.json").write_text(json.dumps(tree))
    (model,) = collect_foreign(folder)
    assert model.tasks["tiny_choice"].main.value == 0.125
    assert model.tasks["tiny_choice"].samples() == []  # none of that time


def test_the_table_says_where_scores_come_from(work: Path, tmp_path: Path) -> None:
    write(compare([work / "run", work / "elsewhere"]), tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "theirs: scored by lm-eval's own command line" in text
    assert "| theirs | other |" in text
    assert str(work) not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"limit": 2.0}, "limit"),
        ({"n-shot": {"tiny_choice": 5, "tiny_rolling": 0}}, "num_fewshot"),
        ({"max_length": 128}, "max_length"),
        ({"lm_eval_version": "0.4.1"}, "lm_eval"),
        ({"chat_template_sha": "abc"}, "chat_template"),
    ],
)
def test_results_of_other_settings_are_refused_unless_asked_for(
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    shown: str,
) -> None:
    folders = [work / "run", changed(work, tmp_path, **changes)]
    with pytest.raises(EvalError, match="different settings") as caught:
        compare(folders)
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert [shown] in lines
    assert any(line and line[0] == "elsewhere/theirs" for line in lines)
    assert "--allow-mixed" in str(caught.value)

    board = compare(folders, allow_mixed=True)
    print_table(board)
    text = capsys.readouterr().out
    assert "†" in text
    assert any(line.startswith("† tiny_choice of theirs") for line in board.remarks)
    assert any(f"{shown} " in line for line in board.remarks)


def test_mixed_limits_are_compared_on_the_documents_that_both_have(
    work: Path,
) -> None:
    run = score(work, "short", limit=2, mine="mine")
    board = compare([run, work / "elsewhere"], allow_mixed=True)
    assert board.baseline == "short/mine"
    assert {c.num_items for c in board.comparisons} == {2}


def test_results_without_samples_are_shown_but_not_tested(work: Path, tmp_path: Path) -> None:
    folder = changed(work, tmp_path)
    for path in folder.glob("*/samples_*"):
        path.unlink()
    board = compare([work / "run", folder])
    assert {c.model for c in board.comparisons} == {"run/same"}
    assert (
        "tiny_choice: no test of theirs against run/mine: the documents were not kept (theirs)."
        in board.remarks
    )


def test_other_documents_are_refused(work: Path, tmp_path: Path) -> None:
    folder = changed(work, tmp_path)
    (path,) = folder.glob("*/samples_tiny_choice_*")
    sample, *others = map(json.loads, path.read_text().splitlines())
    lines = [sample | {"doc_hash": "0" * 64}, *others]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(EvalError, match="1 of 4 documents differ") as caught:
        compare([work / "run", folder])
    assert f"doc_hash {'0' * 64}" in str(caught.value)
    board = compare([work / "run", folder], allow_mixed=True)
    assert any("their documents differ" in line for line in board.remarks)


def test_a_file_that_lm_eval_did_not_write_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results_x.json"
    path.write_text('{"results": {"a": 1}}')
    for target in (path, tmp_path):
        with pytest.raises(EvalError, match=r"results_x\.json is not a file of results") as caught:
            compare([target])
        assert "n-samples: Field required" in str(caught.value)
        assert "--log_samples" in str(caught.value)


def test_scores_that_are_not_finite_count_as_missing(work: Path, tmp_path: Path) -> None:
    results = json.loads(results_file(work).read_text())["results"]
    results["tiny_rolling"]["word_perplexity,none"] = math.nan
    (model,) = collect_foreign(changed(work, tmp_path, results=results))
    assert model.tasks["tiny_rolling"].main.value is None
    assert model.tasks["tiny_choice"].main.value is not None


def test_results_under_a_name_of_the_users_find_their_samples(work: Path, tmp_path: Path) -> None:
    file = results_file(changed(work, tmp_path).parent)
    named = file.rename(file.with_name(file.name.replace("results_", "small_model_")))
    (model,) = collect_foreign(named)
    assert len(model.samples("tiny_choice")) == 4


def test_groups_are_no_tasks(work: Path, tmp_path: Path) -> None:
    results = json.loads(results_file(work).read_text())["results"]
    results["tiny_group"] = {"alias": "tiny_group", "acc,none": 0.5, "acc_stderr,none": 0.1}
    (model,) = collect_foreign(changed(work, tmp_path, results=results))
    assert set(model.tasks) == {"tiny_choice", "tiny_rolling"}
