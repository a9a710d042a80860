"""The HTML page in a real browser: opens, sorts, filters, lists items; on a phone and a desk.

Needs Debian's chromium and the Python package playwright; downloads nothing.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.evaluate.page import render_page
from tests.pages import EVIL, make_page, renamed

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
PHONE, DESK = {"width": 375, "height": 812}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    path.write_text(render_page(make_page()), encoding="utf-8")
    return path.as_uri()


class Visit:
    """One page, and whatever it asked for or complained about."""

    def __init__(self, browser: Any, address: str, size: dict[str, int], scheme: str) -> None:
        self.context = browser.new_context(
            viewport=size, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)

    def names(self) -> list[str]:
        """Models in the table that can be seen, in order."""
        found: list[str] = self.page.locator("#board tbody tr:visible .name").all_inner_texts()
        return found

    def head(self, title: str, number: int = 0) -> Any:
        return self.page.locator("#board .heads th", has_text=title).nth(number)


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    size, scheme = getattr(request, "param", (DESK, "light"))
    opened = Visit(browser, address, size, scheme)
    yield opened
    assert opened.complaints == []
    assert opened.requests == [address]
    opened.context.close()


EVERYWHERE = pytest.mark.parametrize(
    "visit",
    [(PHONE, "light"), (PHONE, "dark"), (DESK, "light"), (DESK, "dark")],
    ids=["phone-light", "phone-dark", "desk-light", "desk-dark"],
    indirect=True,
)
ORDER = [row.name for row in make_page().rows]


@EVERYWHERE
def test_the_page_never_scrolls_sideways(visit: Visit) -> None:
    wide = "document.documentElement.scrollWidth <= innerWidth"
    assert visit.page.evaluate(wide)
    for summary in visit.page.locator("summary").all():
        summary.click()
    assert visit.page.locator("details[open]").count() > 20
    assert visit.page.evaluate(wide)


@EVERYWHERE
def test_the_first_column_stays_while_the_table_scrolls(visit: Visit) -> None:
    box = visit.page.locator("#scores .scroll")
    cell = visit.page.locator("#board tbody th").first
    before = cell.bounding_box()
    room = box.evaluate("one => one.scrollWidth - one.clientWidth")
    assert room > 0
    box.evaluate("one => { one.scrollLeft = 150; }")
    after = cell.bounding_box()
    assert before["x"] == pytest.approx(after["x"], abs=1.5)
    assert cell.evaluate("one => one.offsetWidth") < 0.5 * visit.page.viewport_size["width"]


def test_a_click_sorts_then_turns_then_restores(visit: Visit) -> None:
    head = visit.head("perplexity")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"  # low is good
    assert visit.names()[:2] == ["teacher", "student-threshold-40"]
    assert visit.names()[-1] == "SmolLM2-360M"  # not measured
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert visit.names()[0] == "initial"
    assert visit.names()[-1] == "SmolLM2-360M"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert visit.names() == ORDER


def test_only_one_column_is_sorted_by(visit: Visit) -> None:
    visit.head("parameters").locator("button").click()
    visit.head("acc_norm").locator("button").click()
    assert visit.page.locator("[aria-sort]").count() == 1
    scores = {row.name: row.scores["arc_easy"]["acc_norm"].value or 0 for row in make_page().rows}
    assert [scores[name] for name in visit.names()] == sorted(scores.values(), reverse=True)


def test_the_keyboard_sorts_by_name(visit: Visit) -> None:
    visit.head("model").locator("button").focus()
    visit.page.keyboard.press("Enter")
    assert visit.names() == sorted(ORDER, key=str.lower)
    visit.page.keyboard.press("Space")
    assert visit.names() == sorted(ORDER, key=str.lower, reverse=True)
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.textContent").strip() == "parameters"


def test_the_first_tab_skips_to_the_scores(visit: Visit) -> None:
    visit.page.keyboard.press("Tab")
    skip = visit.page.locator(".skip")
    assert skip.evaluate("one => one === document.activeElement")
    visit.page.wait_for_function("document.querySelector('.skip').getBoundingClientRect().top >= 0")
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("location.hash") == "#scores"


def test_filters_by_name_and_role_add_up(visit: Visit) -> None:
    visit.page.get_by_label("Find").fill("TOP_K")
    assert visit.names() == ["student-top_k-64-bucket"]
    assert visit.page.locator("#shown").inner_text() == "1 of 7 models"
    visit.page.get_by_label("Role").select_option("teacher")
    assert visit.names() == []
    assert visit.page.locator("#none").is_visible()
    visit.page.get_by_label("Find").fill("")
    assert visit.names() == ["teacher"]


def test_further_metrics_and_other_tasks_show_on_request(visit: Visit) -> None:
    def titles() -> list[str]:
        found = visit.page.locator("#board .heads th:visible .sort > span:first-child")
        return [text.split()[0] for text in found.all_inner_texts()]

    assert titles().count("acc_norm") == 2
    assert "acc" not in titles()
    visit.page.get_by_label("All metrics").check()
    assert titles().count("acc") == 2
    visit.page.get_by_label("Columns").select_option("gsm8k")
    assert titles() == ["model", "parameters", "exact_match"]
    spans = visit.page.locator("#board .groups th:visible").all()
    assert sum(one.evaluate("one => one.colSpan") for one in spans) == 2


@EVERYWHERE
def test_a_mark_opens_its_details_and_escape_closes_them(visit: Visit) -> None:
    mark = visit.page.locator("#board button.mark").first
    mark.focus()
    visit.page.keyboard.press("Enter")
    card = visit.page.locator(".card:popover-open")
    assert card.count() == 1
    text = card.inner_text()
    assert "95 % interval" in text
    assert "p after Holm" in text
    box, size = card.bounding_box(), visit.page.viewport_size
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= size["width"]
    assert 0 <= box["y"] <= size["height"] - box["height"]
    visit.page.keyboard.press("Escape")
    assert card.count() == 0
    assert mark.evaluate("one => one === document.activeElement")


def test_items_are_those_that_only_one_model_solves(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("Model A").select_option("student-threshold-40")
    page.get_by_label("Model B").select_option("initial")
    page.get_by_label("Task").last.select_option("gsm8k")
    source = next(
        one
        for one in make_page().comparisons
        if (one.model, one.task) == ("student-threshold-40", "gsm8k")
    )
    assert source.gained is not None
    assert page.locator("#count-a").inner_text() == f"({source.gained})"
    assert page.locator("#count-b").inner_text() == f"({source.lost})"
    assert page.locator("#item-list details").count() == min(20, source.gained)
    while page.locator("#more").is_visible():
        page.locator("#more").click()
    assert page.locator("#item-list details").count() == source.gained
    page.get_by_text("Only B right").click()
    assert page.locator("#item-list details").count() == source.lost
    first = page.locator("#item-list details").first
    first.locator("summary").press("Enter")
    first.locator(".tag").first.wait_for()  # an item is filled when it opens
    item = next(
        one
        for one in make_page().items
        if one.task == "gsm8k"
        and one.answers["initial"].is_right
        and not one.answers["student-threshold-40"].is_right
    )
    text = first.inner_text()
    assert item.prompt.splitlines()[0] in text
    assert item.target in text
    assert item.answers["student-threshold-40"].response in text
    assert f"initial\n{item.target} ✓ right" in text
    assert "✗ wrong" in text


def test_choices_show_the_target_and_who_chose_what(visit: Visit) -> None:
    first = visit.page.locator("#item-list details").first
    first.locator("summary").click()
    first.locator(".tag").first.wait_for()  # an item is filled when it opens
    choices = first.locator("ol li")
    assert choices.count() == 4
    assert choices.filter(has=visit.page.get_by_text("target", exact=True)).count() == 1
    assert first.locator("ol .tag.right").count() == 1
    assert first.locator("ol .tag.wrong").count() == 1


@EVERYWHERE
def test_the_theme_follows_the_system_until_the_button_is_pressed(visit: Visit) -> None:
    button = visit.page.get_by_role("button", name="Dark theme")
    is_dark = button.get_attribute("aria-pressed") == "true"
    ground = "getComputedStyle(document.body).backgroundColor"
    assert is_dark == visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    dark, light = "rgb(18, 20, 22)", "rgb(248, 248, 246)"
    assert visit.page.evaluate(ground) == (dark if is_dark else light)
    button.click()
    assert visit.page.evaluate(ground) == (light if is_dark else dark)
    assert button.get_attribute("aria-pressed") == str(not is_dark).lower()


def test_one_task_is_plotted_at_a_time(visit: Visit) -> None:
    plots = visit.page.locator("[data-chart-task]:visible svg[role=img]")
    assert plots.count() == 2
    visit.page.locator("#chart-task").select_option("hellaswag")
    assert plots.count() == 2
    assert "hellaswag" in plots.first.locator("xpath=..").inner_text()


def test_text_of_drawings_can_be_read_on_a_phone(browser: Any, address: str) -> None:
    visit = Visit(browser, address, PHONE, "light")
    scale = visit.page.locator(".chart").first.evaluate("one => one.clientWidth / 360")
    assert 13 * scale >= 10
    visit.context.close()


def test_details_lead_to_the_items_behind_a_difference(visit: Visit) -> None:
    source = next(one for one in make_page().comparisons if one.is_significant)
    visit.page.locator("#board tbody tr", has_text=source.model).locator(
        "button.mark"
    ).first.click()
    visit.page.locator(".card:popover-open .see").click()
    assert visit.page.locator(".card:popover-open").count() == 0
    status = visit.page.locator("#item-status").inner_text()
    assert f"only {source.model}, not {source.baseline}" in status
    assert status.startswith(f"{source.gained} items of {source.task}")
    assert visit.page.locator("#items").evaluate("one => one.getBoundingClientRect().top < 200")


@pytest.mark.parametrize("name", [EVIL, "m" * 120])
def test_names_run_no_code_and_never_widen_the_page(
    browser: Any, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "page.html"
    path.write_text(render_page(renamed(make_page(), "student-threshold-40", name)))
    visit = Visit(browser, path.as_uri(), PHONE, "dark")
    visit.page.on("dialog", lambda dialog: visit.complaints.append(dialog.message))
    visit.page.reload()
    for summary in visit.page.locator("summary").all():
        summary.click()
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert name in visit.names()
    assert name in visit.page.locator("#item-status").inner_text()
    assert visit.complaints == []
    visit.context.close()
