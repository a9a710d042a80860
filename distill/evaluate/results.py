"""Read the scores of one run folder. No torch here.

RUN/eval/models.json            [{name, role, path, num_parameters}], in display order
RUN/eval/MODEL/TASK.json        scores on a task: see `distill.evaluate.harness`
RUN/eval/MODEL/fidelity.json    {identity, num_rows, ce_nats, kl_nats, agreement}, the last three
                                {value, stderr}; a model may lack the file
RUN/eval/MODEL/cost.json        speed and memory, if measured: see `distill.evaluate.cost`
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from distill.errors import EvalError
from distill.evaluate.items import Items, items_of, read_samples
from distill.evaluate.measured import Estimate, Fidelity, MeasuredCost, without

R = TypeVar("R")

Role = Literal["teacher", "initial", "student", "other"]

_FIDELITY = "fidelity.json"
_COST = "cost.json"

_NO_SETTINGS = ("model", "weights", "model_settings", "task", "seed", "source", "evaluated_model")
"""Parts of an identity that may differ between models of a column; seeds repeat a run."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores of one model on one task."""

    identity: dict[str, Any]
    metrics: dict[str, Estimate]
    main_metric: str
    num_documents: int
    num_documents_total: int
    num_fewshot: int | None = None
    """Examples in the prompt, after lm-eval has applied the task's own rule."""
    group: str | None = None
    """The group of tasks that the configuration named, if it did."""
    weight_by_size: bool | None = None
    """How lm-eval averages that group: over documents, or over tasks; None: not at all."""
    source: Path | None = None
    """File with the samples."""

    def __post_init__(self) -> None:
        if self.main_metric not in self.metrics:
            raise ValueError(f"{self.main_metric!r} is the main metric, but has no value")

    @property
    def main(self) -> Estimate:
        """Value of the main metric."""
        return self.metrics[self.main_metric]

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for two models to be compared."""
        own = without(self.identity, _NO_SETTINGS)
        if self.num_fewshot is not None:
            own["num_fewshot"] = self.num_fewshot
        return {"metric": self.main_metric, **own}

    def samples(self) -> list[dict[str, Any]]:
        """Read the documents with their scores, and whatever else is stored of them.

        Raises:
            EvalError: the file cannot be read.
        """
        return read_samples(self.source) if self.source else []

    def items(self) -> Items:
        """Read the main metric document by document.

        Raises:
            EvalError: the file cannot be read.
            NotPairedError: the metric is no mean or perplexity of single documents.
        """
        return items_of(self.samples(), self.main_metric, self.main.value)


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """All that a run knows of one model."""

    name: str
    role: Role
    run: str
    num_parameters: int | None
    tasks: dict[str, TaskScores]
    fidelity: Fidelity | None
    gap_recovered: float | None = None
    cost: MeasuredCost | None = None

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Read the documents of a task as stored: `{doc_id, doc_hash, metrics, ...}`.

        Raises:
            EvalError: the file cannot be read.
        """
        return self.tasks[task].samples()

    @property
    def is_foreign(self) -> bool:
        """Whether lm-eval's own command line made the scores, rather than `distill eval`."""
        return any(scores.identity.get("source") == "lm-eval" for scores in self.tasks.values())

    @property
    def weights(self) -> str | None:
        """What models of several runs are the same by: fingerprint of the weights, or hub id."""
        return next(iter(self.weights_by_file.values()), None)

    @property
    def weights_by_file(self) -> dict[str, str]:
        """The same of every file of scores."""
        identities = {task: scores.identity for task, scores in self.tasks.items()}
        if self.fidelity is not None:
            identities["fidelity"] = self.fidelity.identity
        if self.cost is not None:
            identities["cost"] = self.cost.identity
        known = {
            name: identity.get("weights") or identity.get("model")
            for name, identity in identities.items()
        }
        return {f"{name}.json": str(weights) for name, weights in known.items() if weights}


