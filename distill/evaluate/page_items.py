"""Items on which models disagree, as compact JSON for the HTML page. No torch here.

{models: [name], tasks: [{name, metric, wins, left_out, items}]}
wins[a][b]  items that model a gets right and model b wrong, whether embedded or not
left_out    items with a disagreement that did not fit
items       [doc_id, prompt, choices or 0, target, marks, texts, responses]
marks       a character a model: 1 right, 0 wrong, - not asked
responses   a number a model: place of its response in `texts`, or -1
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from distill.evaluate.page_model import PageItem, PageModel

LONGEST_PROMPT = 1500
"""Characters of a prompt that are kept: its end, as few-shot examples come before the question."""

LONGEST_TEXT = 800
"""Characters of a choice, a target or a response that are kept: its beginning."""

_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
"""What could end a script element, or is read as HTML; JSON has these only within strings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Items as they go into the page."""

    text: str
    """JSON that is safe within a script element."""
    num_embedded: int
    num_left_out: int


def embed(page: PageModel, max_bytes: int) -> Embedded:
    """Write as many items with a disagreement as fit into `max_bytes`, every task its share.

    An item that all models solve, or none, can never be shown and is not written.
    """
    names = [row.name for row in page.rows]
    by_task = {
        task.name: [item for item in page.items if item.task == task.name] for task in page.tasks
    }
    told_apart = {
        task: [item for item in items if len({a.is_right for a in item.answers.values()}) > 1]
        for task, items in by_task.items()
        if items
    }
    # The frame is written with the widest numbers that it can hold.
    frame = _frame(page, names, told_apart, {task: [] for task in told_apart})
    room = max_bytes - len(frame.encode())
    kept: dict[str, list[str]] = {task: [] for task in told_apart}
    for task, item in _in_turn(told_apart):
        text = _json(_compact(item, names))
        room -= len(text.encode()) + 1
        if room < 0:
            break
        kept[task].append(text)
    num_embedded = sum(map(len, kept.values()))
    return Embedded(
        text=_frame(page, names, told_apart, kept),
        num_embedded=num_embedded,
        num_left_out=sum(map(len, told_apart.values())) - num_embedded,
    )


def wins(items: Iterable[PageItem], names: Sequence[str]) -> list[list[int]]:
    """Count, for each ordered pair of models, the items that only the first gets right."""
    counts = [[0] * len(names) for _ in names]
    for item in items:
        right = [n for n, name in enumerate(names) if name in item.answers]
        wrong = [n for n in right if not item.answers[names[n]].is_right]
        for winner in set(right) - set(wrong):
            for loser in wrong:
                counts[winner][loser] += 1
    return counts


def _in_turn(items: dict[str, list[PageItem]]) -> Iterator[tuple[str, PageItem]]:
    for row in zip_longest(*items.values()):
        yield from ((task, item) for task, item in zip(items, row, strict=True) if item is not None)


def _compact(item: PageItem, names: Sequence[str]) -> list[object]:
    answers = [item.answers.get(name) for name in names]
    texts = list(dict.fromkeys(_start(answer.response) for answer in answers if answer))
    return [
        item.doc_id,
        _end(item.prompt),
        0 if item.choices is None else [_start(choice) for choice in item.choices],
        _start(item.target),
        "".join("-" if answer is None else str(int(answer.is_right)) for answer in answers),
        texts,
        [-1 if answer is None else texts.index(_start(answer.response)) for answer in answers],
    ]


def _frame(
    page: PageModel,
    names: Sequence[str],
    told_apart: dict[str, list[PageItem]],
    kept: dict[str, list[str]],
) -> str:
    tasks = []
    for task, items in told_apart.items():
        head = _json(
            {
                "name": task,
                "metric": page.task(task).main.name,
                "wins": wins(items, names),
                "left_out": len(items) - len(kept[task]),
            }
        )
        tasks.append(f'{head[:-1]},"items":[{",".join(kept[task])}]}}')
    return f'{{"models":{_json(list(names))},"tasks":[{",".join(tasks)}]}}'


def _json(value: object) -> str:
    text = (
        json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        .encode("utf-8", "replace")
        .decode()
    )
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _start(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _end(text: str) -> str:
    return text if len(text) <= LONGEST_PROMPT else "…" + text[1 - LONGEST_PROMPT :]
