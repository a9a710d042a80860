"""What a drawing of the HTML page consists of, and what all of them share. No torch here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from distill.evaluate.page_axes import Axis, Box, Label, Tick, plain_labels

WIDTH = 360.0
"""Of most drawings: what a phone shows without shrinking text much."""

LEFT, RIGHT, TOP = 48.0, 346.0, 12.0
BOTTOM = 256.0
BELOW = 40.0
"""Room for ticks and the name of the axis."""

SQUARE = 300.0
"""Width of a drawing whose two axes are the same."""


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


def ticks(
    axis: Axis, steps: Sequence[float], show: Callable[[float], str] | None = None
) -> list[Tick]:
    """Label round values of an axis; `show` gives them another form than plain numbers."""
    labels = [_short(show(step)) for step in steps] if show else plain_labels(steps)
    return [Tick(axis.at(step), label) for step, label in zip(steps, labels, strict=True)]


def sentence(pairs: Iterable[tuple[str, str]]) -> str:
    """Put names and values into words."""
    return "; ".join(f"{name}: {value}" for name, value in pairs) + "."


def _short(count: str) -> str:
    """Drop the zeros of a round number: 1.00 B is 1 B on an axis."""
    number, _, unit = count.partition(" ")
    return f"{float(number):g} {unit}".strip()
