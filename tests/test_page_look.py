"""Contrast, structure and drawings of the HTML page."""

import itertools
import random
import re
from pathlib import Path

import pytest

from distill.evaluate import page as page_module
from distill.evaluate.page import render_page
from distill.evaluate.page_axes import fit, place_labels, plain_labels, round_step, shorten
from distill.evaluate.page_charts import forest, gap_bars, reliability
from distill.evaluate.page_drawing import WIDTH
from distill.evaluate.page_scatter import kl_plot, size_plot
from distill.evaluate.page_table import MINUS, differences_of
from tests.dom import parse
from tests.pages import make_page

PAGE = make_page()
DOM = parse(render_page(PAGE))
STYLE = (Path(page_module.__file__).parent / "templates" / "page.css").read_text()
COLOURS = {
    name: (light, dark)
    for name, light, dark in re.findall(
        r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", STYLE
    )
}


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05), with relative luminances of sRGB."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "surface", "raised"])
@pytest.mark.parametrize("ink", ["text", "muted", "accent", "better", "worse"])
def test_text_is_legible_in_both_themes(ink: str, ground: str, theme: int) -> None:
    assert contrast(COLOURS[ink][theme], COLOURS[ground][theme]) >= 4.5


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_controls_and_marks_are_visible_in_both_themes(theme: int) -> None:
    colours = {name: pair[theme] for name, pair in COLOURS.items()}
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    for ground in ("page", "surface"):
        assert contrast(colours["edge"], colours[ground]) >= 3  # borders of controls, error bars
    assert contrast(colours["accent"], colours["soft"]) >= 3  # points on the bars of reliability
    for mark in ("better", "worse"):
        assert contrast(colours[mark], colours["soft"]) >= 3  # a mark under the pointer


def test_every_colour_has_a_value_in_both_themes() -> None:
    used = set(re.findall(r"var\(--([a-z-]+)\)", parse_style()))
    assert used - {"shadow"} == set(COLOURS)
    assert not re.findall(r"#[0-9a-f]{3,8}", STYLE.partition("font:")[2])


def parse_style() -> str:
    return DOM.one("style").text


