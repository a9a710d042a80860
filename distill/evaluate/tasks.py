"""Which lm-eval tasks a configuration names, and a fingerprint of each. No torch here.

A name may be a task, a group or a tag. Groups and tags are expanded through lm-eval's index,
without opening a data set, so that finished scores are recognised offline and at once.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

from distill.config import EvaluationConfig
from distill.errors import EvalError
from distill.fingerprint import of_settings

_GROUP_KEYS = frozenset(field.name for field in fields(GroupConfig))
"""Keys that describe a group; its other keys override those of its tasks."""

_LABELS = frozenset({"task", "task_alias", "tag", "group", "group_alias", "task_list"})
"""Keys of a task that cannot change a score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTask:
    """One task to run."""

    name: str
    """Its own name in lm-eval."""
    requested: str
    """The name in the configuration: the same, or the group or tag that holds it."""
    definition: str
    """Fingerprint of its YAML, of local data files and of what its group overrides."""
    num_fewshot: int | None = None
    """Examples in the prompt; None takes the task's own number."""
    group: str | None = None
    """`requested`, where that is a group (and no tag)."""
    averaged: tuple[tuple[str, bool], ...] = ()
    """Metrics that the group averages over its tasks, each with whether it weights by size."""


def task_manager(include_path: str | None) -> TaskManager:
    """Index the tasks below `include_path`, or lm-eval's stock tasks.

    Raises:
        EvalError: there is no such folder.
    """
    if include_path is None:
        return _stock_tasks()
    folder = Path(include_path)
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.glob("*") if path.is_dir()]
        raise EvalError(
            f"evaluation.include_path: there is no folder {include_path}"
            f"{_did_you_mean(folder.name, siblings)}.\n"
            "  Name a folder of lm-eval task YAMLs, or set it to null for lm-eval's stock tasks."
        )
    return TaskManager(include_path=str(folder), include_defaults=False)


def check_tasks(config: EvaluationConfig) -> tuple[PlannedTask, ...]:
    """Resolve every task that `config` names, before anything costly is started.

    Returns:
        The tasks in the order of the configuration, presets, groups and tags expanded.

    Raises:
        EvalError: `include_path` or a name does not exist (with the nearest ones), a group is
            empty, or a task is named twice.
    """
    if not config.requested:
        return ()
    manager = task_manager(config.include_path)
    names = [name for name, _ in config.requested]
    _refuse_unknown(names, config.include_path, manager.all_tasks)
    planned = [
        PlannedTask(
            name=name,
            requested=requested,
            definition=_fingerprint(definition),
            num_fewshot=num_fewshot,
            **_group_of(manager.task_index[requested]),
        )
        for requested, num_fewshot in config.requested
        for name, definition in _expand(requested, manager.task_index, {})
    ]
    _refuse_empty_or_repeated(names, planned)
    return tuple(planned)


@functools.cache
def _stock_tasks() -> TaskManager:
    # 14,683 tasks take 6.5 s to index; they cannot change while the process lives.
    return TaskManager()


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(nearest)}?)" if nearest else ""


def _refuse_unknown(names: list[str], include_path: str | None, known: list[str]) -> None:
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    where = f"below {include_path}" if include_path else "among lm-eval's stock tasks"
    option = f" --include_path {include_path}" if include_path else ""
    lines = "\n".join(f"  {name}{_did_you_mean(name, known)}" for name in unknown)
    raise EvalError(
        f"evaluation.tasks: {len(unknown)} of {len(names)} names do not exist {where} "
        f"({len(known):,} names there):\n{lines}\n"
        f"  List all: lm-eval ls tasks{option}\n"
        "  A YAML file that cannot be read is missing from that list."
    )


def _refuse_empty_or_repeated(requested: list[str], planned: list[PlannedTask]) -> None:
    filled = {task.requested for task in planned}
    problems = [f"  {name}: a group without tasks" for name in requested if name not in filled]
    first: dict[str, PlannedTask] = {}
    for task in planned:
        if task.name in first:
            namers = f"{first[task.name].requested} and by {task.requested}"
            problems.append(f"  {task.name}: named twice, by {namers}")
        first.setdefault(task.name, task)
    if problems:
        raise EvalError(
            "evaluation.tasks cannot be run as it is:\n"
            + "\n".join(problems)
            + "\n  Take the entries out that are not needed."
        )


def _group_of(entry: Any) -> dict[str, Any]:
    if entry.kind.name != "GROUP":
        return {}
    listed = entry.cfg.get("aggregate_metric_list") or ()
    metrics = [listed] if isinstance(listed, Mapping) else listed
    averaged = tuple((item["metric"], item.get("weight_by_size", True)) for item in metrics)
    return {"group": entry.name, "averaged": averaged}


def _expand(
    name: str, index: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name and the merged definition of every task that `name` stands for."""
    entry = index[name]
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _expand(task, index, overrides)
    elif entry.kind.name == "GROUP":
        yield from _expand_members(name, entry.cfg, index, overrides)
    else:
        yield name, {**entry.cfg, **overrides}


def _expand_members(
    group: str,
    definition: Mapping[str, Any],
    index: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # The same merging as lm_eval.tasks._factory, whose own way would open every data set.
    shared = {key: value for key, value in definition.items() if key not in _GROUP_KEYS}
    overrides = {**shared, **overrides}
    members = definition.get("task")
    for member in members if isinstance(members, list) else ():
        item: Mapping[str, Any] = {"task": member} if isinstance(member, str) else member
        name = item.get("group") or item.get("task")
        if name is None:
            raise EvalError(
                f"evaluation.tasks: an entry of the group {group} names neither a task nor a "
                "group, which lm-eval refuses.\n  Name the tasks you want instead of the group."
            )
        if "group" in item and name not in index:
            yield from _expand_members(f"{group}::{name}", item, index, overrides)
        elif name not in index:
            yield f"{group}::{name}", {**overrides, **item}
        else:
            own = {key: value for key, value in item.items() if key not in ("group", "task")}
            yield from _expand(name, index, {**overrides, **own})


def _fingerprint(definition: Mapping[str, Any]) -> str:
    decisive = {key: value for key, value in definition.items() if key not in _LABELS}
    return of_settings(_portable(decisive))


def _portable(value: Any, is_data: bool = False) -> Any:
    """Reduce a definition to what is the same on every machine: data files to their checksums."""
    if isinstance(value, Mapping):
        return {
            str(key): _portable(item, is_data or key == "data_files") for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_portable(item, is_data) for item in value]
    if isinstance(value, str):
        path = Path(value)
        if is_data and path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return path.name if path.is_absolute() else value
    return value if value is None or isinstance(value, bool | int | float) else str(value)
