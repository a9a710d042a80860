"""Cards of students: true, complete, and readable for the hub."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from distill.cache.reader import open_cache
from distill.cli import main
from distill.config import ExperimentConfig
from distill.errors import ConfigError
from distill.model_card import put_results, student_files
from distill.train import train
from students import build_student

ConfigMaker = Callable[..., ExperimentConfig]
NOTICE = (
    "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. "
    "All Rights Reserved."
)


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    fields: dict[str, Any] = yaml.safe_load(match[1])
    return fields


@pytest.fixture
def llama_teacher(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher, with a licence's text beside it."""
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "llama"))
    (folder / "LICENSE").write_text("the text of the licence")
    return folder


def test_run_of_a_llama_teacher_meets_every_duty(
    tiny_yaml: Path, llama_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        f"teacher.model={llama_teacher}",
        f"student.model={llama_teacher}",
        "teacher.licence=llama3.1",
    ]
    assert main(["run", str(tiny_yaml), *settings]) == 0
    assert "the student is to be called Llama-run" in capsys.readouterr().out
    for folder in ("initial", "final"):
        student = tmp_path / "run" / "student" / folder
        assert (student / "NOTICE").read_text() == NOTICE + "\n"
        assert (student / "LICENSE").read_text() == "the text of the licence"
        card = (student / "README.md").read_text()
        assert front_matter(card)["license"] == "llama3.1"
        assert front_matter(card)["model_name"] == "Llama-run"
        assert "\n# Llama-run\n\n**Built with Llama**\n" in card
        assert NOTICE in card
        # Scores came with the evaluation, which is part of the run.
        assert "| teacher | teacher |" in card
        assert "Not measured yet" not in card


@pytest.mark.parametrize("verb", ["run", "train"])
def test_run_of_a_llama_teacher_without_a_licence_text_is_refused_before_it_costs_anything(
    tiny_yaml: Path,
    llama_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    settings = [
        f"teacher.model={llama_teacher}",
        f"student.model={llama_teacher}",
        "teacher.licence=llama3.1",
    ]
    if verb == "train":
        assert main(["cache", str(tiny_yaml), *settings]) == 0
    (llama_teacher / "LICENSE").unlink()
    assert main([verb, str(tiny_yaml), *settings]) == 2
    assert "demands that a copy of the licence" in capsys.readouterr().err
    assert not (tmp_path / "run" / "student").exists()
    assert (tmp_path / "run" / "cache").exists() == (verb == "train")


def test_training_from_python_is_refused_before_its_first_step(
    tiny_yaml: Path, tiny_config: ConfigMaker, llama_teacher: Path, tmp_path: Path
) -> None:
    settings = (
        f"teacher.model={llama_teacher}",
        f"student.model={llama_teacher}",
        "teacher.licence=llama3.1",
    )
    assert main(["cache", str(tiny_yaml), *settings]) == 0
    config = tiny_config(*settings, "card.name=tiny")
    with pytest.raises(ConfigError, match=r"card\.name is 'tiny'"):
        train(config, *build_student(config))
    assert not (tmp_path / "run" / "checkpoints").exists()


def make_card(config: ExperimentConfig, *, is_trained: bool = False) -> str:
    model, _ = build_student(config)
    manifest = open_cache(config.cache_folder("train")).manifest
    return student_files(config, manifest, model, is_trained=is_trained)["README.md"].decode()


def test_card_tells_teacher_data_targets_and_how_the_student_was_made(
    tiny_config: ConfigMaker, tiny_teacher: Path, cache_copy: Path
) -> None:
    config = tiny_config()
    card = make_card(config)
    manifest = open_cache(str(cache_copy / "train")).manifest
    for fact in (
        f"- model: {tiny_teacher}",
        "- dtype: float32",
        f"- weights: {manifest.teacher['weights']}",
        "documents.jsonl",
        "- blocks: 24 of 32 tokens",
        f"- rows that count: {manifest.num_rows}",
        f"fingerprint {manifest.tokenizer['fingerprint'][:16]}",
        "- kind: threshold\n",
        "- tau: 0.1",
        "- kind: pruned\n",
        "- depth layers: 1 of 2",
        f"- teacher `{tiny_teacher}`: **not stated** (`teacher.licence`)",
        "75,072 parameters, cut out of a larger model, **before any training**",
        "transformers 5.",
    ):
        assert fact in card
    assert "## Training" not in card
    assert "Built with" not in card
    fields = front_matter(card)
    assert fields == {
        "model_name": "run",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "pruned-student"],
    }


