"""What the leaderboard shows of each model, and under which conditions. No torch here."""

from collections.abc import Callable, Mapping, Sequence

from distill.evaluate import grouped, mixed, render
from distill.evaluate.measured import Estimate, Fidelity, MeasuredCost
from distill.evaluate.paired import Comparison
from distill.evaluate.render import Column
from distill.evaluate.results import ModelResult

BETTER, WORSE = "▲", "▼"
"""Stand at task scores that are significantly better or worse than the baseline's."""

_HELD_OUT: tuple[
    tuple[str, Callable[[Fidelity], Estimate], Callable[[float | None], str], bool], ...
]
_HELD_OUT = (
    ("held-out\nperplexity", lambda fidelity: fidelity.ce_nats, render.perplexity, False),
    ("KL to\nteacher\n(nats)", lambda fidelity: fidelity.kl_nats, render.nats, False),
    ("top-1\nagreement\n(%)", lambda fidelity: fidelity.agreement, render.percent, True),
)
"""Title, value, form, and whether higher is better."""

_AGAINST_TEACHER: tuple[tuple[str, Callable[[MeasuredCost], float]], ...] = (
    ("prefill\nspeed", lambda cost: cost.prefill_tokens_per_second),
    ("decode\nspeed", lambda cost: cost.decode_tokens_per_second),
    ("peak\nmemory", lambda cost: cost.peak_bytes),
)
"""Title and value of what is shown as a multiple of the teacher's."""


def columns(
    models: Sequence[ModelResult],
    held_out_is_comparable: bool,
    comparisons: Sequence[Comparison] = (),
) -> list[Column]:
    """Make the columns of the table; what no model has gets none.

    Of a group of tasks that lm-eval averages, the mean stands for all; csv and page have each.

    Scores of tasks carry the marks of `comparisons`, and one where settings were different.
    Bold is the best of the students, trained or not: bold must not suggest a gain where training
    brought none. In held-out columns it needs `held_out_is_comparable`.
    """
    students = [row for row, model in enumerate(models) if model.role in ("initial", "student")]
    rivals = students if held_out_is_comparable else []
    gaps = [model.gap_recovered for model in models]
    made = [
        Column(title="model", cells=tuple(model.name for model in models), is_text=True),
        Column(title="role", cells=tuple(model.role for model in models), is_text=True),
        Column(title="parameters", cells=tuple(render.count(m.num_parameters) for m in models)),
    ]
    made += _cost_columns(models)
    if any(model.fidelity for model in models):
        for title, read, show, higher_is_better in _HELD_OUT:
            scores = [read(model.fidelity) if model.fidelity else None for model in models]
            made.append(
                Column(
                    title=title,
                    cells=tuple(show(s.value) if s else render.MISSING for s in scores),
                    best=render.best_rows(_values(scores), rivals, higher_is_better),
                )
            )
    exact = [model.fidelity.exact if model.fidelity else None for model in models]
    if any(exact):
        accepted = [found.acceptance if found else None for found in exact]
        made.append(
            Column(
                title="draws\naccepted\n(%)",
                cells=tuple(render.percent(a.value) if a else render.MISSING for a in accepted),
                best=render.best_rows(_values(accepted), rivals, True),
            )
        )
    if any(gap is not None for gap in gaps):
        made.append(
            Column(
                title="gap\nrecovered\n(%)",
                cells=tuple(render.MISSING if gap is None else render.percent(gap) for gap in gaps),
                best=render.best_rows(gaps, rivals, True),
            )
        )
    made += grouped.held_out_columns(models)
    marks = _marks(models, comparisons)
    averaged = {task for tasks in grouped.averaged_groups(models).values() for task in tasks}
    made += [
        _task_column(models, task, students, marks)
        for task in task_names(models)
        if task not in averaged
    ]
    return made + grouped.group_columns(models, students)


