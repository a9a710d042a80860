"""Scores that were made with different settings: refused, or marked where asked for. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distill.errors import EvalError, explain_difference
from distill.evaluate.results import ModelResult, TaskScores

MARK = "†"
"""Stands at scores that were made with other settings than the rest of their column."""

_MAY_BE_UNKNOWN = frozenset({"task_definition", "dtype", "max_length"})
"""What lm-eval's own files do not say, or not of every kind of model; None is equal to anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Two models that were scored on one task with different settings."""

    task: str
    first: ModelResult
    other: ModelResult
    differences: dict[str, tuple[Any, Any]]
    """Setting -> its value for either model."""


def find_clashes(models: Sequence[ModelResult]) -> Iterator[Clash]:
    """Yield every score whose settings differ from those of an earlier model of its column."""
    for task in dict.fromkeys(task for model in models for task in model.tasks):
        accepted: list[ModelResult] = []
        for model in models:
            if task not in model.tasks:
                continue
            for first in accepted:
                differences = _differences(first.tasks[task], model.tasks[task])
                if differences:
                    yield Clash(task=task, first=first, other=model, differences=differences)
                    break
            else:
                accepted.append(model)


def refuse_clashes(models: Sequence[ModelResult]) -> None:
    """Refuse to put scores of different settings into one table.

    Raises:
        EvalError: some differ; both sides of each difference are shown, once a task.
    """
    shown: list[tuple[str, dict[str, tuple[Any, Any]]]] = []
    problems = []
    for clash in find_clashes(models):
        if (clash.task, clash.differences) not in shown:  # one pair says it for all
            shown.append((clash.task, clash.differences))
            sides = [
                (
                    f"{side.run}/{side.name}",
                    {key: both[at] for key, both in clash.differences.items()},
                )
                for at, side in enumerate((clash.first, clash.other))
            ]
            problems.append(explain_difference(f"{clash.task}:", *sides))
    if problems:
        raise EvalError(
            "these scores were made with different settings and cannot be compared.\n"
            + "\n".join(problems)
            + "\n  Give the runs the same `evaluation` section and repeat distill eval CONFIG: "
            "only scores with other settings are made again. Or show them all the same, marked: "
            "--allow-mixed."
        )


def describe_clashes(models: Sequence[ModelResult]) -> list[str]:
    """Say of every marked score what was different, one line each."""
    return [
        f"{MARK} {clash.task} of {clash.other.name} was scored with other settings than that of "
        f"{clash.first.name}: "
        + "; ".join(f"{key} {ours} against {theirs}" for key, (theirs, ours) in shown)
        + ". Such scores cannot be ranked; none of them is bold."
        for clash in find_clashes(models)
        for shown in [[(key, tuple(map(_short, both))) for key, both in clash.differences.items()]]
    ]


def _differences(first: TaskScores, other: TaskScores) -> dict[str, tuple[Any, Any]]:
    ours, theirs = first.settings, other.settings
    both = {key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys())}
    return {
        key: (left, right)
        for key, (left, right) in both.items()
        if left != right and not (key in _MAY_BE_UNKNOWN and (left is None or right is None))
    }


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
