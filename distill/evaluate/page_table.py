"""The table of the HTML page: groups of columns, cells, and differences in words. No torch here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from distill.evaluate import render
from distill.evaluate.measured import Estimate
from distill.evaluate.page_model import PageCost, PageMetric, PageModel, PageTask
from distill.evaluate.paired import Comparison

TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A comparison with the baseline, in words."""

    key: str
    """Unique on the page."""
    source: Comparison
    verdict: str
    """better, worse, different (no direction is better), or none (not significant)."""
    difference: str
    interval: str
    unit: str
    p_value: str
    p_holm: str

    @property
    def mark(self) -> str:
        """A sign that needs no colour; empty if not significant."""
        return {"better": "▲", "worse": "▼", "different": "◆", "none": ""}[self.verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One model's value in one column."""

    text: str
    note: str = ""
    """A standard error, or a ratio to the teacher."""
    sort: float | str | None = None
    """None comes last, whatever the direction."""
    is_best: bool = False
    difference: Difference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column; every model has a cell."""

    group: str
    title: str
    unit: str = ""
    cells: tuple[Cell, ...]
    is_text: bool = False
    highest_first: bool = False
    """What the first press of the header sorts by."""
    is_secondary: bool = False
    """Shown only on request, as what does not stand for its group."""

    @property
    def has_marks(self) -> bool:
        """Whether cells without a mark must leave room for one, so that numbers line up."""
        return any(cell.difference and cell.difference.mark for cell in self.cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Neighbouring columns with one heading."""

    title: str
    span: int
    main_span: int
    """Columns that are always shown."""


def table_of(page: PageModel, differences: Sequence[Difference]) -> list[Column]:
    """Make the columns of the table; what no model has gets none, sizes apart.

    Bold is the best of the students, trained or not, as in the Markdown table.
    """
    students = [n for n, row in enumerate(page.rows) if row.role in ("initial", "student")]
    made = [
        Column(
            group="Size",
            title="parameters",
            cells=tuple(
                Cell(text=render.count(row.num_parameters), sort=row.num_parameters)
                for row in page.rows
            ),
        ),
        *_held_out(page, students if page.held_out_is_comparable else []),
        *(
            _task_column(page, task, metric, students, differences)
            for task in page.tasks
            for metric in task.metrics
        ),
        *_costs(page),
    ]
    shown = [c for c in made[1:] if any(cell.text != render.MISSING for cell in c.cells)]
    return [made[0], *shown]


def groups_of(columns: Sequence[Column]) -> list[Group]:
    """Join neighbouring columns of one group."""
    joined = [(title, list(found)) for title, found in groupby(columns, lambda one: one.group)]
    return [
        Group(
            title=title,
            span=len(found),
            main_span=sum(not column.is_secondary for column in found),
        )
        for title, found in joined
    ]


def differences_of(page: PageModel) -> list[Difference]:
    """Put every comparison into words, in the order of the tasks."""
    order = [task.name for task in page.tasks]
    found = sorted(page.comparisons, key=lambda one: order.index(one.task))
    return [_difference(one, page.task(one.task), f"d{n}") for n, one in enumerate(found)]


def signed(value: float, metric: PageMetric) -> str:
    """A difference with its sign, in points of a percent or in the metric's own unit."""
    text = f"{100 * abs(value):.1f}" if metric.is_share else f"{abs(value):.4g}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def _difference(source: Comparison, task: PageTask, key: str) -> Difference:
    metric = next((one for one in task.metrics if one.name == source.metric), task.main)
    if not source.is_significant:
        verdict = "none"
    elif metric.higher_is_better is None:
        verdict = "different"
    else:
        verdict = "better" if (source.difference > 0) == metric.higher_is_better else "worse"
    return Difference(
        key=key,
        source=source,
        verdict=verdict,
        difference=signed(source.difference, metric),
        interval=f"{signed(source.low, metric)} to {signed(source.high, metric)}",
        unit="points" if metric.is_share else "",
        p_value=_probability(source.p_value),
        p_holm=_probability(source.p_holm),
    )


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _held_out(page: PageModel, rivals: list[int]) -> list[Column]:
    gaps = [
        None if (gap := row.gap_recovered) is None else Estimate(value=gap) for row in page.rows
    ]
    shown: list[
        tuple[str, str, list[Estimate | None], Callable[..., str], bool]
    ] = [  # title, unit, scores, form, whether higher is better
        ("perplexity", "", [row.ce_nats for row in page.rows], render.perplexity, False),
        ("KL to teacher", "nats", [row.kl_nats for row in page.rows], _nats, False),
        ("top-1 agreement", "%", [row.agreement for row in page.rows], render.percent, True),
        ("gap recovered", "%", gaps, render.percent, True),
        ("calibration error", "%", [row.ece for row in page.rows], render.percent, False),
        ("acceptance", "%", [row.acceptance for row in page.rows], render.percent, True),
    ]
    return [
        replace(
            _scores("Held-out text", title, unit, scores, show, higher_is_better, rivals),
            is_secondary=title in ("calibration error", "acceptance"),
        )
        for title, unit, scores, show, higher_is_better in shown
    ]


def _nats(value: float | None, stderr: float | None = None) -> str:
    known = value is not None and stderr is not None
    return render.nats(value) + (f" ± {stderr:.3f}" if known else "")


def _scores(
    group: str,
    title: str,
    unit: str,
    scores: list[Estimate | None],
    show: Callable[..., str],
    higher_is_better: bool | None,
    rivals: list[int],
) -> Column:
    values = [score.value if score else None for score in scores]
    best = render.best_rows(values, rivals, higher_is_better)
    cells = []
    for number, score in enumerate(scores):
        # A perplexity has no error of its own here: that of its logarithm would mislead.
        errors = () if score is None or show is render.perplexity else (score.stderr,)
        text = render.MISSING if score is None else show(score.value, *errors)
        value, plus_minus, error = text.partition(" ± ")
        cells.append(
            Cell(
                text=value,
                note=f"± {error}" if plus_minus else "",
                sort=values[number],
                is_best=number in best,
            )
        )
    return Column(
        group=group,
        title=title,
        unit=unit,
        cells=tuple(cells),
        highest_first=higher_is_better is not False,
    )


def _task_column(
    page: PageModel,
    task: PageTask,
    metric: PageMetric,
    students: list[int],
    differences: Sequence[Difference],
) -> Column:
    scores = [row.scores.get(task.name, {}).get(metric.name) for row in page.rows]
    show = render.percent if metric.is_share else render.number
    unit = "%" if metric.is_share else ""
    made = _scores(task.name, metric.name, unit, scores, show, metric.higher_is_better, students)
    of_column = {
        one.source.model: one
        for one in differences
        if (one.source.task, one.source.metric) == (task.name, metric.name)
    }
    return replace(
        made,
        cells=tuple(
            replace(cell, difference=of_column.get(row.name))
            for row, cell in zip(page.rows, made.cells, strict=True)
        ),
        is_secondary=metric is not task.main,
    )


def _costs(page: PageModel) -> list[Column]:
    shown: list[tuple[str, str, str, Callable[[PageCost], float | None], float, bool]] = [
        # field, title, unit, value, its divisor, whether higher is better
        ("weight_bytes", "weights", "GB", lambda cost: cost.weight_bytes, 1e9, False),
        ("peak_bytes", "peak memory", "GB", lambda cost: cost.peak_bytes, 1e9, False),
        (
            *("prefill_tokens_per_second", "prefill", "tokens/s"),
            *(lambda cost: cost.prefill_tokens_per_second, 1, True),
        ),
        (
            *("decode_tokens_per_second", "decoding", "tokens/s"),
            *(lambda cost: cost.decode_tokens_per_second, 1, True),
        ),
    ]
    columns = []
    for field, title, unit, read, divisor, higher_is_better in shown:
        cells = []
        for row in page.rows:
            value = read(row.cost) if row.cost else None
            ratio = row.cost.over_teacher.get(field) if row.cost else None
            cells.append(
                Cell(
                    text=render.MISSING if value is None else f"{value / divisor:,.3g}",
                    note="" if value is None or ratio is None else f"{TIMES} {ratio:.2f}",
                    sort=value,
                )
            )
        columns.append(
            Column(
                group=f"Cost ({TIMES} the teacher's)",
                title=title,
                unit=unit,
                cells=tuple(cells),
                highest_first=higher_is_better,
            )
        )
    return columns
