"""The drawings of the HTML page, worked out to pixels; the templates only put them down.

Every drawing has a title and a description that gives its values in words. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.evaluate import render
from distill.evaluate.page_axes import Axis, Tick, fit, shorten
from distill.evaluate.page_drawing import (
    BELOW,
    BOTTOM,
    LEFT,
    RIGHT,
    SQUARE,
    TOP,
    Drawing,
    Line,
    Mark,
    sentence,
    ticks,
)
from distill.evaluate.page_model import PageModel, PageReliability, PageRow, PageTask
from distill.evaluate.page_table import Difference

_LINE_HEIGHT = 40.0
"""Of a model in a list: its name above its bar, so that long names have room on a phone."""

_LONGEST_NAME = 36


def gap_bars(page: PageModel) -> Drawing | None:
    """Draw the share of the gap between initial student and teacher that each student made good."""
    found = [(row, gap) for row in page.rows if (gap := row.gap_recovered) is not None]
    if not found:
        return None
    found.sort(key=lambda pair: pair[1], reverse=True)
    gaps = [gap for _, gap in found]
    axis = Axis(min(0.0, *gaps) * 1.05, max(1.0, *gaps), 12.0, RIGHT)
    zero = axis.at(0.0)
    lines = [
        Line(
            y=TOP + _LINE_HEIGHT * number,
            name=shorten(row.name, _LONGEST_NAME),
            value=f"{render.percent(gap)} %",
            x0=min(zero, axis.at(gap)),
            x1=max(zero, axis.at(gap)),
            x=axis.at(gap),
        )
        for number, (row, gap) in enumerate(found)
    ]
    bottom = TOP + _LINE_HEIGHT * len(lines)
    steps = [0.0, 0.25, 0.5, 0.75, 1.0]
    return Drawing(
        title="By student, best first",
        desc=sentence((row.name, f"{render.percent(gap)} %") for row, gap in found),
        height=bottom + BELOW,
        frame=(12.0, TOP, RIGHT, bottom),
        x_ticks=[Tick(axis.at(step), f"{100 * step:.0f}") for step in steps],
        x_label="% of the held-out gap to the teacher",
        lines=lines,
        zero=zero,
    )


def forest(task: PageTask, differences: Sequence[Difference]) -> Drawing | None:
    """Draw the difference to the baseline of each model on a task, with its interval."""
    found = [
        one
        for one in differences
        if (one.source.task, one.source.metric) == (task.name, task.main.name)
    ]
    if not found:
        return None
    scale = 100.0 if task.main.is_share else 1.0
    ends = [scale * end for one in found for end in (one.source.low, one.source.high)]
    axis = fit([0.0, *ends], 12.0, RIGHT)
    lines = [
        Line(
            y=TOP + _LINE_HEIGHT * number,
            name=shorten(one.source.model, _LONGEST_NAME),
            value=f"{one.mark} {one.difference}".strip(),
            x0=axis.at(scale * one.source.low),
            x1=axis.at(scale * one.source.high),
            x=axis.at(scale * one.source.difference),
            kind=one.verdict,
        )
        for number, one in enumerate(found)
    ]
    bottom = TOP + _LINE_HEIGHT * len(lines)
    steps = axis.steps()
    return Drawing(
        title=f"{task.name}: difference to {found[0].source.baseline}",
        desc=sentence(
            (one.source.model, f"{one.difference} {one.unit} ({one.interval})") for one in found
        ),
        height=bottom + BELOW,
        frame=(12.0, TOP, RIGHT, bottom),
        x_ticks=ticks(axis, steps),
        x_label=f"{task.main.name}, {'points' if task.main.is_share else 'difference'}",
        lines=lines,
        zero=axis.at(0.0),
    )


def reliability(row: PageRow) -> Drawing | None:
    """Plot how often a model's likeliest token is right over how sure the model is of it."""
    if row.reliability is None:
        return None
    right = LEFT + BOTTOM - TOP
    x_axis, y_axis = Axis(0, 1, LEFT, right), Axis(0, 1, BOTTOM, TOP)
    total = sum(row.reliability.count)
    marks, words = [], []
    for bin_ in _full_bins(row.reliability):
        words.append((f"at {bin_.confidence:.2f}", f"{bin_.accuracy:.2f}"))
        marks.append(
            Mark(
                x=x_axis.at(bin_.confidence),
                y=y_axis.at(bin_.accuracy),
                low=x_axis.at(bin_.low) + 1,
                high=x_axis.at(bin_.high) - 1,
                kind="bin",
                tip=(
                    f"confidence {bin_.confidence:.2f}: {100 * bin_.accuracy:.1f} % right, "
                    f"{bin_.count:,} tokens ({100 * bin_.count / total:.1f} %)"
                ),
            )
        )
    steps = [0.0, 0.25, 0.5, 0.75, 1.0]
    error = f"; expected calibration error {render.percent(row.ece.value)} %" if row.ece else ""
    return Drawing(
        title=row.name,
        desc=f"Share of right tokens by confidence. {sentence(words)}{error}",
        width=SQUARE,
        height=BOTTOM + BELOW,
        frame=(LEFT, TOP, right, BOTTOM),
        x_ticks=[Tick(x_axis.at(step), f"{step:g}") for step in steps],
        y_ticks=[Tick(y_axis.at(step), f"{step:g}") for step in steps],
        x_label="confidence",
        y_label="share right",
        marks=marks,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bin:
    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


def _full_bins(found: PageReliability) -> list[_Bin]:
    ends = zip(found.edges, found.edges[1:], strict=False)
    values = zip(ends, found.confidence, found.accuracy, found.count, strict=True)
    return [
        _Bin(low=low, high=high, confidence=confidence, accuracy=accuracy, count=count)
        for (low, high), confidence, accuracy, count in values
        if count and confidence is not None and accuracy is not None
    ]
