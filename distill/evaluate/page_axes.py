"""From values to places in a drawing: axes, ticks, labels that do not overlap. No torch here."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_CHARACTER_WIDTH = 6.9
"""Pixels; a generous mean for system fonts at 13 pixels."""

_LABEL_HEIGHT = 15.0
_LONGEST_LABEL = 22
_MARK_RADIUS = 6.0

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels; y falls."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps low..high to pixels start..end, straight or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Pixels of a value; values outside lie outside."""
        low, high, value = (
            (math.log(x) for x in (self.low, self.high, value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def steps(self, most: int = 6) -> list[float]:
        """Round values to be labelled, at most about `most`."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1,), (1, 3), (1, 2, 5)):
                found = [d * 10.0**power for power in range(first, last + 1) for d in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if 3 <= len(found) <= most:
                    return found
        step = round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def fit(values: Iterable[float], start: float, end: float, *, is_log: bool = False) -> Axis:
    """Make the axis that shows all `values` with some room around them."""
    found = list(values)
    low, high = min(found), max(found)
    if is_log:
        room = (high / low) ** 0.12 if high > low else 2.0
        return Axis(low / room, high * room, start, end, is_log)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end)


def round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))


def plain_labels(steps: Sequence[float]) -> list[str]:
    """Write steps with as many decimals as their distance needs."""
    if len(steps) < 2:
        return [f"{step:.4g}" for step in steps]
    decimals = max(0, -math.floor(math.log10(steps[1] - steps[0]) + 1e-9))
    return [f"{step + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}") for step in steps]


def shorten(name: str, longest: int = _LONGEST_LABEL) -> str:
    """Cut a name to what a drawing has room for; models differ at both ends of their names."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[head + 1 - longest :]}"


@dataclass(frozen=True, slots=True)
class Label:
    """A name beside its mark."""

    x: float
    y: float
    anchor: str
    """start, middle or end, as SVG's text-anchor."""
    text: str


def place_labels(
    points: Sequence[tuple[float, float, str]], frame: Box, avoid: Sequence[Box] = ()
) -> list[Label | None]:
    """Put a name beside each point so that none covers a mark, another name or the frame's edge.

    Greedy, in this order: right, left, a line higher, a line lower. None where there is no room.

    Args:
        points: x, y and name of each.
        frame: Where names must stay.
        avoid: Boxes that a name covers only if it finds no other place.
    """
    r = _MARK_RADIUS
    used = [(x - r, y - r, x + r, y + r) for x, y, _ in points]
    labels: list[Label | None] = []
    for x, y, name in points:
        text = shorten(name)
        width = _CHARACTER_WIDTH * len(text)
        free = [
            (label, box)
            for label, box in _candidates(x, y, text, width)
            if _is_inside(box, frame) and not any(_overlap(box, other) for other in used)
        ]
        clear = [one for one in free if not any(_overlap(one[1], other) for other in avoid)]
        chosen = next(iter([*clear, *free]), None)
        used += [chosen[1]] if chosen else []
        labels.append(chosen[0] if chosen else None)
    return labels


def _candidates(x: float, y: float, text: str, width: float) -> Iterable[tuple[Label, Box]]:
    gap, half = _MARK_RADIUS + 2, _LABEL_HEIGHT / 2
    for down in (0.0, -_LABEL_HEIGHT, _LABEL_HEIGHT):
        for anchor, left in (("start", x + gap), ("end", x - gap - width)):
            at = left if anchor == "start" else left + width
            box = (left, y + down - half, left + width, y + down + half)
            yield Label(at, y + down + 4, anchor, text), box
        if down:
            middle = y + down * 1.15
            box = (x - width / 2, middle - half, x + width / 2, middle + half)
            yield Label(x, middle + 4, "middle", text), box


def _is_inside(box: Box, frame: Box) -> bool:
    across = frame[0] <= box[0] and box[2] <= frame[2]
    return across and frame[1] <= box[1] and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
