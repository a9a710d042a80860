"""Make the model of the HTML page from a leaderboard. No torch here."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.evaluate.columns import task_names
from distill.evaluate.measured import Estimate, Fidelity
from distill.evaluate.page_model import (
    PageAnswer,
    PageCost,
    PageItem,
    PageMetric,
    PageModel,
    PageReliability,
    PageRow,
    PageTask,
)
from distill.evaluate.render import is_share
from distill.evaluate.results import ModelResult

if TYPE_CHECKING:
    from distill.evaluate.leaderboard import Leaderboard


_ANOTHER = "(another continuation)"
"""Response of a model of which only the likelihood of the target is known."""


def page_of(
    board: "Leaderboard", notes: Sequence[str], versions: Mapping[str, str | None]
) -> PageModel:
    """Collect what the page shows of `board`.

    Args:
        board: Comparable results.
        notes: How scores and tests were made, one line each.
        versions: Name -> version of the software that made them; None where it is not installed.
    """
    return PageModel(
        runs=board.runs,
        rows=tuple(_row(model, board.models) for model in board.models),
        tasks=tuple(_task(board.models, name) for name in task_names(board.models)),
        held_out_is_comparable=board.held_out_is_comparable,
        baseline=board.baseline,
        comparisons=board.comparisons,
        items=tuple(
            item for task in task_names(board.models) for item in _items(board.models, task)
        ),
        notes=tuple(notes),
        versions=tuple((name, found) for name, found in versions.items() if found),
    )


def items_of(
    task: str, metric: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[PageItem, ...]:
    """Pair the samples of several models by document.

    Args:
        task: Its name.
        metric: What decides whether an answer is right: 1 is right, 0 is wrong.
        samples: Name of a model -> {doc_id, doc_hash, metrics, prompt, choices, target, response}.

    Returns:
        Documents that at least two models answered, by `doc_id`. None at all if the metric is not
        one of right and wrong. Samples without a prompt, or whose text is not that of the first
        model that has the document (by `doc_hash`), are left out.
    """
    first: dict[int, Mapping[str, Any]] = {}
    answers: dict[int, dict[str, PageAnswer]] = {}
    for model, its_samples in samples.items():
        for sample in its_samples:
            value = sample["metrics"].get(metric)
            if value not in (0, 1):
                return ()
            seen = first.setdefault(sample["doc_id"], sample) if "prompt" in sample else None
            if seen is not None and seen["doc_hash"] == sample["doc_hash"]:
                answers.setdefault(sample["doc_id"], {})[model] = PageAnswer(
                    is_right=value == 1,
                    response=_ANOTHER if sample["response"] is None else sample["response"],
                )
    return tuple(
        PageItem(
            task=task,
            doc_id=doc_id,
            prompt=first[doc_id]["prompt"],
            choices=None if (found := first[doc_id].get("choices")) is None else tuple(found),
            target=first[doc_id]["target"],
            answers=answers[doc_id],
        )
        for doc_id in sorted(answers)
        if len(answers[doc_id]) > 1
    )


def _row(model: ModelResult, models: Sequence[ModelResult]) -> PageRow:
    fidelity = model.fidelity
    return PageRow(
        name=model.name,
        role=model.role,
        run=model.run,
        num_parameters=model.num_parameters,
        scores={task: scores.metrics for task, scores in model.tasks.items()},
        ce_nats=fidelity.ce_nats if fidelity else None,
        kl_nats=fidelity.kl_nats if fidelity else None,
        agreement=fidelity.agreement if fidelity else None,
        gap_recovered=model.gap_recovered,
        **_calibration(fidelity),
        cost=_cost(model, models),
    )


def _cost(model: ModelResult, models: Sequence[ModelResult]) -> PageCost | None:
    """Size, speed and memory, and their ratios to a teacher's that was measured alike."""
    if model.cost is None:
        return None
    names = ("weight_bytes", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes")
    own: dict[str, float] = {name: getattr(model.cost, name) for name in names}
    goals = [
        other.cost
        for other in models
        if other.role == "teacher" and other.cost and other.cost.settings == model.cost.settings
    ]
    ratios = {name: own[name] / getattr(goals[0], name) for name in names} if goals else {}
    return PageCost(**own, over_teacher=ratios)


def _calibration(fidelity: Fidelity | None) -> dict[str, Any]:
    """What the page shows of a model's confidence and of the draws that the teacher accepts."""
    found: dict[str, Any] = {}
    if fidelity is not None and fidelity.exact is not None:
        found["acceptance"] = fidelity.exact.acceptance
    if fidelity is not None and fidelity.reliability is not None:
        bins = fidelity.reliability
        found["ece"] = Estimate(value=bins.ece)
        found["reliability"] = PageReliability(
            edges=tuple(n / len(bins.count) for n in range(len(bins.count) + 1)),
            confidence=bins.confidence,
            accuracy=bins.accuracy,
            count=bins.count,
        )
    return found


def _items(models: Sequence[ModelResult], task: str) -> tuple[PageItem, ...]:
    scored = [model for model in models if task in model.tasks]
    samples = {model.name: model.samples(task) for model in scored}
    return items_of(task, scored[0].tasks[task].main_metric, samples)


def _task(models: Sequence[ModelResult], name: str) -> PageTask:
    found = [model.tasks[name] for model in models if name in model.tasks]
    one = found[0]
    names = list(dict.fromkeys([one.main_metric, *(n for task in found for n in task.metrics)]))
    first = {n: next(task.metrics[n] for task in found if n in task.metrics) for n in names}
    return PageTask(
        name=name,
        metrics=tuple(
            PageMetric(
                name=metric,
                higher_is_better=score.higher_is_better,
                is_share=is_share(metric, score.higher_is_better),
            )
            for metric, score in first.items()
        ),
        num_documents=one.num_documents,
        settings=(
            ("documents", f"{one.num_documents:,} of {one.num_documents_total:,}"),
            *(
                (key.replace("_", " "), "not set" if value is None else str(value))
                for key, value in sorted(one.settings.items())
            ),
        ),
    )
