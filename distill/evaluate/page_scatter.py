"""Scores over the size of a model and over its distance from the teacher. No torch here."""

from collections.abc import Callable

from distill.evaluate import render
from distill.evaluate.measured import Estimate
from distill.evaluate.page_axes import fit, place_labels
from distill.evaluate.page_drawing import (
    BELOW,
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Drawing,
    Mark,
    sentence,
    ticks,
)
from distill.evaluate.page_model import PageModel, PageRow, PageTask


def size_plot(page: PageModel, task: PageTask) -> Drawing | None:
    """Plot the score on a task over the number of parameters."""
    return _scatter(
        page,
        task,
        title=f"Size and {task.name}",
        x_label="parameters",
        read=lambda row: row.num_parameters or None,
        show=lambda value: render.count(round(value)),
    )


def kl_plot(page: PageModel, task: PageTask) -> Drawing | None:
    """Plot the score on a task over the divergence from the teacher on held-out text."""
    return _scatter(
        page,
        task,
        title=f"KL to the teacher and {task.name}",
        x_label="KL to the teacher (nats)",
        read=lambda row: row.kl_nats.value if row.kl_nats else None,
        show=None,
    )


def _scatter(
    page: PageModel,
    task: PageTask,
    *,
    title: str,
    x_label: str,
    read: Callable[[PageRow], float | None],
    show: Callable[[float], str] | None,
) -> Drawing | None:
    metric = task.main
    scale = 100.0 if metric.is_share else 1.0
    found: list[tuple[PageRow, float, Estimate]] = []
    for row in page.rows:
        x, score = read(row), row.scores.get(task.name, {}).get(metric.name)
        if x is not None and score is not None and score.value is not None:
            found.append((row, x, score))
    if len(found) < 2:
        return None
    # Sizes span powers of ten and have a form of their own; a divergence is a plain number.
    x_axis = fit([x for _, x, _ in found], LEFT, RIGHT, is_log=show is not None)
    ends = [scale * end for _, _, score in found for end in _ends(score)]
    y_axis = fit(ends, BOTTOM, TOP)
    frame = (LEFT, TOP, RIGHT, BOTTOM)
    places = [
        (x_axis.at(x), y_axis.at(scale * (score.value or 0.0)), row.name) for row, x, score in found
    ]
    bars = [[y_axis.at(scale * end) for end in _ends(score)] for _, _, score in found]
    boxes = [(x - 2, high, x + 2, low) for (x, _, _), (low, high) in zip(places, bars, strict=True)]
    labels = place_labels(places, frame, boxes)
    marks, words = [], []
    for (row, x, score), (at_x, at_y, _), (low, high), label in zip(
        found, places, bars, labels, strict=True
    ):
        form = render.percent if metric.is_share else render.number
        tip = f"{show(x) if show else render.nats(x)}: {form(score.value, score.stderr)}"
        words.append((row.name, tip))
        marks.append(
            Mark(
                x=at_x,
                y=at_y,
                low=low,
                high=high,
                kind=row.role,
                tip=f"{row.name}, {tip}",
                label=label,
            )
        )
    return Drawing(
        title=title,
        desc=f"{metric.name} by {x_label}. {sentence(words)}",
        height=BOTTOM + BELOW,
        frame=frame,
        x_ticks=ticks(x_axis, x_axis.steps(5), show),
        y_ticks=ticks(y_axis, y_axis.steps()),
        x_label=x_label,
        y_label=f"{metric.name} (%)" if metric.is_share else metric.name,
        marks=marks,
    )


def _ends(score: Estimate) -> tuple[float, float]:
    value, error = score.value or 0.0, score.stderr or 0.0
    return value - error, value + error
