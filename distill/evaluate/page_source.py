"""Make the model of the HTML page from a leaderboard. No torch here."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.evaluate.columns import is_share, notes, task_names
from distill.evaluate.page_model import (
    PageAnswer,
    PageItem,
    PageMetric,
    PageModel,
    PageRow,
    PageTask,
)
from distill.evaluate.results import ModelResult

if TYPE_CHECKING:
    from distill.evaluate.leaderboard import Leaderboard


def page_of(board: "Leaderboard", versions: Mapping[str, str | None] | None = None) -> PageModel:
    """Collect what the page shows of `board`.

    Args:
        board: Comparable results.
        versions: Name -> version of the software that made them; None where it is not installed.
    """
    return PageModel(
        runs=board.runs,
        rows=tuple(_row(model) for model in board.models),
        tasks=tuple(_task(board.models, name) for name in task_names(board.models)),
        held_out_is_comparable=board.held_out_is_comparable,
        notes=tuple(notes(board.models)),
        versions=tuple((name, found) for name, found in (versions or {}).items() if found),
        # Where the board's paired tests go in, whose fields have the same names:
        #   baseline=board.baseline,
        #   comparisons=tuple(PageComparison(**asdict(one)) for one in board.comparisons),
        # Where the samples go in, for each task and its main metric:
        #   items=items_of(task, metric, {model.name: model.samples(task) for ... in board.models})
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
                    is_right=value == 1, response=sample["response"]
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


def _row(model: ModelResult) -> PageRow:
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
        # Where the fidelity's ece, acceptance and reliability go in, and the model's cost.
    )


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