@dataclass(frozen=True, kw_only=True)
class _Listed:
    name: str
    role: Role
    num_parameters: int | None = None


def collect(run_folder: Path) -> tuple[ModelResult, ...]:
    """Read every score below `run_folder`, in the order of its models.json.

    Raises:
        EvalError: it is no run folder, holds no score, or a file in it is not what it should be.
    """
    folder = run_folder / "eval"
    listing = folder / "models.json"
    if not listing.is_file():
        problem = "has no results" if run_folder.is_dir() else "does not exist"
        raise EvalError(
            f"the run folder {run_folder} {problem}: there is no {listing}.\n"
            "  Make the results first: distill eval CONFIG (or the whole: distill run CONFIG). "
            "A folder of lm-eval's holds results_*.json, itself or one level below."
        )
    run = run_folder.resolve().name
    models = [_read_model(folder / item.name, item, run) for item in _read(listing, list[_Listed])]
    if not any(model.tasks or model.fidelity for model in models):
        raise EvalError(
            f"the run folder {run_folder} has no results: {listing} names {len(models)} models, "
            "but none has a score.\n"
            "  Make the results first: distill eval CONFIG (or the whole: distill run CONFIG)"
        )
    _refuse_mixed_weights(folder, models)
    ends = _only(models, "initial"), _only(models, "teacher")
    return tuple(
        replace(model, gap_recovered=gap_recovered(model.fidelity, *ends))
        if model.role == "student"
        else model
        for model in models
    )


def gap_recovered(
    student: Fidelity | None, initial: Fidelity | None, teacher: Fidelity | None
) -> float | None:
    """Return (ce_initial - ce_student) / (ce_initial - ce_teacher), in held-out cross-entropy.

    0 is no better than before training, 1 as good as the teacher; values outside are possible.

    Returns:
        None if one was not measured, if the three were not measured alike, or if the untrained
        student is no worse than the teacher, so that there is no gap.
    """
    if student is None or initial is None or teacher is None:
        return None
    if not student.settings == initial.settings == teacher.settings:
        return None
    ce, start, goal = (score.ce_nats.value for score in (student, initial, teacher))
    if ce is None or start is None or goal is None or start <= goal:
        return None
    return (start - ce) / (start - goal)


def _only(models: list[ModelResult], role: Role) -> Fidelity | None:
    found = [model.fidelity for model in models if model.role == role]
    return found[0] if len(found) == 1 else None


def _refuse_mixed_weights(folder: Path, models: list[ModelResult]) -> None:
    # Left by an evaluation that was killed after a student had been trained anew.
    for model in models:
        found = model.weights_by_file
        if len(set(found.values())) > 1:
            lines = "\n".join(f"  {name:<24} weights {key[:12]}" for name, key in found.items())
            raise EvalError(
                f"the scores in {folder / model.name} are of different weights:\n{lines}\n"
                "  Finish the evaluation: distill eval CONFIG. It replaces what is out of date."
            )


def _read_model(folder: Path, listed: _Listed, run: str) -> ModelResult:
    fidelity, cost = folder / _FIDELITY, folder / _COST
    tasks = (path for path in sorted(folder.glob("*.json")) if path not in (fidelity, cost))
    return ModelResult(
        name=listed.name,
        role=listed.role,
        run=run,
        num_parameters=listed.num_parameters,
        tasks={path.stem: replace(_read(path, TaskScores), source=path) for path in tasks},
        fidelity=_read(fidelity, Fidelity) if fidelity.is_file() else None,
        cost=_read(cost, MeasuredCost) if cost.is_file() else None,
    )


def _read(path: Path, kind: type[R]) -> R:
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        problems = [f"not JSON: {error}"]
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}"
            for item in error.errors()
        ]
    raise EvalError(
        f"{path} is not a file of results:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\n  Delete it and run distill eval CONFIG again: only missing results are made."
    )
