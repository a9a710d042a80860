"""The drawings of the HTML page, worked out to pixels; the templates only put them down.

Every drawing has a title and a description that gives its values in words. No torch here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from distill.evaluate import render
from distill.evaluate.page_axes import (
    Axis,
    Box,
    Label,
    Tick,
    fit,
    place_labels,
    plain_labels,
    shorten,
)
from distill.evaluate.page_model import PageModel, PageReliability, PageRow, PageTask
from distill.evaluate.page_table import Difference
from distill.evaluate.results import Estimate

WIDTH = 360.0
"""Of most drawings: what a phone shows without shrinking text much."""

_LEFT, _RIGHT, _TOP = 48.0, 346.0, 12.0
_BOTTOM = 256.0
_BELOW = 40.0
"""Room for ticks and the name of the axis."""

_SQUARE = 300.0
"""Width of a drawing whose two axes are the same."""

_LINE_HEIGHT = 40.0
"""Of a model in a list: its name above its bar, so that long names have room on a phone."""

_LONGEST_NAME = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point, with the ends of its error bar or interval."""

    x: float
    y: float
    low: float
    high: float
    kind: str
    """Its class in the style sheet: a role or a verdict."""
    tip: str
    label: Label | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One model in a list: name, value in words, and a bar or an interval from `x0` to `x1`."""

    y: float
    name: str
    value: str
    x0: float
    x1: float
    x: float
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What the templates need of any drawing."""

    title: str
    desc: str
    height: float
    frame: Box
    width: float = WIDTH
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    x_label: str = ""
    y_label: str = ""
    marks: list[Mark] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    zero: float | None = None
    """Pixels of the line that all is measured from."""


def gap_bars(page: PageModel) -> Drawing | None:
    """Draw the share of the gap between initial student and teacher that each student made good."""
    found = [(row, gap) for row in page.rows if (gap := row.gap_recovered) is not None]
    if not found:
        return None
    found.sort(key=lambda pair: pair[1], reverse=True)
    gaps = [gap for _, gap in found]
    axis = Axis(min(0.0, *gaps) * 1.05, max(1.0, *gaps), 12.0, _RIGHT)
    zero = axis.at(0.0)
    lines = [
        Line(
            y=_TOP + _LINE_HEIGHT * number,
            name=shorten(row.name, _LONGEST_NAME),
            value=f"{render.percent(gap)} %",
            x0=min(zero, axis.at(gap)),
            x1=max(zero, axis.at(gap)),
            x=axis.at(gap),
        )
        for number, (row, gap) in enumerate(found)
    ]
    bottom = _TOP + _LINE_HEIGHT * len(lines)
    steps = [0.0, 0.25, 0.5, 0.75, 1.0]
    return Drawing(
        title="By student, best first",
        desc=_sentence((row.name, f"{render.percent(gap)} %") for row, gap in found),
        height=bottom + _BELOW,
        frame=(12.0, _TOP, _RIGHT, bottom),
        x_ticks=[Tick(axis.at(step), f"{100 * step:.0f}") for step in steps],
        x_label="% of the held-out gap to the teacher",
        lines=lines,
        zero=zero,
    )


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
    axis = fit([0.0, *ends], 12.0, _RIGHT)
    lines = [
        Line(
            y=_TOP + _LINE_HEIGHT * number,
            name=shorten(one.source.model, _LONGEST_NAME),
            value=f"{one.mark} {one.difference}".strip(),
            x0=axis.at(scale * one.source.low),
            x1=axis.at(scale * one.source.high),
            x=axis.at(scale * one.source.difference),
            kind=one.verdict,
        )
        for number, one in enumerate(found)
    ]
    bottom = _TOP + _LINE_HEIGHT * len(lines)
    steps = axis.steps()
    return Drawing(
        title=f"{task.name}: difference to {found[0].source.baseline}",
        desc=_sentence(
            (one.source.model, f"{one.difference} {one.unit} ({one.interval})") for one in found
        ),
        height=bottom + _BELOW,
        frame=(12.0, _TOP, _RIGHT, bottom),
        x_ticks=_ticks(axis, steps),
        x_label=f"{task.main.name}, {'points' if task.main.is_share else 'difference'}",
        lines=lines,
        zero=axis.at(0.0),
    )


def reliability(row: PageRow) -> Drawing | None:
    """Plot how often a model's likeliest token is right over how sure the model is of it."""
    if row.reliability is None:
        return None
    right = _LEFT + _BOTTOM - _TOP
    x_axis, y_axis = Axis(0, 1, _LEFT, right), Axis(0, 1, _BOTTOM, _TOP)
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
        desc=f"Share of right tokens by confidence. {_sentence(words)}{error}",
        width=_SQUARE,
        height=_BOTTOM + _BELOW,
        frame=(_LEFT, _TOP, right, _BOTTOM),
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
    x_axis = fit([x for _, x, _ in found], _LEFT, _RIGHT, is_log=show is not None)
    ends = [scale * end for _, _, score in found for end in _ends(score)]
    y_axis = fit(ends, _BOTTOM, _TOP)
    frame = (_LEFT, _TOP, _RIGHT, _BOTTOM)
    places = [
        (x_axis.at(x), y_axis.at(scale * (score.value or 0.0)), row.name) for row, x, score in found
    ]
    labels = place_labels(places, frame)
    marks, words = [], []
    for (row, x, score), (at_x, at_y, _), label in zip(found, places, labels, strict=True):
        low, high = (y_axis.at(scale * end) for end in _ends(score))
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
        desc=f"{metric.name} by {x_label}. {_sentence(words)}",
        height=_BOTTOM + _BELOW,
        frame=frame,
        x_ticks=_ticks(x_axis, x_axis.steps(5), show),
        y_ticks=_ticks(y_axis, y_axis.steps()),
        x_label=x_label,
        y_label=f"{metric.name} (%)" if metric.is_share else metric.name,
        marks=marks,
    )


def _ends(score: Estimate) -> tuple[float, float]:
    value, error = score.value or 0.0, score.stderr or 0.0
    return value - error, value + error


def _ticks(
    axis: Axis, steps: Sequence[float], show: Callable[[float], str] | None = None
) -> list[Tick]:
    labels = [show(step) for step in steps] if show else plain_labels(steps)
    return [Tick(axis.at(step), label) for step, label in zip(steps, labels, strict=True)]


def _sentence(pairs: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in pairs) + "."
