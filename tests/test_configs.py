"""Configurations: strict, complete, and every shipped one valid."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli import parse as parse_command
from distill.config import ExperimentConfig, PrunedStudentConfig, TopKConfig, load, parse, to_tree
from distill.errors import ConfigError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

MINIMAL: dict[str, Any] = {
    "run_folder": "runs/x",
    "data": {"sources": [{"path": "json", "data_files": ["a.jsonl"]}]},
    "teacher": {"kind": "resident", "model": "models/teacher"},
    "student": {"kind": "pruned", "model": "models/teacher", "num_layers": 2},
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_is_valid_and_complete(path: Path) -> None:
    config = load(path)
    assert config.run_folder.name == path.stem
    assert config.teacher.licence, "a student's card needs the licence of its teacher"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_resolved_config_reads_back_as_itself(path: Path) -> None:
    config = load(path)
    assert parse(ExperimentConfig, to_tree(config), "tree") == config


def test_llama_configs_hold_hub_ids_of_one_family() -> None:
    for size in ("70b", "405b"):
        config = load(ROOT / "configs" / f"llama31-{size}-to-8b.yaml")
        student = to_tree(config)["student"]
        assert config.teacher.model.startswith(f"meta-llama/Llama-3.1-{size.upper()}")
        assert student["model"].startswith("meta-llama/Llama-3.1-8B")
        assert config.teacher.licence == "llama3.1"


def test_all_problems_are_reported_at_once_by_dotted_name(minimal: Path) -> None:
    overrides = ["train.kl_wieght=1", "data.block_length=1", "student.num_layers=0", "seed=x"]
    with pytest.raises(ConfigError) as caught:
        load(minimal, overrides)
    message = str(caught.value)
    assert "4 bad setting(s)" in message
    assert "train.kl_wieght: no such setting (got 1)" in message
    for name in ("data.block_length", "student.num_layers", "seed"):
        assert f"  {name}: " in message


def test_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(yaml.safe_dump({key: MINIMAL[key] for key in ("run_folder", "student")}))
    with pytest.raises(ConfigError, match=r"data: is required\n  teacher: is required"):
        load(path)


def test_override_of_kind_starts_from_its_own_defaults(minimal: Path) -> None:
    config = load(minimal, ["targets.tau=0.5", "targets.kind=top_k", "targets.k=3"])
    assert config.targets == TopKConfig(kind="top_k", k=3)


def test_numbers_that_yaml_reads_as_text_are_numbers(minimal: Path) -> None:
    assert load(minimal, ["train.learning_rate=3e-4"]).train.learning_rate == 3e-4


@pytest.mark.parametrize("value", [".nan", ".inf", "0", "-1"])
def test_senseless_temperature_is_refused(minimal: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"targets\.temperature"):
        load(minimal, ["targets.kind=threshold", f"targets.temperature={value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected name=value"),
        ("=3", "expected name=value"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("train.blocks_per_step=[", "is not valid YAML"),
        ("train.micro_batch_blocks=3", "must be a multiple of micro_batch_blocks"),
    ],
)
def test_bad_override_is_explained(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(minimal, ["seed=1", override])


def test_weights_that_are_both_zero_are_refused(minimal: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to learn"):
        load(minimal, ["train.kl_weight=0", "train.ce_weight=0"])


def test_missing_file_and_wrong_yaml_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load(tmp_path / "none.yaml")
    for text, message in (("- a\n- b", "found list"), ("a: [", "not valid YAML"), ("", "NoneType")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "bad.yaml")


def test_config_is_frozen(minimal: Path) -> None:
    config = load(minimal)
    assert isinstance(config.student, PrunedStudentConfig)
    with pytest.raises(AttributeError):
        config.student.num_layers = 3  # type: ignore[misc]  # that is the point


def test_environment_plays_no_part(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(minimal)
    for name in ("SEED", "STUDENT", "DISTILL_SEED", "RUN_FOLDER"):
        monkeypatch.setenv(name, "1")
    assert load(minimal) == before


def _commands(text: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line for language, block in fenced if language == "bash" for line in block.splitlines()
    ]
    return [line.split(" #")[0].strip() for line in lines if line.startswith("distill ")]


def test_every_command_in_the_documents_parses_and_names_real_configs() -> None:
    found = 0
    for document in DOCUMENTS:
        for line in _commands(document.read_text()):
            options = parse_command(shlex.split(line)[1:])
            targets = options.target if isinstance(options.target, list) else [options.target]
            for target in targets:
                assert not target.startswith("configs/") or (ROOT / target).exists(), line
            if getattr(options, "overrides", None):
                load(ROOT / options.target, options.overrides)
            found += 1
    assert found >= 7
