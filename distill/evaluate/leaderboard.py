"""One table of the models of one run or of many. No torch here."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.errors import EvalError
from distill.evaluate import mixed, render, significance
from distill.evaluate.columns import BETTER, WORSE, columns, notes
from distill.evaluate.foreign import collect_foreign, is_foreign, run_name
from distill.evaluate.page import render_page
from distill.evaluate.page_source import page_of
from distill.evaluate.paired import Comparison, Gap
from distill.evaluate.results import ModelResult, collect
from distill.evaluate.sheets import as_csv, as_tree, versions
from distill.files import write_json_atomically, write_text_atomically

SCHEMA_VERSION = 2
"""Of results.json."""

_TERMINAL_WIDTH = 100
"""Columns assumed where the output is not a terminal."""

_INCOMPARABLE = (
    "The held-out columns come from different held-out caches or settings: compare them within a "
    "run only. Nothing in them is bold."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """Comparable results, one entry a model, in the order of the table."""

    runs: tuple[str, ...]
    models: tuple[ModelResult, ...]
    held_out_is_comparable: bool
    """Whether all models were measured on the same held-out blocks, in the same way."""
    baseline: str | None = None
    """Name of the model that all others are tested against."""
    comparisons: tuple[Comparison, ...] = ()
    """Paired tests against the baseline, corrected together; see `distill.evaluate.paired`."""
    gaps: tuple[Gap, ...] = ()
    """Gap recovered by trained students, task by task."""
    remarks: tuple[str, ...] = ()
    """What was not compared, and which settings were mixed: sentences for a reader."""


def compare(
    folders: Sequence[Path], baseline: str | None = None, allow_mixed: bool = False
) -> Leaderboard:
    """Collect the models of several runs into one table and test them against one of its models.

    With several runs, names are prefixed by the run's. A model that is in several runs, by the
    fingerprint of its weights, appears once, with the scores of the first run that has them. Models
    that lm-eval's own command line scored keep their names where these are clear.

    Args:
        folders: Run folders; or files or folders that `lm-eval run --output_path` wrote.
        baseline: A name in the table. None takes the untrained student if there is exactly one;
            else nothing is tested.
        allow_mixed: Show scores that were made with different settings, marked, instead of
            refusing them; models are tested on the documents that they share.

    Raises:
        EvalError: a folder has no results, two have one name, there is no such baseline, or models
            were scored on a task with different settings or on different documents.
    """
    runs = [run_name(folder) for folder in folders]
    repeated = sorted({run for run in runs if runs.count(run) > 1})
    if repeated or not runs:
        problem = f"two are called {repeated[0]!r}; rename one" if repeated else "none is given"
        raise EvalError(f"the leaderboard needs run folders with different names: {problem}.")
    found = [
        model
        for folder in folders
        for model in (collect_foreign(folder) if is_foreign(folder) else collect(folder))
    ]
    if not allow_mixed:
        mixed.refuse_clashes(found)
    held_out = [model.fidelity.settings for model in found if model.fidelity]
    models = _merge(found) if len(runs) > 1 else tuple(found)
    chosen = _choose_baseline(models, baseline)
    findings = significance.find(models, chosen, allow_mixed=allow_mixed)
    return Leaderboard(
        runs=tuple(runs),
        models=models,
        held_out_is_comparable=all(settings == held_out[0] for settings in held_out),
        baseline=chosen,
        comparisons=findings.comparisons,
        gaps=findings.gaps,
        remarks=(*findings.remarks, *mixed.describe_clashes(models), *_foreign_remarks(models)),
    )


def print_table(board: Leaderboard, console: Console | None = None) -> None:
    """Print the table; what does not fit into the width follows as further tables."""
    if console is None:
        console = Console(width=None if sys.stdout.isatty() else _TERMINAL_WIDTH)
    for table in render.tables(_columns(board), console.width):
        console.print(table)
        console.print()
    for line in _significance_notes(board):
        console.print(line, highlight=False, markup=False)
    for line in _warnings(board):
        console.print(line, style="yellow", highlight=False, markup=False)


def write(board: Leaderboard, out: Path) -> None:
    """Write leaderboard.md, .csv and .html, and results.json; equal results give equal bytes.

    Raises:
        StorageError: the disk is full or read-only.
    """
    below = "".join(f"- {line}\n" for line in all_notes(board))
    text = f"# Leaderboard\n\n{render.markdown(_columns(board))}\n{below}"
    write_text_atomically(out / "leaderboard.md", text)
    write_text_atomically(out / "leaderboard.csv", as_csv(board.models))
    page = page_of(board, all_notes(board), versions())
    write_text_atomically(out / "leaderboard.html", render_page(page))
    write_json_atomically(out / "results.json", _as_json(board))


def all_notes(board: Leaderboard) -> list[str]:
    """Say how scores and tests were made and what the marks mean, one line each."""
    return [*notes(board.models), *_significance_notes(board), *_warnings(board)]


def _columns(board: Leaderboard) -> list[render.Column]:
    return columns(board.models, board.held_out_is_comparable, board.comparisons)


def _significance_notes(board: Leaderboard) -> list[str]:
    if not board.comparisons:
        return []
    num = len(board.comparisons)
    tests = f"{num} comparison{'' if num == 1 else 's'}"
    return [
        (
            f"{BETTER} {WORSE}: significantly better or worse than {board.baseline}: paired test "
            "on the same documents (McNemar's for metrics of 0 and 1, else a bootstrap), two-sided "
            f"at 5%, Holm's correction for the {tests} of this table. Intervals of the differences "
            "are in results.json."
        )
    ]


def _warnings(board: Leaderboard) -> list[str]:
    return [*board.remarks, *([] if board.held_out_is_comparable else [_INCOMPARABLE])]


def _foreign_remarks(models: Sequence[ModelResult]) -> list[str]:
    names = ", ".join(model.name for model in models if model.is_foreign)
    if not names:
        return []
    return [
        (
            f"{names}: scored by lm-eval's own command line, whose files do not say how a task was "
            "defined; equal are lm-eval's version, the settings and, where models are tested "
            "against each other, the documents."
        )
    ]


def _choose_baseline(models: Sequence[ModelResult], wanted: str | None) -> str | None:
    names = [model.name for model in models]
    if wanted is None:
        initial = [model.name for model in models if model.role == "initial"]
        return initial[0] if len(initial) == 1 else None
    if wanted not in names:
        nearest = get_close_matches(wanted, names, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise EvalError(
            f"the baseline {wanted!r} is not in the table{hint}.\n  Models: {', '.join(names)}"
        )
    return wanted


def _merge(found: Sequence[ModelResult]) -> tuple[ModelResult, ...]:
    groups: list[list[ModelResult]] = []
    for model in found:
        same = [group for group in groups if _is_same(model, group)]
        if same:
            same[0].append(model)
        else:
            groups.append([model])
    shared = [group[0].name for group in groups if _has_one_name(group)]
    everyone = [model.name for model in found]
    return tuple(
        replace(
            group[0],
            name=group[0].name
            if (_has_one_name(group) and shared.count(group[0].name) == 1)
            or (group[0].is_foreign and everyone.count(group[0].name) == 1)
            else f"{group[0].run}/{group[0].name}",
            tasks={
                name: scores for model in reversed(group) for name, scores in model.tasks.items()
            },
            fidelity=next((model.fidelity for model in group if model.fidelity), None),
            cost=next((model.cost for model in group if model.cost), None),
            gap_recovered=next(
                (model.gap_recovered for model in group if model.gap_recovered is not None), None
            ),
        )
        for group in groups
    )


def _is_same(model: ModelResult, group: Sequence[ModelResult]) -> bool:
    known = model.weights is not None and model.weights == group[0].weights
    return known and all(other.run != model.run for other in group)


def _has_one_name(group: Sequence[ModelResult]) -> bool:
    return len(group) > 1 and len({model.name for model in group}) == 1


def _as_json(board: Leaderboard) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": list(board.runs),
        "held_out_is_comparable": board.held_out_is_comparable,
        "settings": {
            task: scores.settings for model in board.models for task, scores in model.tasks.items()
        },
        "versions": versions(),
        "models": [as_tree(model) for model in board.models],
        "baseline": board.baseline,
        "comparisons": [
            asdict(found) | {"is_significant": found.is_significant} for found in board.comparisons
        ],
        "gaps": [asdict(gap) for gap in board.gaps],
        "remarks": list(board.remarks),
    }
