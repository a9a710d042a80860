import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill.config import EvaluationConfig
from distill.errors import EvalError
from distill.evaluate.tasks import check_tasks, task_manager
from tests.tiny_tasks import write_tasks


@pytest.fixture
def config(tmp_path: Path) -> EvaluationConfig:
    return EvaluationConfig(include_path=str(write_tasks(tmp_path / "tasks")))


def test_groups_and_tags_become_the_tasks_that_lm_eval_makes_of_them(
    config: EvaluationConfig,
) -> None:
    manager = task_manager(config.include_path)
    for name in ("tiny_group", "tiny_tag"):
        config = replace(config, tasks=(name,))
        expected = list(manager.load([name])["tasks"])
        assert [task.name for task in check_tasks(config)] == expected


def test_an_absent_task_folder_is_named_with_the_nearest(config: EvaluationConfig) -> None:
    misspelt = replace(config, include_path=f"{config.include_path}x", tasks=("tiny_choice",))
    with pytest.raises(EvalError, match=r"there is no folder .*x \(did you mean tasks\?\)"):
        check_tasks(misspelt)


def test_a_task_named_twice_is_refused(config: EvaluationConfig) -> None:
    with pytest.raises(EvalError, match="tiny_choice: named twice, by tiny_choice and by tiny_tag"):
        check_tasks(replace(config, tasks=("tiny_choice", "tiny_tag")))


def test_a_group_without_tasks_is_refused(config: EvaluationConfig) -> None:
    with pytest.raises(EvalError, match="empty_group: a group without tasks"):
        check_tasks(replace(config, tasks=("tiny_rolling", "empty_group")))


def test_a_group_with_an_entry_without_a_name_is_refused(config: EvaluationConfig) -> None:
    with pytest.raises(EvalError, match="the group bad_group names neither a task nor a group"):
        check_tasks(replace(config, tasks=("bad_group",)))


def test_labels_do_not_change_a_definition_and_templates_do(config: EvaluationConfig) -> None:
    path = Path(str(config.include_path)) / "tiny_choice.yaml"
    config = replace(config, tasks=("tiny_choice",))
    (before,) = check_tasks(config)
    path.write_text(path.read_text() + "task_alias: Choice\n")
    assert check_tasks(config) == (before,)
    path.write_text(path.read_text() + "description: Choose.\n")
    assert check_tasks(config) != (before,)


def test_tasks_are_resolved_without_torch() -> None:
    code = "import sys, distill.evaluate.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
