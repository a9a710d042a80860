"""Items of the HTML page: which go in, how they are cut and paired, and what is left out."""

import json
from dataclasses import replace

import pytest

from distill.evaluate.page import MAX_BYTES, render_page
from distill.evaluate.page_items import LONGEST_PROMPT, embed
from distill.evaluate.page_model import PageAnswer, PageItem, PageModel
from distill.evaluate.page_source import items_of
from tests.dom import parse
from tests.pages import make_page

PAGE = make_page()


def test_the_page_stays_small_and_says_what_was_left_out() -> None:
    html = render_page(PAGE)
    assert len(html.encode()) < 400_000
    assert "left out" not in parse(html).one("section", id="items").text
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
    (item,) = (
        item for task in json.loads(embed(page, 10**6).text)["tasks"] for item in task["items"]
    )
    assert len(item[1]) == LONGEST_PROMPT
    assert item[1].startswith("…")
    assert item[1].endswith("the question")


def sample(doc_id: int, value: float | None, text: str = "a") -> dict[str, object]:
    return {
        "doc_id": doc_id,
        "doc_hash": text,
        "metrics": {"acc": value},
        "prompt": f"prompt {text}",
        "choices": ["x", "y"],
        "target": "x",
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


def test_a_response_that_is_not_known_is_said_to_be_another() -> None:
    unknown = sample(0, 0) | {"response": None}
    (item,) = items_of("task", "acc", {"one": [sample(0, 1)], "two": [unknown]})
    assert item.answers["two"].response == "(another continuation)"