def test_ids_are_unique_and_references_lead_somewhere() -> None:
    ids = [one.attributes["id"] for one in DOM if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    for element in DOM:
        for name in ("aria-labelledby", "popovertarget", "for"):
            for target in element.attributes.get(name, "").split():
                assert target in ids, f"{name}={target}"
        address = element.attributes.get("href", "")
        assert not address.startswith("#") or address[1:] in ids


def test_every_control_has_a_name() -> None:
    labels = [one for label in DOM.all("label") for one in label]
    for element in DOM:
        if element.tag in ("input", "select"):
            assert element in labels
        if element.tag == "button":
            assert element.text.strip(" ▲▼◆") or element.attributes["aria-label"]


def test_headings_do_not_skip_a_level() -> None:
    levels = [int(one.tag[1]) for one in DOM if re.fullmatch("h[1-6]", one.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_headers_of_tables_say_what_they_head() -> None:
    for table in DOM.all("table"):
        assert all(
            cell.attributes["scope"] in ("col", "colgroup", "row") for cell in table.all("th")
        )
        spans = [
            sum(int(cell.attributes.get("colspan", 1)) for cell in row if cell.tag in ("th", "td"))
            for row in table.all("tr")
        ]
        assert len(set(spans)) == 1
    assert len(DOM.one("tr", class_="heads").all("button")) == len(
        DOM.one("tr", class_="heads").all("th")
    )


def test_every_drawing_says_in_words_what_it_shows() -> None:
    drawings = DOM.all("svg", role="img")
    assert len(drawings) == 1 + 2 * 4 + 3 + 5
    for drawing in drawings:
        title, desc = (drawing.attributes["aria-labelledby"]).split()
        assert drawing.one("title", id=title).text
        assert len(drawing.one("desc", id=desc).text) > 20
    scatter = drawings[1].all("desc")[0].text
    for row in PAGE.rows:
        assert row.name in scatter
    assert "teacher: 1.71 B: " in scatter


def test_drawings_stay_in_their_box() -> None:
    found = differences_of(PAGE)
    drawings = [
        gap_bars(PAGE),
        *(plot(PAGE, task) for plot in (size_plot, kl_plot) for task in PAGE.tasks),
        *(forest(task, found) for task in PAGE.tasks[:3]),
        *(reliability(row) for row in PAGE.rows if row.reliability),
    ]
    for drawing in drawings:
        assert drawing is not None
        for mark in drawing.marks:
            assert drawing.frame[0] <= mark.x <= drawing.frame[2]
            assert drawing.frame[1] <= mark.y <= drawing.frame[3]
        for line in drawing.lines:
            assert 0 <= line.x0 <= line.x <= line.x1 + 1e-9
            assert line.x1 <= WIDTH
        assert all(drawing.frame[0] - 1 <= t.at <= drawing.frame[2] + 1 for t in drawing.x_ticks)
        assert 2 <= len(drawing.x_ticks) <= 7
    assert forest(PAGE.task("wikitext"), found) is None  # no comparisons there


def test_gap_bars_start_at_zero_and_reach_their_share() -> None:
    drawing = gap_bars(PAGE)
    assert drawing is not None
    assert drawing.zero is not None
    full = {tick.label: tick.at for tick in drawing.x_ticks}
    gaps = [row.gap_recovered for row in PAGE.rows if row.gap_recovered is not None]
    for line, gap in zip(drawing.lines, gaps, strict=True):
        assert (line.x - full["0"]) / (full["100"] - full["0"]) == pytest.approx(gap)
        assert (line.x0, line.x1) == (drawing.zero, line.x)


def test_empty_bins_of_confidence_are_not_drawn() -> None:
    drawing = reliability(PAGE.rows[0])
    assert drawing is not None
    assert len(drawing.marks) == 9
    assert "nan" not in drawing.desc


def test_round_steps_are_the_next_1_2_or_5() -> None:
    assert [round_step(x) for x in (1, 1.01, 2.5, 6, 0.03, 700)] == [1, 2, 5, 10, 0.05, 1000]
    assert plain_labels([0.0, 0.2, 0.4]) == ["0.0", "0.2", "0.4"]
    assert plain_labels([-20.0, 0.0, 20.0]) == [f"{MINUS}20", "0", "20"]


def test_ticks_are_few_round_and_inside() -> None:
    draw = random.Random(0)
    for _ in range(300):
        scale = 10 ** draw.uniform(-4, 4)
        values = [scale * draw.uniform(-1, 1) for _ in range(3)]
        axis = fit(values, 0, 100)
        steps = axis.steps()
        assert 2 <= len(steps) <= 7
        assert all(0 <= axis.at(step) <= 100 for step in steps)
        assert len(set(plain_labels(steps))) == len(steps)
        sizes = [10 ** draw.uniform(6, 12) for _ in range(3)]
        axis = fit(sizes, 0, 100, is_log=True)
        assert all(-1e-9 <= axis.at(step) <= 100 + 1e-9 for step in axis.steps(5))
        assert 2 <= len(axis.steps(5)) <= 6


def test_equal_values_get_an_axis() -> None:
    for is_log in (False, True):
        axis = fit([7.0, 7.0], 0, 100, is_log=is_log)
        assert axis.at(7.0) == pytest.approx(50)


def test_labels_cover_neither_marks_nor_one_another() -> None:
    draw = random.Random(0)
    num_placed = 0
    for _ in range(50):
        points = [(draw.uniform(60, 340), draw.uniform(20, 250), "m" * 9) for _ in range(7)]
        labels = place_labels(points, (48.0, 12.0, 350.0, 256.0))
        boxes = []
        for label in labels:
            if label:
                width = 6.9 * len(label.text)
                left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
                boxes.append((left, label.y - 11.5, left + width, label.y + 3.5))
        num_placed += len(boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for left, top, right, bottom in boxes:
            assert left >= 48
            assert right <= 350
            assert not any(left < x < right and top < y < bottom for x, y, _ in points)
    assert num_placed > 0.8 * 50 * 7


def test_a_long_name_keeps_both_ends() -> None:
    assert shorten("short") == "short"
    short = shorten("student-of-a-very-long-name-seed-17", 20)
    assert len(short) == 20
    assert short.startswith("student-o")
    assert short.endswith("seed-17")


def test_a_label_covers_an_error_bar_only_if_it_must() -> None:
    frame, point = (48.0, 12.0, 350.0, 256.0), [(200.0, 100.0, "name")]
    (right,) = place_labels(point, frame)
    (left,) = place_labels(point, frame, [(210.0, 80.0, 214.0, 120.0)])
    (forced,) = place_labels(point, frame, [frame])
    assert right is not None
    assert left is not None
    assert (right.anchor, left.anchor) == ("start", "end")
    assert forced == right


def test_students_of_one_size_all_have_their_names() -> None:
    for task in PAGE.tasks[:3]:
        drawing = size_plot(PAGE, task)
        assert drawing is not None
        assert all(mark.label for mark in drawing.marks), task.name
