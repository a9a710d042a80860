import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import EvaluationConfig
from distill.errors import EvalError
from distill.evaluate.harness import run_tasks
from distill.evaluate.tasks import task_manager
from tests.tiny_tasks import QUESTIONS, save_model, write_tasks


@pytest.fixture(scope="module", autouse=True)
def fast_collection() -> Iterator[None]:
    """Spare the collector the objects of all imports: a third of a second in every run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def config(task_folder: Path) -> EvaluationConfig:
    return EvaluationConfig(
        tasks=("tiny_choice", "tiny_rolling"),
        include_path=str(task_folder),
        limit=2,
        batch_size=3,
        max_length=64,
        dtype="float32",
    )


class Run:
    """`run_tasks` with the arguments that no test varies, and what it said."""

    def __init__(self, model: Path, config: EvaluationConfig, out: Path) -> None:
        self.model, self.config, self.out = model, config, out
        self.lines: list[str] = []

    def __call__(self, on_line: Callable[[str], None] | None = None, **changes: Any) -> list[Path]:
        self.lines.clear()

        def listen(line: str) -> None:
            self.lines.append(line)
            if on_line is not None:
                on_line(line)

        return run_tasks(
            "tiny",
            str(changes.pop("model", self.model)),
            replace(self.config, **changes),
            self.out,
            device="cpu",
            seed=0,
            on_progress=listen,
        )

    def started(self) -> list[str]:
        """Names of the tasks that the last call began."""
        return [line.split()[1] for line in self.lines if line.endswith(")") and " (" in line]


@pytest.fixture
def run(model: Path, config: EvaluationConfig, tmp_path: Path) -> Run:
    return Run(model, config, tmp_path / "eval")


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_scores_equal_those_of_lm_eval_itself(run: Run, num_fewshot: int | None) -> None:
    ours = {path.stem: read(path) for path in run(num_fewshot=num_fewshot, limit=4)}
    reference = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(run.model, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(run.model),
        batch_size=4,
        max_length=64,
    )
    theirs = simple_evaluate(
        model=reference,
        tasks=list(run.config.tasks),
        task_manager=task_manager(run.config.include_path),
        num_fewshot=num_fewshot,
        limit=4,
        bootstrap_iters=1000,
        fewshot_random_seed=0,
    )
    assert theirs is not None
    assert set(ours) == {"tiny_choice", "tiny_rolling"}
    for name, record in ours.items():
        assert record["num_fewshot"] == theirs["n-shot"][name]
        for metric, score in record["metrics"].items():
            assert score["value"] == pytest.approx(theirs["results"][name][f"{metric},none"])
            stderr = theirs["results"][name][f"{metric}_stderr,none"]
            expected = None if stderr == "N/A" else pytest.approx(stderr)
            assert score["stderr"] == expected


def test_a_file_says_what_was_scored_and_how(run: Run) -> None:
    choice, rolling = map(read, run(limit=4))
    assert choice["main_metric"] == "acc_norm"
    assert rolling["main_metric"] == "word_perplexity"
    assert (choice["num_documents"], choice["num_documents_total"]) == (4, 8)
    assert (rolling["num_documents"], rolling["num_documents_total"]) == (4, 5)
    assert choice["metrics"]["acc"]["higher_is_better"] is True
    assert rolling["metrics"]["word_perplexity"]["higher_is_better"] is False
    assert choice["identity"].keys() == {
        *("model", "weights", "task", "task_definition", "limit", "num_fewshot"),
        *("max_length", "dtype", "seed", "lm_eval"),
    }
    assert str(run.model) not in json.dumps(choice)


def test_samples_hold_one_entry_per_document(run: Run) -> None:
    choice, rolling = map(read, run(limit=None))
    assert [sample["doc_id"] for sample in choice["samples"]] == list(range(8))
    assert [sample["doc_id"] for sample in rolling["samples"]] == list(range(5))
    assert len({sample["doc_hash"] for sample in choice["samples"]}) == 8
    mean = sum(sample["metrics"]["acc_norm"] for sample in choice["samples"]) / 8
    assert mean == choice["metrics"]["acc_norm"]["value"]


def test_a_second_call_runs_nothing(run: Run) -> None:
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run()}
    assert run.started() == ["tiny_choice", "tiny_rolling"]
    again = run(batch_size=2)  # decides no score
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in again} == first
    assert len(run.lines) == 2
    assert all(line.endswith("has its score already") for line in run.lines)


@pytest.mark.parametrize("changes", [{"limit": 1}, {"max_length": 48}, {"dtype": "bfloat16"}])
def test_another_setting_runs_again(run: Run, changes: dict[str, Any]) -> None:
    before = [read(path)["identity"] for path in run(tasks=("tiny_rolling",))]
    after = [read(path)["identity"] for path in run(tasks=("tiny_rolling",), **changes)]
    assert run.started() == ["tiny_rolling"]
    assert before != after


def test_other_weights_run_again_and_a_moved_folder_does_not(run: Run, tmp_path: Path) -> None:
    run()
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(run.model, moved)
    run(model=moved)
    assert not run.started()
    save_model(other, seed=1)
    run(model=other)
    assert run.started() == ["tiny_choice", "tiny_rolling"]


def test_changed_task_data_run_again_and_moved_data_do_not(run: Run, tmp_path: Path) -> None:
    folders = tmp_path / "here", tmp_path / "there"
    for folder in folders:
        write_tasks(folder)
    run(include_path=str(folders[0]))
    run(include_path=str(folders[1]))
    assert not run.started()
    (folders[1] / "choice.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    run(include_path=str(folders[1]))
    assert run.started() == ["tiny_choice"]


def test_a_kill_between_tasks_loses_no_finished_task(run: Run) -> None:
    def kill_in_second(line: str) -> None:
        if "(2 of 2)" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_line=kill_in_second)
    run()
    assert run.started() == ["tiny_rolling"]


def test_a_damaged_file_is_replaced(run: Run) -> None:
    path, _ = run()
    whole = read(path)
    path.write_text("{")
    run()
    assert {**read(path), "seconds": 0} == {**whole, "seconds": 0}


def test_a_failing_task_keeps_the_others(run: Run) -> None:
    tasks = ("no_data", "tiny_choice", "bad_template", "bad_document", "tiny_rolling")
    with pytest.raises(EvalError, match="3 of 5 tasks failed on tiny") as caught:
        run(tasks=tasks)
    assert "no_data: FileNotFoundError" in str(caught.value)
    assert "bad_template: Template" in str(caught.value)
    assert "bad_document: ZeroDivisionError" in str(caught.value)
    assert sorted(path.stem for path in (run.out / "tiny").iterdir()) == [
        "tiny_choice",
        "tiny_rolling",
    ]
    with pytest.raises(EvalError, match="3 of 5"):
        run(tasks=tasks)
    assert run.started() == ["bad_document"]  # the other two fail when opened: no model needed


def test_what_a_group_overrides_is_part_of_the_identity(run: Run) -> None:
    alone = read(run(tasks=("tiny_choice",))[0])
    grouped = read(run(tasks=("tiny_group",))[0])
    assert run.started() == ["tiny_choice", "tiny_other"]
    assert (alone["task"], grouped["task"]) == ("tiny_choice", "tiny_choice")
    assert (alone["requested"], grouped["requested"]) == ("tiny_choice", "tiny_group")
    assert alone["identity"]["task_definition"] != grouped["identity"]["task_definition"]
    run(tasks=("tiny_tag",))
    tagged = read(run.out / "tiny" / "tiny_choice.json")
    assert tagged["identity"] == alone["identity"]


def test_unknown_tasks_are_named_with_the_nearest_before_a_model_is_sought(run: Run) -> None:
    with pytest.raises(EvalError) as caught:
        run(tasks=("tiny_choise", "tiny_choice", "xyz"), model=Path("absent"))
    assert "2 of 3 names do not exist" in str(caught.value)
    assert "tiny_choise (did you mean tiny_choice" in str(caught.value)
    assert "lm-eval ls tasks --include_path" in str(caught.value)


def test_no_tasks_need_no_model(run: Run) -> None:
    assert run(tasks=(), model=Path("absent")) == []


def test_an_absent_model_folder_is_refused_before_a_task_is_opened(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(EvalError, match=r"there is no model folder .*absent"):
        run(model=tmp_path / "absent")
    assert not run.lines


def test_weights_that_are_a_pointer_are_refused(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pointer"
    shutil.copytree(run.model, folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(EvalError, match=r"cannot open the model .*pointer"):
        run(model=folder)


def test_a_model_without_some_of_its_weights_is_refused(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    shutil.copytree(run.model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvalError, match=r"lacks weights.*model.layers.1.mlp.up_proj.weight"):
        run(model=folder)


def test_a_context_beyond_the_model_is_refused(run: Run) -> None:
    with pytest.raises(EvalError, match=r"Set evaluation\.max_length=256"):
        run(max_length=512)


def test_cut_prompts_are_counted_and_reported(run: Run) -> None:
    assert read(run(tasks=("tiny_choice",), limit=1)[0])["num_truncated"] == 0
    assert read(run(tasks=("tiny_choice",), limit=1, max_length=16)[0])["num_truncated"] == 3
    assert run.lines[-1].split("; ")[1].startswith("3 prompts did not fit into max_length")


def test_lm_eval_leaves_the_terminal_to_us(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run()
    assert capfd.readouterr() == ("", "")
