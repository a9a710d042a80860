"""Numbers and tables as text: for a terminal of any width, and for Markdown. No torch here."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

MISSING = "-"
"""Stands for what was not measured."""

NOT_FINITE = "not finite"
"""Stands for what was measured, with an unusable outcome."""


_NOT_PERCENT = ("bleu", "chrf", "likelihood")
"""Metrics of which more is better, but which are no share of 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table; every row has a cell."""

    title: str
    """Lines of the header; Markdown joins them."""
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    """Rows to be set in bold."""
    is_text: bool = False
    """Text starts at the left, numbers end at the right."""

    @property
    def width(self) -> int:
        """Characters that the widest line takes."""
        return max(map(len, [*self.title.split("\n"), *self.cells]))


def is_share(metric: str, higher_is_better: bool | None) -> bool:
    """Whether a metric of a task is a share of 1, to be shown in percent."""
    return higher_is_better is True and not metric.startswith(_NOT_PERCENT)


def count(number: int | None) -> str:
    """Shorten a number of parameters: 113 M, 8.03 B."""
    if number is None:
        return MISSING
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:  # what rounds to 1000 of a unit is 1 of the next
            return f"{number / unit:#.3g}".rstrip(".") + f" {name}"
    return str(number)


def perplexity(ce_nats: float | None) -> str:
    """Exponential of a cross-entropy, with sensible digits at any size."""
    if ce_nats is None:
        return NOT_FINITE
    value = math.exp(min(ce_nats, 700.0))  # beyond, exp leaves float64
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def nats(value: float | None) -> str:
    """A divergence, with three decimals."""
    return NOT_FINITE if value is None else f"{value:.3f}"


def gigabytes(num_bytes: int) -> str:
    """A size in units of 10^9 bytes, with sensible digits."""
    return f"{num_bytes / 1e9:.3g}"


def ratio(value: float, reference: float) -> str:
    """A multiple of a reference that is greater than 0: 1.24x."""
    return f"{value / reference:.2f}x"


def percent(share: float | None, stderr: float | None = None) -> str:
    """A share in percent, without the sign; with its standard error if that is known."""
    if share is None:
        return NOT_FINITE
    return f"{100 * share:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def number(value: float | None, stderr: float | None = None) -> str:
    """Four digits; with its standard error if that is known."""
    if value is None:
        return NOT_FINITE
    return f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


def best_rows(
    values: Sequence[float | None], candidates: Iterable[int], higher_is_better: bool | None
) -> frozenset[int]:
    """Rows among `candidates` that hold the best value; none where no direction is better."""
    known = {row: value for row in candidates if (value := values[row]) is not None}
    if higher_is_better is None or not known:
        return frozenset()
    best = (max if higher_is_better else min)(known.values())
    return frozenset(row for row, value in known.items() if value == best)


def markdown(columns: Sequence[Column]) -> str:
    """Lay out a Markdown table."""
    rows = [[column.title.replace("\n", " ") for column in columns]]
    rows.append([":--" if column.is_text else "--:" for column in columns])
    rows += [
        [
            f"**{column.cells[row]}**" if row in column.best else column.cells[row]
            for column in columns
        ]
        for row in range(len(columns[0].cells))
    ]
    return "".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n" for cells in rows
    )


def tables(columns: Sequence[Column], width: int) -> Iterator[Table]:
    """Lay out tables for a terminal, each at most `width` wide, the first column in each.

    A column that is wider than the terminal by itself is folded.
    """
    first, *others = columns
    while others:
        shown = [first, others.pop(0)]
        while others and _width([*shown, others[0]]) <= width:
            shown.append(others.pop(0))
        yield _table(shown)


def _width(columns: Sequence[Column]) -> int:
    # One space on either side, and one between columns.
    return sum(column.width + 2 for column in columns) + len(columns) - 1


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
    for column in columns:
        table.add_column(
            Text(column.title),
            justify="left" if column.is_text else "right",
            vertical="bottom",
            overflow="fold",
        )
    for row in range(len(columns[0].cells)):
        table.add_row(
            *(Text(column.cells[row], "bold" if row in column.best else "") for column in columns)
        )
    return table
