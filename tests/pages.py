"""A page of seven models, four tasks and 300 items whose numbers agree with one another."""

import math
import random
from dataclasses import replace

from distill.evaluate.measured import Estimate
from distill.evaluate.page_model import (
    PageAnswer,
    PageCost,
    PageItem,
    PageMetric,
    PageModel,
    PageReliability,
    PageRow,
    PageTask,
)
from distill.evaluate.paired import Comparison
from distill.evaluate.results import Role

BASELINE = "initial"
EVIL = "<script>alert(1)</script>"

_MODELS: tuple[tuple[str, Role, int, float, float, float], ...] = (
    # name, role, parameters, ability (logits), cross-entropy and KL (nats)
    ("teacher", "teacher", 1_711_000_000, 1.6, 2.011, 0.0),
    ("initial", "initial", 113_000_000, -1.2, 4.774, 2.331),
    ("student-threshold-40", "student", 113_000_000, 0.5, 2.402, 0.412),
    ("student-top_k-64-bucket", "student", 113_000_000, 0.3, 2.466, 0.467),
    ("student-sampled-56", "student", 90_400_000, -0.2, 2.731, 0.742),
    ("student-cross-entropy-only", "student", 113_000_000, -1.0, 2.951, 0.985),
    ("SmolLM2-360M", "other", 361_800_000, 0.6, 2.312, 0.391),
)
_TASKS = ("arc_easy", "gsm8k", "hellaswag")
_NUM_ITEMS = 100
_NOUNS = (
    *("lamp", "river", "magnet", "forest", "battery", "glacier"),
    *("seed", "pulley", "shadow", "mirror", "comet", "tide"),
)
_STEPS = (0.12, 0.2, 0.31, 0.44, 0.52, 0.61, 0.68, 0.74, 0.86, 0.96)


def make_page() -> PageModel:
    """Make the page; always the same."""
    items = tuple(_item(task, number) for task in _TASKS for number in range(_NUM_ITEMS))
    comparisons = _with_holm(
        [
            _comparison(task, name, [item for item in items if item.task == task])
            for task in _TASKS
            for name, *_ in _MODELS
            if name != BASELINE
        ]
    )
    return PageModel(
        runs=("demo", "demo-ce"),
        rows=tuple(_row(number, items) for number in range(len(_MODELS))),
        tasks=(*map(_task, _TASKS), _perplexity_task()),
        baseline=BASELINE,
        comparisons=comparisons,
        items=items,
        notes=(
            "arc_easy: 100 of 2,376 documents (limit: 100), few-shot examples: as the task says.",
            "Held-out columns: 12,258 tokens scored.",
        ),
        versions=(("python", "3.11.9"), ("lm_eval", "0.4.13"), ("torch", "2.13.0")),
    )


def renamed(page: PageModel, old: str, new: str) -> PageModel:
    """Give a model another name everywhere."""

    def name(found: str) -> str:
        return new if found == old else found

    return replace(
        page,
        baseline=name(page.baseline or ""),
        rows=tuple(replace(row, name=name(row.name)) for row in page.rows),
        comparisons=tuple(
            replace(one, model=name(one.model), baseline=name(one.baseline))
            for one in page.comparisons
        ),
        items=tuple(
            replace(item, answers={name(key): answer for key, answer in item.answers.items()})
            for item in page.items
        ),
    )


def _item(task: str, number: int) -> PageItem:
    draw = random.Random(f"{task} {number}")
    noun, other = draw.sample(_NOUNS, 2)
    hardness = draw.gauss(0, 1.2)
    first, second = draw.randint(3, 40), draw.randint(3, 40)
    if task == "gsm8k":
        prompt = (
            f"Question: A shop sells {first} {noun}s in the morning and {second} in the afternoon. "
            "How many does it sell in all?\nAnswer:"
        )
        choices, target = None, str(first + second)
        wrong = [str(first + second + slip) for slip in (-10, -1, 1, 10)]
    else:
        prompt = f"Question: What happens to a {noun} that is left beside a {other}?\nAnswer:"
        choices = tuple(
            f"The {noun} {does}."
            for does in ("cools down", "grows", "moves away", "does not change")
        )
        target = draw.choice(choices)
        wrong = [choice for choice in choices if choice != target]
    answers = {}
    for name, _, _, ability, _, _ in _MODELS:
        is_right = draw.random() < 1 / (1 + math.exp(hardness - ability))
        response = target if is_right else draw.choice(wrong)
        answers[name] = PageAnswer(is_right=is_right, response=response)
    return PageItem(
        task=task, doc_id=number, prompt=prompt, choices=choices, target=target, answers=answers
    )


