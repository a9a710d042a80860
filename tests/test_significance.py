"""What the table says of differences between its models."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.errors import EvalError
from distill.evaluate.leaderboard import Leaderboard, compare, write
from distill.evaluate.results import collect
from tests.run_folders import make_run, word_perplexity


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "demo")


def markdown(board: Leaderboard, out: Path) -> str:
    write(board, out)
    return (out / "leaderboard.md").read_text()


def solved(run: Path, model: str) -> list[float]:
    samples = json.loads((run / "eval" / model / "hellaswag.json").read_text())["samples"]
    return [sample["metrics"]["acc_norm"] for sample in samples]


def test_the_only_untrained_student_is_the_baseline(run: Path, tmp_path: Path) -> None:
    board = compare([run])
    assert board.baseline == "initial"
    assert [(c.task, c.model) for c in board.comparisons] == [
        ("hellaswag", name) for name in ("teacher", "student", "baseline")
    ]
    student = board.comparisons[1]
    pairs = list(zip(solved(run, "student"), solved(run, "initial"), strict=True))
    assert (student.gained, student.lost) == (pairs.count((1, 0)), pairs.count((0, 1)))
    assert student.difference == pytest.approx(0.44 - 0.25)
    assert student.low < 0.19 < student.high
    assert student.p_value <= student.p_holm < 0.05

    several = compare([run, make_run(tmp_path / "other", student_acc=0.5)])
    assert several.baseline == "initial"  # shared by both
    (path,) = (tmp_path / "other").glob("eval/initial/hellaswag.json")
    for file in path.parent.iterdir():
        file.write_text(file.read_text().replace('"weights": "I"', '"weights": "J"'))
    several = compare([run, tmp_path / "other"])
    assert several.baseline is None
    assert several.comparisons == ()
    assert "▲" not in markdown(several, tmp_path)


def test_marks_point_up_for_better_whatever_the_metrics_direction(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", student_acc=0.12)
    for name, value in (("initial", 30.0), ("student", 25.0)):
        weights = json.loads((run / f"eval/{name}/wiki.json").read_text())["identity"]["weights"]
        (run / f"eval/{name}/wiki.json").write_text(json.dumps(word_perplexity(value, weights)))
    board = compare([run])
    wiki = {c.model: c for c in board.comparisons if c.task == "wiki"}
    assert wiki["student"].difference == pytest.approx(-5)
    assert wiki["student"].test == "bootstrap"
    text = markdown(board, tmp_path)
    assert "| 12.0 ± 2.2 ▼ |" in text  # a lower accuracy
    assert "| **25 ▲** |" in text  # a lower perplexity


def test_differences_that_chance_explains_get_no_mark(tmp_path: Path) -> None:
    board = compare([make_run(tmp_path / "demo", student_acc=0.29)])
    student = next(c for c in board.comparisons if c.model == "student")
    assert not student.is_significant
    assert "| **29.0 ± 2.2** |" in markdown(board, tmp_path)


def test_another_baseline_is_chosen_by_name(run: Path) -> None:
    board = compare([run], baseline="teacher")
    assert {c.baseline for c in board.comparisons} == {"teacher"}
    found = {c.model: c for c in board.comparisons if c.task == "hellaswag"}
    back = next(c for c in compare([run]).comparisons if c.model == "teacher")
    assert found["initial"].difference == pytest.approx(-back.difference)
    with pytest.raises(EvalError, match=r"baseline 'techer' is not in the table.*mean teacher"):
        compare([run], baseline="techer")


def test_all_comparisons_are_corrected_together(run: Path) -> None:
    board = compare([run], baseline="teacher")
    assert {c.task for c in board.comparisons} == {"hellaswag", "wiki"}
    smallest = min(board.comparisons, key=lambda c: c.p_value)
    assert smallest.p_holm == pytest.approx(len(board.comparisons) * smallest.p_value)


def test_gap_recovered_on_a_task_has_an_interval(run: Path, tmp_path: Path) -> None:
    board = compare([run])
    (gap,) = board.gaps
    assert (gap.task, gap.model, gap.baseline, gap.teacher) == (
        *("hellaswag", "student"),
        *("initial", "teacher"),
    )
    assert gap.value == pytest.approx((0.44 - 0.25) / (0.55 - 0.25))
    assert gap.low is not None
    assert gap.high is not None
    assert gap.low < gap.value < gap.high
    write(board, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["gaps"][0]["value"] == gap.value


def test_results_json_holds_every_comparison(run: Path, tmp_path: Path) -> None:
    board = compare([run])
    write(board, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["baseline"] == "initial"
    assert len(results["comparisons"]) == 3
    student = results["comparisons"][1]
    assert student["is_significant"] is True
    assert student["test"] == "mcnemar"
    assert (student["low"], student["high"]) == (
        board.comparisons[1].low,
        board.comparisons[1].high,
    )
    assert results["remarks"] == list(board.remarks)


def test_csv_holds_plain_numbers_one_line_a_model(run: Path, tmp_path: Path) -> None:
    write(compare([run]), tmp_path)
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        lines = {line["model"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["teacher", "initial", "student", "baseline"]
    student = lines["student"]
    assert float(student["hellaswag"]) == 0.44
    assert float(student["hellaswag stderr"]) == 0.022
    assert student["hellaswag metric"] == "acc_norm"
    assert float(student["ce_nats"]) == 2.6
    assert float(student["gap_recovered"]) == pytest.approx(0.7)
    assert int(student["num_parameters"]) == 113_000_000
    assert student["kl_nats stderr"] == ""
    assert lines["initial"]["wiki"] == lines["baseline"]["ce_nats"] == ""


def test_samples_are_reachable_as_stored(run: Path) -> None:
    path = run / "eval" / "student" / "hellaswag.json"
    record = json.loads(path.read_text())
    record["samples"][0] |= {"prompt": "The cat", "choices": ["sat", "sang"], "unheard": [1]}
    path.write_text(json.dumps(record))
    student = collect(run)[2]
    assert student.samples("hellaswag") == record["samples"]
    assert compare([run]).comparisons[1].num_items == 500


def test_a_task_that_the_baseline_lacks_is_not_tested(run: Path) -> None:
    (run / "eval" / "initial" / "wiki.json").unlink()
    board = compare([run])
    assert board.remarks == (
        "wiki: no test of teacher, student against initial: the baseline has no score.",
    )


def test_changed_documents_are_refused_with_both_sides(run: Path) -> None:
    path = run / "eval" / "student" / "hellaswag.json"
    path.write_text(path.read_text().replace('"q7"', '"changed"'))
    with pytest.raises(EvalError, match="1 of 500 documents differ") as caught:
        compare([run])
    assert "student  document 7  doc_hash changed" in str(caught.value)
    assert "initial  document 7  doc_hash q7" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("limit", 100), ("num_fewshot", 5)])
def test_mixed_settings_are_marked_and_explained(tmp_path: Path, name: str, value: Any) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", **{name: value})]
    text = markdown(compare(folders, allow_mixed=True), tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| two/student"))
    assert "| 44.0 ± 2.2 ▲ † |" in row  # and not bold
    assert "† hellaswag of two/student was scored with other settings than that of" in text
    assert f"{name} {value} against" in text


def test_the_command_line_names_a_baseline_and_mixes_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(make_run(tmp_path / "one")), str(make_run(tmp_path / "two", limit=100))]
    assert main(["leaderboard", *folders]) == 2
    assert "different settings" in capsys.readouterr().err
    arguments = ["--allow-mixed", "--baseline", "baseline", "--out", str(tmp_path / "out")]
    assert main(["leaderboard", *folders, *arguments]) == 0
    assert "than baseline" in capsys.readouterr().out.replace("\n", " ")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["baseline"] == "baseline"
    assert not math.isnan(results["comparisons"][0]["p_holm"])
