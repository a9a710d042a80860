"""One table of the models of one run or of many. No torch here."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from rich.console import Console

from distill.errors import EvalError, explain_difference
from distill.evaluate import render
from distill.evaluate.columns import columns, notes
from distill.evaluate.results import ModelResult, collect
from distill.files import write_json_atomically, write_text_atomically

SCHEMA_VERSION = 1
"""Of results.json."""

_TERMINAL_WIDTH = 100
"""Columns assumed where the output is not a terminal."""

_INCOMPARABLE = (
    "The held-out columns come from different held-out caches or settings: compare them within a "
    "run only. Nothing in them is bold."
)

_LIBRARIES = ("accelerate", "datasets", "lm_eval", "numpy", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """Comparable results, one entry a model, in the order of the table."""

    runs: tuple[str, ...]
    models: tuple[ModelResult, ...]
    held_out_is_comparable: bool
    """Whether all models were measured on the same held-out blocks, in the same way."""


def compare(run_folders: Sequence[Path]) -> Leaderboard:
    """Collect the models of several runs into one table.

    With several runs, names are prefixed by the run's. A model that is in several runs, by the
    fingerprint of its weights, appears once, with the scores of the first run that has them.

    Raises:
        EvalError: a folder has no results, two have one name, or models were scored on a task with
            different settings.
    """
    runs = [folder.resolve().name for folder in run_folders]
    repeated = sorted({run for run in runs if runs.count(run) > 1})
    if repeated or not runs:
        problem = f"two are called {repeated[0]!r}; rename one" if repeated else "none is given"
        raise EvalError(f"the leaderboard needs run folders with different names: {problem}.")
    found = [model for folder in run_folders for model in collect(folder)]
    _require_equal_settings(found)
    held_out = [model.fidelity.settings for model in found if model.fidelity]
    return Leaderboard(
        runs=tuple(runs),
        models=_merge(found) if len(runs) > 1 else tuple(found),
        held_out_is_comparable=all(settings == held_out[0] for settings in held_out),
    )


def print_table(board: Leaderboard, console: Console | None = None) -> None:
    """Print the table; what does not fit into the width follows as further tables."""
    if console is None:
        console = Console(width=None if sys.stdout.isatty() else _TERMINAL_WIDTH)
    for table in render.tables(columns(board.models, board.held_out_is_comparable), console.width):
        console.print(table)
        console.print()
    if not board.held_out_is_comparable:
        console.print(_INCOMPARABLE, style="yellow", highlight=False)


def write(board: Leaderboard, out: Path) -> None:
    """Write leaderboard.md and results.json below `out`; equal results give equal bytes.

    Raises:
        StorageError: the disk is full or read-only.
    """
    table = render.markdown(columns(board.models, board.held_out_is_comparable))
    lines = [*notes(board.models), *([] if board.held_out_is_comparable else [_INCOMPARABLE])]
    below = "".join(f"- {line}\n" for line in lines)
    write_text_atomically(out / "leaderboard.md", f"# Leaderboard\n\n{table}\n{below}")
    write_json_atomically(out / "results.json", _as_json(board))


def _require_equal_settings(models: Sequence[ModelResult]) -> None:
    first: dict[str, ModelResult] = {}
    shown: list[tuple[str, dict[str, Any]]] = []
    problems = []
    for model in models:
        for task, scores in model.tasks.items():
            other = first.setdefault(task, model)
            differs = scores.settings != other.tasks[task].settings
            if differs and (task, scores.settings) not in shown:  # one pair says it for all
                shown.append((task, scores.settings))
                sides = [
                    (f"{side.run}/{side.name}", side.tasks[task].settings)
                    for side in (other, model)
                ]
                problems.append(explain_difference(f"{task}:", *sides))
    if problems:
        raise EvalError(
            "these scores were made with different settings and cannot be compared.\n"
            + "\n".join(problems)
            + "\n  Give the runs the same `evaluation` section and repeat distill eval CONFIG: "
            "only scores with other settings are made again."
        )


def _merge(found: Sequence[ModelResult]) -> tuple[ModelResult, ...]:
    groups: list[list[ModelResult]] = []
    for model in found:
        same = [group for group in groups if _is_same(model, group)]
        if same:
            same[0].append(model)
        else:
            groups.append([model])
    shared = [group[0].name for group in groups if _has_one_name(group)]
    return tuple(
        replace(
            group[0],
            name=group[0].name
            if _has_one_name(group) and shared.count(group[0].name) == 1
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
        "versions": {"python": python_version(), **{name: _version(name) for name in _LIBRARIES}},
        "models": [asdict(model) for model in board.models],
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # results may be compared where nothing can be run
        return None
