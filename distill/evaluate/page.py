"""One self-contained HTML page of the leaderboard: no network, no framework. No torch here.

Tables and drawings are made here and in the templates, so the page can be read without JavaScript;
the scripts sort, filter, switch the theme and list the items on which two models disagree.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill.evaluate.page_charts import forest, gap_bars, reliability
from distill.evaluate.page_items import Embedded, embed
from distill.evaluate.page_model import PageModel
from distill.evaluate.page_scatter import kl_plot, size_plot
from distill.evaluate.page_table import differences_of, groups_of, table_of
from distill.evaluate.paired import SIGNIFICANCE

MAX_BYTES = 2_000_000
"""Of the page; items beyond are left out, and the page says how many."""

_TEMPLATES = Path(__file__).parent / "templates"

_SLACK_BYTES = 2000
"""For the counts of items, which are known only when the rest is written."""


def render_page(page: PageModel, *, title: str = "Leaderboard", max_bytes: int = MAX_BYTES) -> str:
    """Write `page` as HTML; equal input gives equal text.

    Args:
        page: What to show; see `distill.evaluate.page_source.page_of`.
        title: The heading.
        max_bytes: Items are embedded only as long as the page stays below.
    """
    values = _values(page, title)
    template = _environment().get_template("leaderboard.html")
    empty = _written(template.render(values | _embedded(embed(page, 0))))
    room = max_bytes - len(empty.encode()) - _SLACK_BYTES
    return _written(template.render(values | _embedded(embed(page, room))))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = _pixels
    environment.globals["inline"] = _inline
    return environment


def _values(page: PageModel, title: str) -> dict[str, Any]:
    differences = differences_of(page)
    columns = table_of(page, differences)
    return {
        "title": title,
        "page": page,
        "columns": columns,
        "groups": groups_of(columns),
        "differences": differences,
        "significant_p": SIGNIFICANCE,
        "gap": gap_bars(page),
        "scatters": [
            (task, [plot for plot in (size_plot(page, task), kl_plot(page, task)) if plot])
            for task in page.tasks
        ],
        "forests": [plot for task in page.tasks if (plot := forest(task, differences))],
        "calibrations": [plot for row in page.rows if (plot := reliability(row))],
        "pair": _first_pair(page),
    }


def _embedded(items: Embedded) -> dict[str, Any]:
    return {"embedded": items, "items_json": Markup(items.text)}  # escaped by `embed`


def _first_pair(page: PageModel) -> tuple[int, int]:
    """Places of the models to compare first: a student and the baseline, else the first two."""
    places = {row.name: number for number, row in enumerate(page.rows)}
    students = [number for number, row in enumerate(page.rows) if row.role == "student"]
    starts = [number for number, row in enumerate(page.rows) if row.role == "initial"]
    baseline = places[page.baseline] if page.baseline in places else (starts or [0])[0]
    others = [number for number in [*students, *range(len(page.rows))] if number != baseline]
    return (others or [baseline])[0], baseline


def _written(html: str) -> str:
    """Replace halves of surrogate pairs, which models can say but UTF-8 cannot."""
    return html.encode("utf-8", "replace").decode("utf-8")


def _pixels(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _inline(name: str) -> Markup:
    """Put a style sheet or a script of ours into the page as it is."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
