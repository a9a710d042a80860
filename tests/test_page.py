"""The HTML page: whole, safe, small, and with every value. What it does is in test_page_browser."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from distill.evaluate import render
from distill.evaluate.leaderboard import compare
from distill.evaluate.page import MAX_BYTES, render_page
from distill.evaluate.page_items import LONGEST_PROMPT, embed
from distill.evaluate.page_model import PageAnswer, PageItem, PageModel, PageRow
from distill.evaluate.page_source import items_of, page_of
from distill.evaluate.page_table import differences_of, table_of
from tests.dom import Element, parse
from tests.pages import BASELINE, EVIL, make_page, renamed
from tests.run_folders import make_run

PAGE = make_page()
HTML = render_page(PAGE)
DOM = parse(HTML)
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
    for row in PAGE.rows:
        cells = table[row.name]
        assert cells[0] == row.role
        assert cells[1] == render.count(row.num_parameters)
        assert (render.perplexity(row.ce_nats.value) if row.ce_nats else "–") == cells[2]
        assert (cells[3] == "–") == (row.kl_nats is None)
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
        sign = "+" if source.difference > 0 else "−"
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
    assert (down.verdict, down.mark, down.difference, down.unit) == ("better", "▲", "−3.5", "")
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
    said = f'</script>{EVIL}<!--<script>&amp;"\'\u2028\x00\ud800'
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


def test_the_page_stays_small_and_says_what_was_left_out() -> None:
    assert len(HTML.encode()) < 400_000
    assert "left out" not in DOM.one("section", id="items").text
    page = replace(PAGE, items=_many_items(3000, prompt="word " * 290))
    html = render_page(page)
    size = len(html.encode())
    assert 0.99 * MAX_BYTES < size < MAX_BYTES
    embedded = json.loads(parse(html).one("script", type="application/json").text)
    kept = {task["name"]: len(task["items"]) for task in embedded["tasks"]}
    assert max(kept.values()) - min(kept.values()) <= 1  # every task has its share
    assert all(task["left_out"] == 3000 - kept[task["name"]] for task in embedded["tasks"])
    left_out = 9000 - sum(kept.values())
    assert f"{left_out:,} more were left out" in parse(html).one("section", id="items").text


def test_a_page_that_is_too_small_for_any_item_has_none() -> None:
    assert embed(PAGE, 0).num_embedded == 0
    assert embed(PAGE, 0).num_left_out == embed(PAGE, MAX_BYTES).num_embedded


def test_items_that_all_models_solve_or_none_are_not_embedded() -> None:
    embedded = json.loads(embed(PAGE, MAX_BYTES).text)
    told_apart = sum(len({a.is_right for a in i.answers.values()}) == 2 for i in PAGE.items)
    marks = [item[4] for task in embedded["tasks"] for item in task["items"]]
    assert len(marks) == told_apart < len(PAGE.items)
    assert all({"0", "1"} <= set(mark) for mark in marks)


def test_wins_count_items_that_only_the_first_of_two_models_solves() -> None:
    embedded = json.loads(embed(PAGE, 0).text)  # the counts are whole, whatever is embedded
    places = {name: number for number, name in enumerate(embedded["models"])}
    wins = {task["name"]: task["wins"] for task in embedded["tasks"]}
    for one in PAGE.comparisons:
        model, baseline = places[one.model], places[one.baseline]
        assert wins[one.task][model][baseline] == one.gained
        assert wins[one.task][baseline][model] == one.lost


def test_embedded_items_read_back() -> None:
    embedded = json.loads(embed(PAGE, MAX_BYTES).text)
    originals = {(item.task, item.doc_id): item for item in PAGE.items}
    for task in embedded["tasks"]:
        for doc_id, prompt, choices, target, marks, texts, responses in task["items"]:
            item = originals[task["name"], doc_id]
            assert (prompt, target) == (item.prompt, item.target)
            assert (choices or None) == (list(item.choices) if item.choices else None)
            for name, mark, response in zip(embedded["models"], marks, responses, strict=True):
                assert (mark == "1") == item.answers[name].is_right
                assert texts[response] == item.answers[name].response


def test_a_long_prompt_keeps_its_end() -> None:
    prompt = "example " * 1000 + "the question"
    page = replace(PAGE, items=(replace(_told_apart(PAGE), prompt=prompt),))
    (item,) = (item for task in json.loads(embed(page, 10**6).text)["tasks"] for item in task["items"])
    assert len(item[1]) == LONGEST_PROMPT
    assert item[1].startswith("…")
    assert item[1].endswith("the question")


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
    assert rows(dom) == {"alone": ["other"]}
    sections = [one.attributes["id"] for one in dom.all("section")]
    assert sections == ["scores", "settings"]
    assert dom.one("nav").text == "Scores Settings"


def test_the_page_of_a_leaderboard_has_its_numbers(tmp_path: Path) -> None:
    board = compare([make_run(tmp_path / "demo")])
    page = page_of(board, {"python": "3.11", "datasets": None})
    assert page.versions == (("python", "3.11"),)
    dom = parse(render_page(page))
    assert rows(dom)["student"] == [
        *("student", "113 M", "13.46", "0.412", "70.1 ± 0.3", "70.0"),
        *("44.0 ± 2.2", "43.0 ± 2.1", "23.46"),
    ]
    assert rows(dom)["initial"][-1] == "not finite"
    settings = dom.one("section", id="settings").text
    assert "hellaswag: 500 of 10,042 documents (limit: 500)" in settings
    assert "max length 2048" in settings
    assert "num fewshot not set" in settings


def sample(doc_id: int, value: float | None, text: str = "a") -> dict[str, object]:
    return {
        "doc_id": doc_id,
        "doc_hash": text,
        "metrics": {"acc": value},
        **{"prompt": f"prompt {text}", "choices": ["x", "y"], "target": "x"},
        "response": "x" if value else "y",
    }


def test_items_are_documents_that_two_models_answered_alike_worded() -> None:
    samples = {
        "one": [sample(0, 1.0), sample(1, 0.0), sample(2, 1.0), {**sample(3, 1.0)}],
        "two": [sample(1, 1.0), sample(2, 0.0, "other text"), sample(3, 1.0)],
    }
    for found in samples.values():
        del found[-1]["prompt"]  # as files of older versions have it
    (item,) = items_of("task", "acc", samples)
    assert item == PageItem(
        task="task",
        doc_id=1,
        prompt="prompt a",
        choices=("x", "y"),
        target="x",
        answers={
            "one": PageAnswer(is_right=False, response="y"),
            "two": PageAnswer(is_right=True, response="x"),
        },
    )


@pytest.mark.parametrize("value", [0.5, None])
def test_a_metric_that_is_not_right_or_wrong_gives_no_items(value: float | None) -> None:
    assert items_of("task", "acc", {"one": [sample(0, 1)], "two": [sample(0, value)]}) == ()


def _told_apart(page: PageModel) -> PageItem:
    return next(i for i in page.items if len({a.is_right for a in i.answers.values()}) == 2)


def _many_items(number: int, prompt: str) -> tuple[PageItem, ...]:
    item = _told_apart(PAGE)
    tasks = [task.name for task in PAGE.tasks[:3]]
    return tuple(
        replace(item, task=task, doc_id=doc_id, prompt=f"{prompt}{doc_id}")
        for task in tasks
        for doc_id in range(number)
    )
