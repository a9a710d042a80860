"""Compare teacher, untrained and trained student and further models: fidelity, lm-eval, costs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.cache.reader import Cache, open_cache
from distill.config import ComparedModelConfig, ExperimentConfig
from distill.distillation_model import DistillationModel
from distill.errors import (
    CacheError,
    ConfigError,
    DistillError,
    EvalError,
    MismatchError,
    StorageError,
)
from distill.evaluate.backends import identify
from distill.evaluate.cost import keep_cost
from distill.evaluate.failures import MODEL_ERRORS, first_line
from distill.evaluate.fidelity import measure
from distill.evaluate.harness import check_tasks, run_tasks
from distill.evaluate.local_models import free_memory, pretrained_options, with_adapter
from distill.files import write_json_atomically
from distill.fingerprint import of_tokenizer, of_weights
from distill.models import load_causal_lm, load_tokenizer, out_of_memory_as, pick_device
from distill.progress import ProgressBar

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
        CacheError: the held-out cache is missing or damaged.
        StorageError: the disk is full.
    """
    check_tasks(config.evaluation)
    cache = open_cache(config.cache_folder("held_out"))
    models = compared_models(config)
    out = config.run_folder / "eval"
    write_json_atomically(out / "models.json", [model.as_dict() for model in models])
    failures: list[tuple[str, Exception]] = []
    for stage in (_measure_fidelity, _run_tasks, _measure_cost):
        for model in models:
            try:
                stage(model, cache, config, out, on_progress)
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
    cache: Cache,
    config: ExperimentConfig,
    out: Path,
    on_progress: Callable[[str], None],
) -> None:
    settings, what = model.settings, f"model {model.name}"
    if settings.backend != "hf":
        on_progress(f"{model.name}: opened by {settings.backend}, no fidelity")
        return
    target = out / model.name / "fidelity.json"
    identity = {
        **_weights(settings),
        "cache": cache.manifest.checksum,
        "dtype": config.evaluation.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if target.exists() and json.loads(target.read_text())["identity"] == identity:
        on_progress(f"{model.name}: fidelity is there, skipped")
        return
    options = pretrained_options(settings)
    tokenizer = load_tokenizer(settings.tokenizer or settings.path, what, options.get("revision"))
    fingerprint = of_tokenizer(tokenizer)
    if fingerprint != cache.manifest.tokenizer["fingerprint"]:
        if model.role == "other":
            on_progress(f"{model.name}: other tokenizer than the cache's, no fidelity")
            return
        raise MismatchError(
            f"the {model.name} has another tokenizer than the held-out cache.\n"
            f"  cache  {cache.url}  {cache.manifest.tokenizer['fingerprint'][:8]}\n"
            f"  model  {settings.path}  {fingerprint[:8]}"
        )
    device = pick_device(config.device)
    dtype = getattr(torch, config.evaluation.dtype)
    with out_of_memory_as(EvalError, "Evaluate on device=cpu, or with evaluation.dtype=bfloat16."):
        loaded = load_causal_lm(settings.path, what, dtype=dtype, **options)
        if settings.adapter is not None:
            loaded = with_adapter(loaded, settings.adapter, settings.path)
        if "device_map" not in options:
            loaded.to(device)
        wrapped = DistillationModel(loaded)
        with ProgressBar(f"fidelity {model.name}", cache.manifest.num_tokens) as bar:
            fidelity = measure(wrapped, cache, device=device, on_block=bar.advance)
    write_json_atomically(target, {"identity": identity, **fidelity.as_dict()})
    del loaded, wrapped
    free_memory()


def _run_tasks(
    model: ComparedModel,
    cache: Cache,
    config: ExperimentConfig,
    out: Path,
    on_progress: Callable[[str], None],
) -> None:
    del cache
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
    cache: Cache,
    config: ExperimentConfig,
    out: Path,
    on_progress: Callable[[str], None],
) -> None:
    del cache
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
        weights=_weights(model.settings),
        on_progress=on_progress,
    )


def _weights(model: ComparedModelConfig) -> dict[str, Any]:
    """Identity of what is measured: fingerprint of weights or hub id, and settings if there are."""
    path = Path(model.path)
    if path.is_file():  # a .gguf, which only fidelity opens
        return {"weights": of_weights(path)}
    identity = identify(model)
    weights = identity.pop("weights") or identity["model"]
    return {key: value for key, value in identity.items() if key != "model"} | {"weights": weights}


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