def notes(models: Sequence[ModelResult]) -> list[str]:
    """Say how the scores were made and what the table means, one line each."""
    lines = []
    for task in task_names(models):
        one = next(model.tasks[task] for model in models if task in model.tasks)
        shots = one.settings.get("num_fewshot")
        lines.append(
            f"{task}: {one.num_documents:,} of {one.num_documents_total:,} documents "
            f"(limit: {one.identity.get('limit') or 'none'}), "
            f"few-shot examples: {'as the task says' if shots is None else shots}, "
            f"longest context: {one.identity.get('max_length')} tokens, "
            f"{one.identity.get('dtype')}, lm-eval {one.identity.get('lm_eval')}."
        )
    rows = sorted({model.fidelity.num_rows for model in models if model.fidelity})
    if rows:
        lines.append(f"Held-out columns: {' or '.join(f'{n:,}' for n in rows)} tokens scored.")
    lines += [
        "Bold: the best student of a column, before or after training.",
        "Standard errors (±) are those of single models, not of differences between models.",
    ]
    lines += sorted({_cost_note(model.cost) for model in models if model.cost})
    if any(model.fidelity and model.fidelity.exact for model in models):
        lines.append(
            "Draws accepted: the share of a model's draws that the teacher would accept in "
            "speculative decoding, measured over whole distributions."
        )
    if any(model.gap_recovered is not None for model in models):
        lines.append(
            "Gap recovered: the share of the held-out cross-entropy between initial student (0) "
            "and teacher (100) that training has made good."
        )
    return lines


def task_names(models: Sequence[ModelResult]) -> list[str]:
    """Names of all tasks that some model was scored on, sorted."""
    return sorted({name for model in models for name in model.tasks})


def _cost_columns(models: Sequence[ModelResult]) -> list[Column]:
    if not any(model.cost for model in models):
        return []
    teachers = [model.cost for model in models if model.role == "teacher" and model.cost]

    def against_teacher(model: ModelResult, read: Callable[[MeasuredCost], float]) -> str:
        cost = model.cost
        like = [c for c in teachers if cost and c.settings == cost.settings]
        return render.ratio(read(cost), read(like[0])) if cost and like else render.MISSING

    weights = (
        render.gigabytes(model.cost.weight_bytes) if model.cost else render.MISSING
        for model in models
    )
    return [
        Column(title="weights\n(GB)", cells=tuple(weights)),
        *(
            Column(title=title, cells=tuple(against_teacher(model, read) for model in models))
            for title, read in _AGAINST_TEACHER
        ),
    ]


def _cost_note(cost: MeasuredCost) -> str:
    made, machine = cost.settings["settings"], cost.settings["machine"]
    return (
        "Speed and peak memory are relative to the teacher's on the same machine "
        f"({cost.settings['device']}, {machine['processor']}, {cost.settings['dtype']}), with "
        f"transformers: {made['prompt_tokens']:,} prompt tokens, {made['new_tokens']:,} new ones, "
        f"batches of {made['batch_size']}, median of {made['rounds']} rounds."
    )


def _task_column(
    models: Sequence[ModelResult],
    task: str,
    students: list[int],
    marks: Mapping[tuple[str, str], str],
) -> Column:
    found = [model.tasks.get(task) for model in models]
    one = next(scores for scores in found if scores is not None)
    scores = [scores.main if scores else None for scores in found]
    higher_is_better = one.main.higher_is_better
    # What was asked differently does not compete.
    rivals = [row for row in students if mixed.MARK not in marks.get((models[row].name, task), "")]
    in_percent = render.is_share(one.main_metric, higher_is_better)
    show = render.percent if in_percent else render.number
    return Column(
        title="\n".join([task, one.main_metric, *(["(%)"] if in_percent else [])]),
        cells=tuple(
            show(s.value, s.stderr) + marks.get((model.name, task), "") if s else render.MISSING
            for model, s in zip(models, scores, strict=True)
        ),
        best=render.best_rows(_values(scores), rivals, higher_is_better),
    )


def _marks(
    models: Sequence[ModelResult], comparisons: Sequence[Comparison]
) -> dict[tuple[str, str], str]:
    """Name of a model and of a task -> what stands behind the score."""
    higher_is_better = {
        task: scores.main.higher_is_better
        for model in models
        for task, scores in model.tasks.items()
    }
    marks = {}
    for found in comparisons:
        wanted = higher_is_better.get(found.task)
        if found.is_significant and wanted is not None:
            is_better = (found.difference > 0) == wanted
            marks[found.model, found.task] = f" {BETTER if is_better else WORSE}"
    for clash in mixed.find_clashes(models):
        at = clash.other.name, clash.task
        marks[at] = f"{marks.get(at, '')} {mixed.MARK}"
    return marks


def _values(scores: Sequence[Estimate | None]) -> list[float | None]:
    return [score.value if score else None for score in scores]
