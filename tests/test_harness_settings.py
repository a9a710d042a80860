"""Settings of the harness beside tasks: chat templates, automatic batches, groups, samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from distill.config import EvaluationConfig
from distill.errors import EvalError
from distill.evaluate.harness import run_tasks
from distill.evaluate.tasks import task_manager
from tests.tiny_tasks import QUESTIONS, save_model

Score = Callable[..., dict[str, dict[str, Any]]]
"""score("tiny_choice", limit=2): files of the tiny teacher, by the name of the task."""


@pytest.fixture
def score(tiny_teacher: Path, task_folder: Path, tmp_path: Path) -> Score:
    def run(*tasks: str, model: Path = tiny_teacher, **settings: Any) -> dict[str, dict[str, Any]]:
        known = {"batch_size": 3, "max_length": 128, "dtype": "float32"}
        config = EvaluationConfig(
            tasks=tasks, include_path=str(task_folder), **{**known, **settings}
        )
        out = tmp_path / f"eval-{len(list(tmp_path.iterdir()))}"
        files = run_tasks(
            "tiny", str(model), config, out, device="cpu", seed=0, on_progress=lambda _: None
        )
        return {path.stem: json.loads(path.read_text()) for path in files}

    return run


def prompts(record: dict[str, Any]) -> list[str]:
    return [sample["prompt"] for sample in record["samples"]]


def test_automatic_batches_give_the_same_scores(score: Score) -> None:
    tasks = ("tiny_choice", "tiny_rolling", "tiny_generate")
    fixed, automatic = score(*tasks), score(*tasks, batch_size="auto")
    for task in tasks:
        assert fixed[task]["identity"] == automatic[task]["identity"]
        for name, metric in fixed[task]["metrics"].items():
            value = automatic[task]["metrics"][name]["value"]
            assert value == pytest.approx(metric["value"], rel=1e-5)


def test_chat_templates_stand_around_prompts_and_in_the_identity(score: Score) -> None:
    plain = score("tiny_choice", num_fewshot=2)["tiny_choice"]
    chat = score("tiny_choice", num_fewshot=2, apply_chat_template=True)["tiny_choice"]
    turns = score(
        "tiny_choice", num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=True
    )["tiny_choice"]
    assert not any("<user>" in prompt for prompt in prompts(plain))
    assert all(prompt.count("<user>") == 1 for prompt in prompts(chat))
    assert all(prompt.count("<user>") == 3 for prompt in prompts(turns))
    assert all(prompt.endswith("<assistant>") for prompt in [*prompts(chat), *prompts(turns)])
    added = chat["identity"].keys() - plain["identity"].keys()
    assert added == {"apply_chat_template"}
    assert turns["identity"].keys() - chat["identity"].keys() == {"fewshot_as_multiturn"}


def test_a_tokenizer_without_chat_template_is_refused(score: Score, tmp_path: Path) -> None:
    save_model(tmp_path / "base", seed=0)
    with pytest.raises(EvalError, match=r"has no chat template, which .*apply_chat_template"):
        score("tiny_choice", model=tmp_path / "base", apply_chat_template=True)


def test_samples_of_a_choice_say_what_was_asked_and_answered(score: Score) -> None:
    record = score("tiny_choice")["tiny_choice"]
    for sample, question in zip(record["samples"], QUESTIONS, strict=True):
        assert sample["prompt"] == f"{question['question']}\nAnswer:"
        assert sample["choices"] == question["choices"]
        assert sample["target"] == question["choices"][question["answer"]]
        is_right = sample["response"] == sample["target"]
        assert sample["metrics"]["acc"] == float(is_right)


def test_choices_in_the_context_are_told_apart(score: Score) -> None:
    record = score("tiny_winograd", num_fewshot=1)["tiny_winograd"]
    for sample, question in zip(record["samples"], QUESTIONS, strict=True):
        assert sample["prompt"].endswith(question["question"])
        assert sample["choices"] == [f"{word} ends here" for word in ("one", "two", "three")]
        assert sample["target"] == sample["choices"][question["answer"]]
        assert sample["metrics"]["acc"] == float(sample["response"] == sample["target"])


def test_samples_of_generated_and_of_whole_texts(score: Score) -> None:
    records = score("tiny_generate", "tiny_rolling")
    for sample, question in zip(records["tiny_generate"]["samples"], QUESTIONS, strict=True):
        assert sample["choices"] is None
        assert sample["target"] == question["choices"][question["answer"]]
        assert 0 < len(sample["response"]) <= 8
    for sample in records["tiny_rolling"]["samples"]:
        assert (sample["prompt"], sample["choices"], sample["response"]) == ("", None, None)
        assert sample["target"]
        log_likelihood, words = sample["metrics"]["word_perplexity"]
        assert log_likelihood < 0
        assert words == len(sample["target"].split())


def test_a_table_can_average_a_group_as_lm_eval_does(
    score: Score, tiny_teacher: Path, task_folder: Path
) -> None:
    for group, by_size in (("tiny_by_size", True), ("tiny_by_task", False)):
        files = score(group)
        theirs = simple_evaluate(
            model=HFLM(pretrained=str(tiny_teacher), dtype="float32", device="cpu", max_length=128),
            tasks=[group],
            task_manager=task_manager(str(task_folder)),
            bootstrap_iters=0,
        )
        assert theirs is not None
        assert {file["group"] for file in files.values()} == {group}
        assert {file["weight_by_size"] for file in files.values()} == {by_size}
        sizes = [file["num_documents"] if by_size else 1 for file in files.values()]
        values = [file["metrics"]["acc_norm"]["value"] for file in files.values()]
        average = sum(s * v for s, v in zip(sizes, values, strict=True)) / sum(sizes)
        assert average == pytest.approx(theirs["groups"][group]["acc_norm,none"])


def test_a_task_by_its_own_name_and_a_tag_are_no_group(score: Score) -> None:
    for name in ("tiny_choice", "tiny_tag"):
        assert {(f["group"], f["weight_by_size"]) for f in score(name).values()} == {(None, None)}
    (record, _) = score("tiny_group").values()
    assert (record["group"], record["weight_by_size"]) == ("tiny_group", None)
