"""The recovery experiment with tiny models: equal tokens, nothing done twice, one source."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cache.reader import open_cache
from distill.cli import main as distill
from distill.config import load
from distill.evaluate.results import collect
from distill.export import read_provenance
from distill.fingerprint import of_weights
from scripts import recovery
from scripts.recovery import Experiment, cut_passages, held_out_items, report, run
from scripts.recovery_report import plot, table
from tests.conftest import folder_bytes
from tests.tiny_tasks import write_tasks

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "recovery.json"
SHAPES = {
    "depth": (),
    "width": ("student.num_layers=null", "student.intermediate_size=48"),
}
ARMS = ["depth-kd-0", "depth-ce-0", "width-kd-0", "width-ce-0"]


@pytest.fixture
def config(tiny_yaml: Path, tmp_path: Path) -> Path:
    """The tiny experiment with one lm-eval task."""
    tasks = write_tasks(tmp_path / "tasks")
    tree = yaml.safe_load(tiny_yaml.read_text())
    tree["evaluation"] |= {"include_path": str(tasks), "tasks": ["tiny_choice"]}
    tree["student"]["calibration_blocks"] = 2
    tiny_yaml.write_text(yaml.safe_dump(tree))
    return tiny_yaml


@pytest.fixture
def experiment(config: Path, corpus: Path, tmp_path: Path) -> Experiment:
    return Experiment(config=config, corpus=corpus, run=tmp_path / "run", shapes=SHAPES)


@pytest.mark.slow
def test_arms_see_equal_tokens_once_and_differ_in_loss_alone(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(experiment)
    assert list(experiment.arms) == ARMS
    found = report(experiment)
    assert found["train_tokens"] == 24 * 32
    assert [model["name"] for model in found["models"]] == ["teacher", *SHAPES, *ARMS]
    students = {name: tmp_path / "run" / name / "student" for name in ARMS}
    trained = {name: read_provenance(folder / "final") for name, folder in students.items()}
    for name, made in trained.items():
        assert made is not None
        assert made["step"] * 6 * 32 == found["train_tokens"]
        assert (made["training"]["train"]["kl_weight"] == 0) == ("-ce-" in name)
    checksums = [made["training"]["caches"] for made in trained.values() if made]
    assert checksums == [checksums[0]] * len(ARMS)
    for shape in SHAPES:
        starts = {of_weights(students[name] / "initial") for name in ARMS if shape in name}
        ends = {of_weights(students[name] / "final") for name in ARMS if shape in name}
        assert len(starts) == 1
        assert len(ends) == 2

    before = dict(folder_bytes(tmp_path / "run"))
    capsys.readouterr()
    run(experiment)
    again = capsys.readouterr().out
    assert again.count("train: finished") == again.count("/final, skipped") == len(ARMS)
    assert again.count("fidelity is there, skipped") == len(ARMS) + 3
    assert dict(folder_bytes(tmp_path / "run")) == before
    assert report(experiment) == found
    json.dumps(found, allow_nan=False)
    assert len(found["comparisons"]) == len(SHAPES) * 4


@pytest.mark.slow
def test_one_command_writes_result_table_and_plot(
    config: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recovery, "SHAPES", {"depth": ()})
    out = tmp_path / "out" / "recovery.json"
    arguments = ["--config", config, "--corpus", corpus, "--run", tmp_path / "run", "--out", out]
    arguments += ["--limit", 4, "train.epochs=0.5"]
    monkeypatch.setattr(sys, "argv", ["scripts/recovery.py", *map(str, arguments)])
    recovery.main()
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["train_tokens"] == 12 * 32
    assert result["models"][1]["tasks"]["tiny_choice"]["num_documents"] == 4
    assert result["machine"]["cores"] >= 1
    assert out.with_suffix(".md").read_text() == table(result)
    assert out.with_suffix(".png").stat().st_size > 0
    (own,) = (c for c in result["comparisons"] if c["task"] == "tiny_choice")
    assert own["test"] == "mcnemar_exact"


@pytest.mark.slow
def test_several_seeds_order_the_data_anew_and_their_mean_is_compared(
    experiment: Experiment, tmp_path: Path
) -> None:
    twice = replace(experiment, num_seeds=2, shapes={"depth": ()})
    run(twice)
    found = report(twice)
    assert found["train_seeds"] == [0, 1]
    kl = {model["name"]: model["kl_nats"]["value"] for model in found["models"]}
    assert kl["depth-kd-0"] != kl["depth-kd-1"]
    assert len({of_weights(tmp_path / "run" / arm / "student/initial") for arm in twice.arms}) == 1
    (compared,) = (each for each in found["comparisons"] if each["metric"] == "kl_nats")
    means = {loss: (kl[f"depth-{loss}-0"] + kl[f"depth-{loss}-1"]) / 2 for loss in ("kd", "ce")}
    assert compared["difference"] == pytest.approx(means["kd"] - means["ce"], rel=1e-6)


@pytest.mark.usefixtures("cache_copy")
def test_held_out_documents_add_up_to_the_fidelity(experiment: Experiment, tmp_path: Path) -> None:
    config = load(experiment.config)
    distill(["eval", str(experiment.config), "evaluation.tasks=[]"])
    (teacher,) = collect(tmp_path / "run")
    assert teacher.fidelity is not None
    for measure in recovery.HELD_OUT:
        items = held_out_items(tmp_path / "run", measure, "teacher")
        assert items.value == pytest.approx(getattr(teacher.fidelity, measure).value, rel=1e-9)
        assert len(items.doc_ids_N) == teacher.fidelity.num_documents
    assert items.sums_N2[:, 1].sum() == open_cache(config.cache_folder("held_out")).num_rows


def test_a_passage_is_the_beginning_of_its_document_in_whole_words(tmp_path: Path) -> None:
    texts = ["short \u2028 text", "word " * 1000]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    )
    cut_passages(corpus, tmp_path / "run" / "passages.jsonl")
    lines = (tmp_path / "run" / "passages.jsonl").read_text().splitlines()
    short, long = (json.loads(line)["text"] for line in lines)
    assert short == texts[0]
    assert texts[1].startswith(long)
    assert long.endswith("word")
    assert 1990 < len(long) <= 2000


def test_the_kept_table_is_made_of_the_kept_result(tmp_path: Path) -> None:
    result: dict[str, Any] = json.loads(RESULT.read_text())
    assert RESULT.with_suffix(".md").read_text() == table(result)
    plot(result, tmp_path / "recovery.png")
    tokens = result["train_tokens"]
    assert f"saw {tokens:,} tokens" in table(result)
