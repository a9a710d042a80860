from typing import Any, get_args

import pytest

from distill.config import EvaluationConfig, parse
from distill.config.presets import LOCAL_PRESETS, PRESETS, Preset
from distill.errors import ConfigError
from distill.evaluate.tasks import PlannedTask, check_tasks
from scripts.demo_assets import TASKS


def test_every_preset_has_tasks_that_differ() -> None:
    assert set(PRESETS) == set(get_args(Preset))
    for tasks in PRESETS.values():
        names = [name for name, _ in tasks]
        assert names
        assert len(set(names)) == len(names)


def test_the_offline_preset_is_what_the_demo_makes() -> None:
    config = EvaluationConfig(preset="offline", include_path="assets/tasks", num_fewshot=3)
    assert {name for name, _ in config.requested} == {f"{name}_local" for name in TASKS}
    assert {shots for _, shots in config.requested} == {3}


def test_tasks_take_the_number_of_examples_of_the_config() -> None:
    assert EvaluationConfig(tasks=("a", "b"), num_fewshot=2).requested == (("a", 2), ("b", 2))
    assert EvaluationConfig(tasks=("a",)).requested == (("a", None),)
    assert EvaluationConfig().requested == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "quick", "tasks": ["piqa"]}, "tasks and preset exclude each other"),
        ({"preset": "offline"}, "preset offline needs include_path"),
        ({"preset": "quick", "include_path": "x"}, "preset quick needs include_path=null"),
        ({"preset": "open_llm", "num_fewshot": 0}, "prescribes its few-shot examples"),
        ({"preset": "fast"}, "preset: Input should be 'quick'"),
        ({"fewshot_as_multiturn": True}, "needs apply_chat_template=true"),
        ({"batch_size": 0}, r"batch_size: expected a number greater than 0, or auto \(got 0\)"),
        ({"batch_size": "all"}, "batch_size: expected a number greater than 0, or auto"),
        ({"models": {"a": {"adapter": "x"}}}, "models.a.path: is required"),
        ({"models": {"a": {"path": "x", "lora": "y"}}}, "models.a.lora: no such setting"),
        ({"models": {"a": {"path": "x", "backend": "openai"}}}, "needs base_url; .*tokenizer"),
        ({"models": {"a": {"path": "x", "base_url": "y"}}}, "base_url is of backend openai"),
        ({"models": {"a": {"path": "x", "tensor_parallel": 2}}}, "is of backend vllm, not of hf"),
        ({"models": {"a": {"path": "x", "args": {"dtype": "y"}}}}, "args holds dtype"),
        ({"cost": {"new_tokens": 1}}, "cost.new_tokens: Input should be greater than or equal"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(EvaluationConfig, settings, "evaluation")


def test_a_model_may_be_given_by_its_path_alone() -> None:
    short = parse(EvaluationConfig, {"models": {"a": "x"}}, "evaluation")
    assert short == parse(EvaluationConfig, {"models": {"a": {"path": "x"}}}, "evaluation")
    assert (short.models["a"].path, short.models["a"].backend) == ("x", "hf")


@pytest.fixture(scope="module")
def planned() -> dict[Preset, tuple[PlannedTask, ...]]:
    """All presets of stock tasks, resolved by lm-eval's index, which takes 7 s to make."""
    return {
        preset: check_tasks(EvaluationConfig(preset=preset))
        for preset in PRESETS
        if preset not in LOCAL_PRESETS
    }


@pytest.mark.slow
def test_every_task_of_a_preset_exists_in_lm_eval(
    planned: dict[Preset, tuple[PlannedTask, ...]],
) -> None:
    for preset, tasks in planned.items():
        assert {task.requested for task in tasks} == {name for name, _ in PRESETS[preset]}


@pytest.mark.slow
def test_presets_prescribe_examples_and_know_how_groups_are_averaged(
    planned: dict[Preset, tuple[PlannedTask, ...]],
) -> None:
    tasks = {task.name: task for task in planned["open_llm"]}
    assert tasks["arc_challenge"].num_fewshot == 25
    assert tasks["arc_challenge"].group is None
    anatomy = tasks["mmlu_anatomy"]
    assert (anatomy.requested, anatomy.group, anatomy.num_fewshot) == ("mmlu", "mmlu", 5)
    assert anatomy.averaged == (("acc", True),)
    assert sum(task.group == "mmlu" for task in tasks.values()) == 57
    assert {task.num_fewshot for task in planned["open_llm_v2"]} == {None}