def _task(name: str) -> PageTask:
    metrics = [("exact_match", True)] if name == "gsm8k" else [("acc_norm", True), ("acc", True)]
    return PageTask(
        name=name,
        metrics=tuple(
            PageMetric(name=metric, higher_is_better=better, is_share=True)
            for metric, better in metrics
        ),
        num_documents=_NUM_ITEMS,
        settings=(
            ("documents", "100 of 2,376"),
            ("dtype", "bfloat16"),
            ("limit", "100"),
            ("lm eval", "0.4.13"),
            ("task definition", "172b1ca7368fc147f20e372c7a698e612331c71a61a20239b1c96352447a2e40"),
        ),
    )


def _perplexity_task() -> PageTask:
    metric = PageMetric(name="word_perplexity", higher_is_better=False, is_share=False)
    return PageTask(name="wikitext", metrics=(metric,), num_documents=62)


def _row(number: int, items: tuple[PageItem, ...]) -> PageRow:
    name, role, num_parameters, _, ce, kl = _MODELS[number]
    scores: dict[str, dict[str, Estimate]] = {}
    for task in _TASKS:
        right = [item.answers[name].is_right for item in items if item.task == task]
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / len(right))
        scores[task] = {_task(task).main.name: Estimate(value=share, stderr=error)}
        if task != "gsm8k":
            scores[task]["acc"] = Estimate(value=share - 0.02, stderr=error)
    worst = name == "student-cross-entropy-only"
    scores["wikitext"] = {
        "word_perplexity": Estimate(value=None if worst else math.exp(ce + 1), stderr=None)
    }
    teacher_ce, initial_ce = _MODELS[0][4], _MODELS[1][4]
    is_measured = role != "other"
    return PageRow(
        name=name,
        role=role,
        run="demo-ce" if worst else "demo",
        num_parameters=num_parameters,
        scores=scores,
        ce_nats=Estimate(value=ce, stderr=0.02) if is_measured else None,
        kl_nats=Estimate(value=kl, stderr=0.011) if is_measured else None,
        agreement=Estimate(value=math.exp(-kl * 0.55), stderr=0.004) if is_measured else None,
        gap_recovered=(initial_ce - ce) / (initial_ce - teacher_ce) if role == "student" else None,
        ece=Estimate(value=0.012 + 0.02 * kl) if is_measured else None,
        reliability=_reliability(kl) if role in ("teacher", "student") else None,
        cost=PageCost(
            weight_bytes=2.0 * num_parameters,
            decode_tokens_per_second=4e10 / num_parameters,
            over_teacher={
                "weight_bytes": num_parameters / _MODELS[0][2],
                "decode_tokens_per_second": _MODELS[0][2] / num_parameters,
            },
        ),
    )


def _reliability(kl: float) -> PageReliability:
    return PageReliability(
        edges=tuple(number / 10 for number in range(11)),
        confidence=(None, *((number + 0.5) / 10 for number in range(1, 10))),
        accuracy=(math.nan, *(max(0.0, step - 0.1 * kl) for step in _STEPS[1:])),
        count=(0, 310, 820, 1104, 1180, 1213, 1190, 1302, 1711, 3428),
    )


def _comparison(task: str, model: str, items: list[PageItem]) -> Comparison:
    pairs = [(item.answers[model].is_right, item.answers[BASELINE].is_right) for item in items]
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    total, number = gained + lost, len(pairs)
    tail = sum(math.comb(total, k) for k in range(max(gained, lost), total + 1)) / 2**total
    difference = (gained - lost) / number
    stderr = math.sqrt((total / number - difference**2) / (number - 1))
    return Comparison(
        task=task,
        metric=_task(task).main.name,
        model=model,
        baseline=BASELINE,
        num_items=number,
        difference=difference,
        stderr=stderr,
        low=difference - 1.96 * stderr,
        high=difference + 1.96 * stderr,
        p_value=min(1.0, 2 * tail),
        p_holm=1.0,
        gained=gained,
        lost=lost,
        test="mcnemar_exact",
    )


def _with_holm(comparisons: list[Comparison]) -> tuple[Comparison, ...]:
    ranked = sorted(comparisons, key=lambda one: one.p_value)
    corrected, last = {}, 0.0
    for rank, one in enumerate(ranked):
        last = max(last, min(1.0, one.p_value * (len(ranked) - rank)))
        corrected[one.task, one.model] = last
    return tuple(replace(one, p_holm=corrected[one.task, one.model]) for one in comparisons)
