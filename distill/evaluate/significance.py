"""Which models of a table differ from its baseline, and what cannot be said. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from distill.errors import EvalError
from distill.evaluate.items import Items, NotPairedError, align
from distill.evaluate.paired import Comparison, Gap, compare_items, corrected, gap_recovered
from distill.evaluate.results import ModelResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What paired tests say of the models of one table."""

    comparisons: tuple[Comparison, ...]
    """Every model against the baseline on the main metric of every task, as far as possible."""
    gaps: tuple[Gap, ...]
    """Of trained students, where teacher and untrained student are in the table."""
    remarks: tuple[str, ...]
    """What was not compared, and why."""


def find(models: Sequence[ModelResult], baseline: str | None, *, allow_mixed: bool) -> Findings:
    """Test every model against the one called `baseline`, all tests corrected together.

    Args:
        models: Of the table.
        baseline: Name of one of them, or None for no comparison.
        allow_mixed: Whether models may have been scored on different documents; they are then
            compared on those that they share.

    Raises:
        EvalError: samples cannot be read; or, without `allow_mixed`, models that are to be compared
            were scored on different documents.
    """
    tasks = [
        _Task(name, {m.name: m for m in models if name in m.tasks}, allow_mixed)
        for name in dict.fromkeys(task for model in models for task in model.tasks)
    ]
    comparisons = [
        found for task in tasks if baseline is not None for found in task.compare_with(baseline)
    ]
    gaps = [
        gap
        for student in models
        if student.role == "student" and (ends := _ends(models, student))
        for task in tasks
        if (gap := task.gap(student, *ends))
    ]
    return Findings(
        comparisons=corrected(comparisons),
        gaps=tuple(gaps),
        remarks=tuple(remark for task in tasks for remark in task.remarks()),
    )


@dataclass(slots=True)
class _Task:
    """One task; items are read once, when somebody asks for them."""

    name: str
    models: dict[str, ModelResult]
    allow_mixed: bool
    _items: dict[str, Items | NotPairedError] = field(default_factory=dict)
    _problems: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """Baseline and reason -> models that were not compared."""

    def compare_with(self, baseline: str) -> list[Comparison]:
        found = []
        for model in self.models:
            if model == baseline:
                continue
            try:
                sides = self._align(model, baseline)
                metric = self.models[model].tasks[self.name].main_metric
                found.append(
                    compare_items(*sides, task=self.name, metric=metric, names=(model, baseline))
                )
            except NotPairedError as problem:
                self._problems.setdefault((baseline, str(problem)), []).append(model)
        return found

    def gap(self, student: ModelResult, base: ModelResult, teacher: ModelResult) -> Gap | None:
        names = (student.name, base.name, teacher.name)
        if not all(name in self.models for name in names) or not self._is_ahead(teacher, base):
            return None
        try:
            sides = self._align(*names)
        except NotPairedError:
            return None
        metric = student.tasks[self.name].main_metric
        return gap_recovered(*sides, task=self.name, metric=metric, names=names)

    def remarks(self) -> list[str]:
        return [
            f"{self.name}: no test of {', '.join(models)} against {baseline}: {reason}."
            for (baseline, reason), models in self._problems.items()
        ]

    def _is_ahead(self, teacher: ModelResult, base: ModelResult) -> bool:
        goal, start = teacher.tasks[self.name].main, base.tasks[self.name].main
        if goal.value is None or start.value is None:
            return False
        if goal.higher_is_better is None:
            return False
        return (goal.value > start.value) == goal.higher_is_better

    def _align(self, *names: str) -> list[Items]:
        if any(name not in self.models for name in names):
            raise NotPairedError("the baseline has no score")
        if len({self.models[name].tasks[self.name].main_metric for name in names}) > 1:
            raise NotPairedError("they have different main metrics")
        sides = [(name, self._read(name)) for name in names]
        try:
            return align(sides, self.name, allow_mixed=self.allow_mixed)
        except EvalError as error:
            if not self.allow_mixed:
                raise
            raise NotPairedError("their documents differ") from error

    def _read(self, name: str) -> Items:
        if name not in self._items:
            try:
                self._items[name] = self.models[name].tasks[self.name].items()
            except NotPairedError as problem:
                self._items[name] = NotPairedError(f"{problem} ({name})")
        found = self._items[name]
        if isinstance(found, NotPairedError):
            raise found
        return found


def _ends(
    models: Sequence[ModelResult], student: ModelResult
) -> tuple[ModelResult, ModelResult] | None:
    """Find the untrained student and the teacher: of the same run, else the only ones."""
    ends = []
    for role in ("initial", "teacher"):
        found = [model for model in models if model.role == role]
        own = [model for model in found if model.run == student.run] or found
        if len(own) != 1:
            return None
        ends += own
    return ends[0], ends[1]