def test_trained_card_tells_settings_steps_and_held_out_scores(
    tiny_config: ConfigMaker, cache_copy: Path
) -> None:
    config = tiny_config("train.learning_rate=2e-3", "train.epochs=2", "seed=0")
    folder = train(config, *build_student(config))
    card = (folder / "README.md").read_text()
    assert cache_copy.is_dir()
    for fact in (
        "- steps: 8\n",
        "- tokens: 1,536\n",
        "- seed: 0\n",
        "- learning rate: 0.002\n",
        "- kl weight: 0.9\n",
    ):
        assert fact in card
    assert re.search(
        r"after 8 steps: cross-entropy \d+\.\d{4} nats, KL\(teacher \|\| student\) \d\.\d{4}", card
    )


def test_lines_that_load_the_student_work(
    tiny_config: ConfigMaker, cache_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    folder = train(config, *build_student(config))
    assert cache_copy.is_dir()
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(code[1].replace("path/to/run", "./final"), names)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert names["model"].num_parameters() == model.num_parameters()
    assert len(names["tokenizer"]) == 258


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (("teacher.licence=apache-2.0",), {"license": "apache-2.0"}),
        (("teacher.licence=mit",), {"license": "mit"}),
        (("teacher.licence=My own",), {"license": "other", "license_name": "My own"}),
        (
            ("student.kind=scratch", "student.size=135m", "teacher.licence=mit"),
            {"license": "mit", "tags": ["knowledge-distillation", "scratch-student"]},
        ),
        (
            ("data.sources=[{path: org/text}, {path: org/text}, {path: json}]",),
            {"datasets": ["org/text"]},
        ),
    ],
)
def test_front_matter_has_what_the_hub_reads(
    tiny_config: ConfigMaker,
    written_cache: Path,
    overrides: tuple[str, ...],
    fields: dict[str, Any],
) -> None:
    card = make_card(tiny_config(*overrides, f"cache.folder={written_cache}"))
    found = front_matter(card)
    assert {key: found[key] for key in fields} == fields
    assert "base_model" not in found


def test_base_model_is_a_hub_id_and_never_a_local_path(
    tiny_config: ConfigMaker, written_cache: Path, llama_teacher: Path
) -> None:
    (llama_teacher / "README.md").write_text("---\nbase_model: org/origin\n---\ntext\n")
    config = tiny_config(f"student.model={llama_teacher}", f"cache.folder={written_cache}")
    card = make_card(config)
    assert front_matter(card)["base_model"] == ["org/origin"]
    assert f"- base `{llama_teacher}`: **not stated** (`card.base_licence`)" in card


def test_results_are_replaced_and_the_rest_of_the_card_stays(tmp_path: Path) -> None:
    text = "# a\n<!-- results -->\nold\n<!-- end of results -->\nend\n"
    (tmp_path / "README.md").write_text(text)
    for _ in range(2):
        assert put_results(tmp_path, "| new |\n")
        assert (tmp_path / "README.md").read_text() == text.replace("old", "| new |")


@pytest.mark.parametrize("text", ["# a card of the user's own\n", "<!-- results -->\n", None])
def test_card_without_a_place_for_results_is_left_alone(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert not put_results(tmp_path, "new")
    assert ((tmp_path / "README.md").read_text() if text else None) == text
