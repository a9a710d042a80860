import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill.errors import EvalError
from distill.evaluate.leaderboard import compare, print_table, write
from distill.evaluate.render import best_rows, count, perplexity
from scripts import leaderboard as script
from tests.run_folders import SETTINGS, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "demo")


def printed(folders: list[Path], width: int = 100, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    print_table(compare(folders), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_markdown_holds_the_table_and_the_settings(run: Path, tmp_path: Path) -> None:
    write(compare([run]), tmp_path)
    assert (
        (tmp_path / "leaderboard.md").read_text()
        == """\
# Leaderboard

| model | role | parameters | held-out perplexity | KL to teacher (nats) | top-1 agreement (%) | \
gap recovered (%) | hellaswag acc_norm (%) | wiki word_perplexity |
| :-- | :-- | --: | --: | --: | --: | --: | --: | --: |
| teacher | teacher | 1.71 B | 7.39 | 0.000 | 100.0 | - | 55.0 ± 2.2 ▲ | 12.34 |
| initial | initial | 113 M | 54.60 | 2.500 | 20.0 | - | 25.0 ± 2.2 | not finite |
| student | student | 113 M | **13.46** | **0.412** | **70.1** | **70.0** \
| **44.0 ± 2.2 ▲** | **23.46** |
| baseline | other | 90.0 M | - | - | - | - | 60.0 ± 2.2 ▲ | - |

- hellaswag: 500 of 10,042 documents (limit: 500), few-shot examples: as the task says, \
longest context: 2048 tokens, bfloat16, lm-eval 0.4.13.
- wiki: 62 of 62 documents (limit: 500), few-shot examples: as the task says, \
longest context: 2048 tokens, bfloat16, lm-eval 0.4.13.
- Held-out columns: 12,345 tokens scored.
- Bold: the best student of a column, before or after training.
- Standard errors (±) are those of single models, not of differences between models.
- Gap recovered: the share of the held-out cross-entropy between initial student (0) and teacher \
(100) that training has made good.
- ▲ ▼: significantly better or worse than initial: paired test on the same documents \
(McNemar's for metrics of 0 and 1, else a bootstrap), two-sided at 5%, Holm's correction for the \
3 comparisons of this table. Intervals of the differences are in results.json.
- wiki: no test of teacher, student against initial: the value is not finite (initial).
"""
    )


def test_an_untrained_student_that_is_better_is_the_bold_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", student_acc=0.24)
    write(compare([run]), tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "**25.0 ± 2.2**" in text
    assert "**24.0 ± 2.2" not in text


def test_the_terminal_shows_the_same_cells_within_its_width(run: Path) -> None:
    wide, narrow = printed([run], width=160), printed([run], width=60)
    assert wide.count("baseline") == 1
    assert max(map(len, narrow.splitlines())) <= 60
    for cell in ("1.71 B", "13.46", "0.412", "70.1", "44.0 ± 2.2", "23.46", "not finite", "70.0"):
        assert cell in wide
        assert cell in narrow
    assert "…" not in narrow
    assert narrow.count("baseline") > 1  # the first column of every part


def test_the_best_student_is_bold_on_the_terminal(run: Path) -> None:
    text = printed([run], width=160, force_terminal=True, no_color=True)
    assert re.search(r"\x1b\[1m *44\.0 ± 2\.2 ▲\x1b\[0m", text)
    assert not re.search(r"\x1b\[1m *(55|60)\.0", text)  # neither teacher nor baseline


def test_names_of_several_runs_are_prefixed_and_shared_models_appear_once(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", student_ce=2.4)]
    board = compare(folders)
    assert [model.name for model in board.models] == [
        *("teacher", "initial", "one/student", "baseline", "two/student")
    ]
    assert board.held_out_is_comparable
    assert [model.gap_recovered for model in board.models if model.role == "student"] == [
        pytest.approx(0.7),
        pytest.approx(0.8),
    ]


def test_a_shared_model_has_the_scores_of_all_its_runs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    (folders[0] / "eval/teacher/wiki.json").unlink()
    (folders[0] / "eval/teacher/fidelity.json").unlink()
    teacher = compare(folders).models[0]
    assert set(teacher.tasks) == {"hellaswag", "wiki"}
    assert teacher.fidelity is not None


def test_a_name_for_two_different_models_keeps_its_prefix(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    for name in ("hellaswag", "wiki", "fidelity"):
        path = folders[1] / "eval" / "initial" / f"{name}.json"
        path.write_text(path.read_text().replace('"weights": "I"', '"weights": "J"'))
    names = [model.name for model in compare(folders).models]
    assert {"one/initial", "two/initial"} < set(names)


@pytest.mark.parametrize(
    ("name", "value"), [("limit", 100), ("num_fewshot", 5), ("max_length", 1024), ("lm_eval", "9")]
)
def test_different_settings_are_refused_with_both_sides(
    tmp_path: Path, name: str, value: Any
) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", **{name: value})]
    with pytest.raises(EvalError, match="different settings") as caught:
        compare(folders)
    shown = [line.split() for line in str(caught.value).splitlines()]
    assert [name] in shown
    assert ["one/teacher", str(SETTINGS[name])] in shown
    assert ["two/teacher", str(value)] in shown
    assert shown.count(["hellaswag:"]) == 1
    assert ["wiki:"] not in shown


def test_runs_that_repeat_with_another_seed_are_compared(tmp_path: Path) -> None:
    compare([make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=1)])


def test_held_out_columns_of_different_caches_are_marked(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", cache="other")]
    assert "compare them within a run only" in " ".join(printed(folders).split())
    write(compare(folders), tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "compare them within a run only" in text
    assert "**13.46**" not in text
    assert "**44.0 ± 2.2 ▲**" in text


def test_results_json_reads_back_and_is_reproducible(run: Path, tmp_path: Path) -> None:
    write(compare([run]), tmp_path / "a")
    write(compare([run]), tmp_path / "b")
    text = (tmp_path / "a" / "results.json").read_text()
    assert text == (tmp_path / "b" / "results.json").read_text()
    assert str(tmp_path) not in text

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads(text, parse_constant=refuse)
    assert results["schema_version"] == 2
    assert results["runs"] == ["demo"]
    assert results["settings"]["hellaswag"]["limit"] == 500
    assert results["versions"]["lm_eval"]
    student = results["models"][2]
    assert student["name"] == "student"
    assert student["gap_recovered"] == pytest.approx(0.7)
    assert student["tasks"]["hellaswag"]["metrics"]["acc"]["value"] == pytest.approx(0.43)
    assert student["tasks"]["hellaswag"]["identity"]["weights"] == "student of demo"
    assert student["fidelity"]["kl_nats"] == {
        "value": 0.4125,
        "stderr": None,
        "higher_is_better": None,
    }


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a" / "demo"), make_run(tmp_path / "b" / "demo")]
    with pytest.raises(EvalError, match="two are called 'demo'"):
        compare(folders)


def test_numbers_keep_sensible_digits() -> None:
    assert [count(n) for n in (None, 999, 52_000, 999_999_999, 8_030_000_000, 405_000_000_000)] == [
        *("-", "999", "52.0 k", "1.00 B", "8.03 B", "405 B")
    ]
    assert [perplexity(ce) for ce in (0.0, 2.5, 12.0, 1e6)] == [
        *("1.00", "12.18", "1.63e+05", "1.01e+304")
    ]


def test_equal_bests_are_all_bold_and_unknown_directions_none() -> None:
    values = [3.0, 1.0, None, 3.0]
    assert best_rows(values, range(4), higher_is_better=True) == {0, 3}
    assert best_rows(values, [0, 3], higher_is_better=False) == {0, 3}
    assert best_rows(values, range(4), higher_is_better=None) == frozenset()


def test_the_script_prints_writes_and_reports(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", str(run), "--out", str(tmp_path)])
    assert script.main() == 0
    assert "44.0 ± 2.2" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", str(tmp_path / "absent")])
    assert script.main() == 2
    assert "distill eval CONFIG" in capsys.readouterr().err


def test_the_table_needs_no_torch() -> None:
    code = "import sys, distill.evaluate.leaderboard; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
