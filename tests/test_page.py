"""The HTML page: whole, safe, small, and with every value. What it does is in test_page_browser."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from distill.evaluate import render
from distill.evaluate.leaderboard import all_notes, compare
from distill.evaluate.page import render_page
from distill.evaluate.page_model import PageAnswer, PageModel, PageRow
from distill.evaluate.page_source import page_of
from distill.evaluate.page_table import MINUS, differences_of, table_of
from tests.dom import Element, parse
from tests.pages import BASELINE, EVIL, make_page, renamed
from tests.run_folders import make_run

PAGE = make_page()
HTML = render_page(PAGE)
DOM = parse(HTML)
UNKNOWN = "\N{EN DASH} not measured"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def scripts(dom: Element) -> list[Element]:
    return [one for one in dom.all("script") if "type" not in one.attributes]


def rows(dom: Element) -> dict[str, list[str]]:
    """Name of each model -> its cells as they read."""
    body = dom.one("table", id="board").one("tbody")
    return {
        row.one("span", class_="name").text: [cell.text for cell in row.all("td")]
        for row in body.all("tr")
    }


def test_the_page_loads_nothing() -> None:
    for element in DOM:
        assert not {"src", "srcset", "action", "style", "data", "poster"} & set(element.attributes)
        address = element.attributes.get("href")
        assert address is None or address.startswith("#") or address == "data:,", address
    written = HTML.replace(DOM.one("script", type="application/json").text, "")
    for loads in ("http:", "https:", "//cdn", "@import", "url(", "fetch(", "XMLHttp", "import("):
        assert loads not in written
    policy = DOM.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy.startswith(POLICY)


def test_equal_input_gives_equal_bytes() -> None:
    assert render_page(make_page()).encode() == HTML.encode()


def test_every_score_and_error_is_in_the_table() -> None:
    table = rows(DOM)
    assert list(table) == [row.name for row in PAGE.rows]
    roles = DOM.one("table", id="board").all("span", class_="role")
    assert [one.text for one in roles] == [row.role for row in PAGE.rows]
    for row in PAGE.rows:
        cells = table[row.name]
        assert cells[0] == render.count(row.num_parameters)
        perplexity = render.perplexity(row.ce_nats.value) if row.ce_nats else UNKNOWN
        assert cells[1] == perplexity
        assert (cells[2] == UNKNOWN) == (row.kl_nats is None)
        shown = [
            re.sub(r" [▲▼]$", "", cell) for cell in cells[-8:-2]
        ]  # before them the held-out columns, after them the costs
        assert shown == [
            (render.percent if metric.is_share else render.number)(score.value, score.stderr)
            for task in PAGE.tasks
            for metric in task.metrics
            for score in [row.scores[task.name][metric.name]]
        ]


def test_what_no_model_has_gets_no_column() -> None:
    bare = replace(
        PAGE, rows=tuple(replace(row, ece=None, acceptance=None, cost=None) for row in PAGE.rows)
    )
    titles = {column.title for column in table_of(bare, [])}
    assert {"perplexity", "acc_norm"} <= titles
    assert not {"calibration error", "acceptance", "weights"} & titles


def test_marks_stand_only_where_a_difference_is_significant() -> None:
    body = DOM.one("table", id="board").one("tbody")
    marks = [one for one in body.all("button") if "mark" in one.attributes["class"]]
    significant = [one for one in PAGE.comparisons if one.is_significant]
    assert 3 < len(marks) == len(significant) < len(PAGE.comparisons)
    found = differences_of(PAGE)
    for one in (one for one in found if one.source.is_significant):
        card = DOM.one("div", id=one.key).text
        source = one.source
        assert f"{source.model} on {source.task}" in card
        sign = "+" if source.difference > 0 else MINUS
        assert f"{sign}{abs(100 * source.difference):.1f} points" in card
        assert one.p_holm in card
        assert f"{source.gained}, {source.lost} of 100" in card


def test_every_comparison_is_in_the_table_of_comparisons() -> None:
    table = DOM.one("section", id="differences").one("table").one("tbody").all("tr")
    assert len(table) == len(PAGE.comparisons) == 18
    texts = [row.text for row in table]
    for one in PAGE.comparisons:
        (text,) = [text for text in texts if text.startswith(f"{one.model} {one.task} ")]
        assert f" {one.gained} {one.lost} 100 {one.test}" in text


def test_lower_is_better_where_the_metric_says_so() -> None:
    source = replace(
        PAGE.comparisons[0],
        task="wikitext",
        metric="word_perplexity",
        difference=-3.5,
        p_holm=0.01,
    )
    page = replace(PAGE, comparisons=(source, replace(source, difference=3.5)))
    down, up = differences_of(page)
    assert (down.verdict, down.mark) == ("better", "▲")
    assert (down.difference, down.unit) == (f"{MINUS}3.5", "")
    assert (up.verdict, up.mark, up.difference) == ("worse", "▼", "+3.5")


@pytest.mark.parametrize("old", ["teacher", BASELINE, "student-threshold-40"])
def test_a_name_that_is_a_script_is_only_text(old: str) -> None:
    html = render_page(renamed(PAGE, old, EVIL))
    assert "<script>alert" not in html
    dom = parse(html)
    assert EVIL in rows(dom)
    assert len(dom.all("script")) == len(DOM.all("script"))
    assert EVIL in [option.text for option in dom.one("select", id="model-a").all("option")]
    assert EVIL in json.loads(dom.one("script", type="application/json").text)["models"]


def test_whatever_is_said_in_items_notes_and_settings_is_only_text() -> None:
    said = f"</script>{EVIL}<!--<script>&amp;\"'\u2028\x00\ud800"
    item = replace(
        PAGE.items[0],
        prompt=said,
        target=said,
        choices=(said,),
        answers={
            "teacher": PageAnswer(is_right=True, response=said),
            BASELINE: PageAnswer(is_right=False, response=said + "!"),
        },
    )
    task = replace(PAGE.tasks[0], settings=((EVIL, EVIL),))
    page = replace(
        PAGE,
        items=(item,),
        notes=(EVIL,),
        runs=(EVIL,),
        tasks=(task, *PAGE.tasks[1:]),
        versions=((EVIL, EVIL),),
    )
    html = render_page(page, title=EVIL)
    dom = parse(html)
    html.encode()  # half a surrogate pair has become a question mark
    assert len(dom.all("script")) == len(DOM.all("script"))
    assert dom.one("h1").text == EVIL
    embedded = json.loads(dom.one("script", type="application/json").text)
    assert embedded["tasks"][0]["items"][0][1] == said.replace("\ud800", "?")
    assert not re.search(r"[<>&]", dom.one("script", type="application/json").text)


def test_scripts_of_ours_cannot_end_their_element() -> None:
    for script in scripts(DOM):
        assert "</" not in script.text
        assert "innerHTML" not in script.text
        assert "eval(" not in script.text


def test_settings_versions_notes_and_runs_are_shown() -> None:
    text = DOM.one("section", id="settings").text
    for task in PAGE.tasks:
        for name, value in task.settings:
            assert f"{name} {value}" in text
    for name, value in PAGE.versions:
        assert f"{name} {value}" in text
    for note in PAGE.notes:
        assert note in text
    assert "student-cross-entropy-only demo-ce" in text


def test_held_out_columns_of_different_caches_are_marked_and_not_bold() -> None:
    warning = "compare them within a run only"
    assert warning not in HTML
    html = render_page(replace(PAGE, held_out_is_comparable=False))
    assert warning in html
    best = [column for column in table_of(PAGE, []) if column.group == "Held-out text"]
    assert all(any(cell.is_best for cell in column.cells) for column in best[:4])
    apart = table_of(replace(PAGE, held_out_is_comparable=False), [])
    assert not any(
        cell.is_best for column in apart if column.group == "Held-out text" for cell in column.cells
    )


def test_a_page_of_one_model_without_scores_is_a_page() -> None:
    row = PageRow(name="alone", role="other", run="r", scores={})
    dom = parse(render_page(PageModel(runs=("r",), rows=(row,), tasks=())))
    assert rows(dom) == {"alone": [UNKNOWN]}
    sections = [one.attributes["id"] for one in dom.all("section")]
    assert sections == ["scores", "settings"]
    assert dom.one("nav").text == "Scores Settings"


def test_the_page_of_a_leaderboard_has_its_numbers(tmp_path: Path) -> None:
    board = compare([make_run(tmp_path / "demo")])
    page = page_of(board, all_notes(board), {"python": "3.11", "datasets": None})
    assert page.versions == (("python", "3.11"),)
    dom = parse(render_page(page))
    assert rows(dom)["student"] == [
        *("113 M", "13.46", "0.412", "70.1 ± 0.3", "70.0"),
        *("44.0 ± 2.2 ▲", "43.0 ± 2.1", "23.46"),
    ]
    assert rows(dom)["initial"][-1] == "not finite"
    settings = dom.one("section", id="settings").text
    assert "hellaswag: 500 of 10,042 documents (limit: 500)" in settings
    assert "max length 2048" in settings
    assert "num fewshot not set" in settings


def test_the_page_of_a_leaderboard_has_its_costs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    for name, weights, speed in (("teacher", "T", 100.0), ("student", "student of demo", 250.0)):
        cost = {
            "identity": {"weights": weights, "device": "cpu", "dtype": "bfloat16"}
            | {"settings": {"prompt_tokens": 8, "new_tokens": 4, "batch_size": 1, "rounds": 3}}
            | {"machine": {"processor": "P"}},
            "num_parameters": 1000,
            "weight_bytes": 2000,
            "prefill_tokens_per_second": speed,
            "decode_tokens_per_second": speed / 10,
            "peak_bytes": 5000,
        }
        (run / "eval" / name / "cost.json").write_text(json.dumps(cost))
    page = page_of(compare([run]), [], {})
    costs = {row.name: row.cost for row in page.rows}
    assert costs["initial"] is None
    assert costs["student"] is not None
    assert costs["student"].over_teacher["prefill_tokens_per_second"] == 2.5
    assert costs["student"].over_teacher["peak_bytes"] == 1
    assert "2.50" in " ".join(rows(parse(render_page(page)))["student"])
