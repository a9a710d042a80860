"""Averages of groups of tasks, and of groups of held-out text, as columns. No torch here."""

from collections.abc import Sequence

from distill.evaluate import render
from distill.evaluate.paired import group_score
from distill.evaluate.render import Column
from distill.evaluate.results import ModelResult


def averaged_groups(models: Sequence[ModelResult]) -> dict[str, list[str]]:
    """Groups that lm-eval averages, with the names of their tasks, sorted."""
    groups: dict[str, set[str]] = {}
    for model in models:
        for task, scores in model.tasks.items():
            if scores.group is not None and scores.weight_by_size is not None:
                groups.setdefault(scores.group, set()).add(task)
    return {group: sorted(tasks) for group, tasks in sorted(groups.items())}


def group_columns(models: Sequence[ModelResult], rivals: Sequence[int]) -> list[Column]:
    """Make a column for each group: the mean of its tasks, over documents where lm-eval does so.

    A model that lacks one of the tasks has no mean.
    """
    made = []
    for group, tasks in averaged_groups(models).items():
        means = [_mean(model, tasks) for model in models]
        one = next(model.tasks[tasks[0]] for model in models if tasks[0] in model.tasks)
        is_better_higher = one.main.higher_is_better
        in_percent = render.is_share(one.main_metric, is_better_higher)
        show = render.percent if in_percent else render.number
        made.append(
            Column(
                title=f"{group}\nmean of {len(tasks)}" + ("\n(%)" if in_percent else ""),
                cells=tuple(render.MISSING if mean is None else show(*mean) for mean in means),
                best=render.best_rows(
                    [None if mean is None else mean[0] for mean in means], rivals, is_better_higher
                ),
            )
        )
    return made


def held_out_columns(models: Sequence[ModelResult]) -> list[Column]:
    """Make columns of perplexity and KL for each further held-out cache."""
    found = {name for model in models if model.fidelity for name in model.fidelity.groups}
    made = []
    for name in sorted(found):
        close = [model.fidelity.groups.get(name) if model.fidelity else None for model in models]
        perplexities = (render.perplexity(c.ce_nats.value) if c else render.MISSING for c in close)
        distances = (render.nats(c.kl_nats.value) if c else render.MISSING for c in close)
        made += [
            Column(title=f"{name}\nperplexity", cells=tuple(perplexities)),
            Column(title=f"{name}\nKL (nats)", cells=tuple(distances)),
        ]
    return made


def _mean(model: ModelResult, tasks: Sequence[str]) -> tuple[float, float | None] | None:
    scores = [model.tasks[task] for task in tasks if task in model.tasks]
    values = [score.main.value for score in scores]
    if len(scores) < len(tasks) or any(value is None for value in values):
        return None
    return group_score(
        [value for value in values if value is not None],
        [score.main.stderr for score in scores],
        [score.num_documents for score in scores],
        weight_by_size=bool(scores[0].weight_by_size),
    )
