"""Compare teacher, untrained and trained student and further models: fidelity, then lm-eval."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill import fingerprint
from distill.cache.reader import Cache, open_cache
from distill.config import ExperimentConfig
from distill.distillation_model import DistillationModel
from distill.errors import ConfigError, MismatchError
from distill.evaluate.fidelity import measure
from distill.evaluate.harness import check_tasks, run_tasks
from distill.files import write_json_atomically
from distill.models import load_causal_lm, load_tokenizer, pick_device
from distill.progress import ProgressBar

INITIAL = "initial"
"""Name of the untrained student, and of its folder below RUN_FOLDER/student."""
FINAL = "final"
"""Folder of the trained student below RUN_FOLDER/student; its name in tables is `student`."""


def evaluate(config: ExperimentConfig, *, on_progress: Callable[[str], None] = print) -> Path:
    """Score every model of the run that has no valid score yet.

    Args:
        config: The experiment.
        on_progress: Receives one line for each thing done or skipped.

    Returns:
        The folder with the scores, RUN_FOLDER/eval, which `distill.evaluate.leaderboard` reads.

    Raises:
        EvalError: a task does not exist (before any model is loaded), or some tasks failed.
        ConfigError: a model cannot be opened, or there is none to compare.
        CacheError: the held-out cache is missing or damaged.
    """
    if config.evaluation.tasks:
        check_tasks(config.evaluation)
    cache = open_cache(config.cache_folder("held_out"))
    models = compared_models(config)
    out = config.run_folder / "eval"
    write_json_atomically(out / "models.json", models)
    for model in models:
        _measure_fidelity(model, cache, config, out / model["name"] / "fidelity.json", on_progress)
    for model in models:
        run_tasks(
            model["name"],
            model["path"],
            config.evaluation,
            out,
            device=config.device,
            seed=config.seed,
            on_progress=on_progress,
        )
    return out


def compared_models(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Name, role, path and parameters of each model that is there, in the order of the table.

    Raises:
        ConfigError: two models have one name, or a further model is missing.
    """
    student = config.run_folder / "student"
    found = [("teacher", "teacher", config.teacher.model)]
    found += [
        (name, role, str(student / folder))
        for name, role, folder in ((INITIAL, "initial", INITIAL), ("student", "student", FINAL))
        if (student / folder).is_dir()
    ]
    taken = {name for name, _, _ in found} & config.evaluation.models.keys()
    if taken:
        raise ConfigError(f"evaluation.models: the names {sorted(taken)} are taken; choose others.")
    found += [(name, "other", path) for name, path in config.evaluation.models.items()]
    return [
        {"name": name, "role": role, "path": path, "num_parameters": _count_parameters(path)}
        for name, role, path in found
    ]


def _count_parameters(path: str) -> int | None:
    """Parameters of a local model, from the headers of its weight files; tied ones count once."""
    total = 0
    for file in Path(path).glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                total += torch.Size(entry["shape"]).numel()
    return total or None


def _measure_fidelity(
    model: dict[str, Any],
    cache: Cache,
    config: ExperimentConfig,
    target: Path,
    on_progress: Callable[[str], None],
) -> None:
    path = Path(model["path"])
    identity = {
        "weights": fingerprint.of_weights(path) if path.exists() else model["path"],
        "cache": cache.manifest.checksum,
        "dtype": config.evaluation.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if target.exists() and json.loads(target.read_text())["identity"] == identity:
        on_progress(f"{model['name']}: fidelity is there, skipped")
        return
    tokenizer = load_tokenizer(model["path"], f"model {model['name']}")
    if fingerprint.of_tokenizer(tokenizer) != cache.manifest.tokenizer["fingerprint"]:
        if model["role"] == "other":
            on_progress(f"{model['name']}: other tokenizer than the cache's, no fidelity")
            return
        raise MismatchError(
            f"the {model['name']} has another tokenizer than the held-out cache.\n"
            f"  cache  {cache.url}  {cache.manifest.tokenizer['fingerprint'][:8]}\n"
            f"  model  {model['path']}  {fingerprint.of_tokenizer(tokenizer)[:8]}"
        )
    device = pick_device(config.device)
    dtype = getattr(torch, config.evaluation.dtype)
    loaded = load_causal_lm(model["path"], f"model {model['name']}", dtype=dtype)
    wrapped = DistillationModel(loaded.to(device))
    with ProgressBar(f"fidelity {model['name']}", cache.manifest.num_tokens) as bar:
        fidelity = measure(wrapped, cache, device=device, on_block=bar.advance)
    write_json_atomically(target, {"identity": identity, **fidelity.as_dict()})
