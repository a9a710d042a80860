"""Compare teacher, untrained and trained student and further models: fidelity, lm-eval, costs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.cache.reader import open_cache
from distill.config import ComparedModelConfig, ExperimentConfig
from distill.errors import (
    CacheError,
    ConfigError,
    DistillError,
    EvalError,
    StorageError,
)
from distill.evaluate.cost import keep_cost
from distill.evaluate.failures import MODEL_ERRORS, first_line
from distill.evaluate.harness import check_tasks, run_tasks
from distill.evaluate.kept_fidelity import keep_fidelity, weights_identity
from distill.files import write_json_atomically
from distill.models import pick_device

INITIAL = "initial"
"""Name of the untrained student, and of its folder below RUN_FOLDER/student."""
FINAL = "final"
"""Folder of the trained student below RUN_FOLDER/student; its name in tables is `student`."""


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One row of the table, and how its model is opened."""

    name: str
    role: str
    settings: ComparedModelConfig

    def as_dict(self) -> dict[str, Any]:
        """Return its entry in models.json."""
        known = {"adapter": self.settings.adapter, "backend": self.settings.backend}
        return {
            "name": self.name,
            "role": self.role,
            "path": self.settings.path,
            "num_parameters": _count_parameters(self.settings),
        } | {key: value for key, value in known.items() if value not in (None, "hf")}


def evaluate(config: ExperimentConfig, *, on_progress: Callable[[str], None] = print) -> Path:
    """Score every model of the run that has no valid score yet.

    What fails on one model does not keep the others, nor other tasks, from their scores.

    Args:
        config: The experiment.
        on_progress: Receives one line for each thing done or skipped.

    Returns:
        The folder with the scores, RUN_FOLDER/eval, which `distill.evaluate.leaderboard` reads.

    Raises:
        EvalError: a task does not exist (before any model is loaded); or some models could not be
            opened or scored, after all others were: it lists them all.
        ConfigError: two models have one name.
        CacheError: a held-out cache is missing or damaged.
        StorageError: the disk is full.
    """
    check_tasks(config.evaluation)
    for folder in (config.cache_folder("held_out"), *config.evaluation.held_out.values()):
        open_cache(folder)
    models = compared_models(config)
    out = config.run_folder / "eval"
    write_json_atomically(out / "models.json", [model.as_dict() for model in models])
    failures: list[tuple[str, Exception]] = []
    for stage in (_measure_fidelity, _run_tasks, _measure_cost):
        for model in models:
            try:
                stage(model, config, out, on_progress)
            except (CacheError, StorageError):  # would meet every model
                raise
            except MODEL_ERRORS as error:
                on_progress(f"{model.name} failed: {first_line(error)}")
                failures.append((model.name, error))
    if failures:
        raise _failed(failures, len(models)) from failures[0][1]
    return out


def compared_models(config: ExperimentConfig) -> list[ComparedModel]:
    """Every model that is there, in the order of the table.

    Raises:
        ConfigError: two models have one name.
    """
    student = config.run_folder / "student"
    found = [("teacher", "teacher", config.teacher.model)]
    found += [
        (name, role, str(student / folder))
        for name, role, folder in ((INITIAL, "initial", INITIAL), ("student", "student", FINAL))
        if (student / folder).is_dir()
    ]
    others = config.evaluation.models
    taken = {name for name, _, _ in found} & others.keys()
    if taken:
        raise ConfigError(f"evaluation.models: the names {sorted(taken)} are taken; choose others.")
    return [
        *(
            ComparedModel(name=name, role=role, settings=ComparedModelConfig(path=path))
            for name, role, path in found
        ),
        *(
            ComparedModel(name=name, role="other", settings=settings)
            for name, settings in others.items()
        ),
    ]


def _count_parameters(model: ComparedModelConfig) -> int | None:
    """Parameters of a local model and adapter, from the headers of files; tied ones count once."""
    counts = [
        _count_in(Path(folder)) for folder in (model.path, model.adapter) if folder is not None
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _count_in(folder: Path) -> int | None:
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            if header_bytes > file.stat().st_size:
                return None  # no such file at all, which opening the model will say
            try:
                header = json.loads(opened.read(header_bytes))
            except ValueError:
                return None
        for name, entry in header.items():
            if name != "__metadata__":
                total += torch.Size(entry["shape"]).numel()
    return total or None


def _measure_fidelity(
    model: ComparedModel,
    config: ExperimentConfig,
    out: Path,
    on_progress: Callable[[str], None],
) -> None:
    keep_fidelity(
        model.name,
        model.settings,
        config,
        out / model.name / "fidelity.json",
        is_own=model.role != "other",
        on_progress=on_progress,
    )


def _run_tasks(
    model: ComparedModel,
    config: ExperimentConfig,
    out: Path,
    on_progress: Callable[[str], None],
) -> None:
    run_tasks(
        model.name,
        model.settings,
        config.evaluation,
        out,
        device=config.device,
        seed=config.seed,
        on_progress=on_progress,
    )


def _measure_cost(
    model: ComparedModel,
    config: ExperimentConfig,
    out: Path,
    on_progress: Callable[[str], None],
) -> None:
    if config.evaluation.cost is None:
        return
    if model.settings.backend != "hf":
        on_progress(f"{model.name}: opened by {model.settings.backend}, no costs")
        return
    keep_cost(
        model.name,
        model.settings,
        out / model.name / "cost.json",
        dtype=config.evaluation.dtype,
        device=str(pick_device(config.device)),
        settings=config.evaluation.cost,
        weights=weights_identity(model.settings),
        on_progress=on_progress,
    )


def _failed(failures: list[tuple[str, Exception]], num_models: int) -> EvalError:
    names = list(dict.fromkeys(name for name, _ in failures))
    # A model that is not there fails in every stage, with the same words.
    texts = "\n".join(dict.fromkeys(_indented(name, error) for name, error in failures))
    return EvalError(
        f"{len(names)} of {num_models} models could not be scored in full: {', '.join(names)}. "
        f"The others have their scores.\n{texts}"
    )


def _indented(name: str, error: Exception) -> str:
    text = str(error) if isinstance(error, DistillError) else first_line(error)
    return "\n".join(f"  {line}" for line in f"{name}: {text}".splitlines())
